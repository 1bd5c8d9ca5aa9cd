"""Which kind of source something is, told by what is there."""

import re
from dataclasses import dataclass
from typing import Literal

from goal_ray.errors import StageError
from goal_ray.shard_urls import expand_files, expand_shards
from goal_ray.shards.sources.candidate import Source
from goal_ray.shards.sources.coco import CocoSource
from goal_ray.shards.sources.folder import PICTURE_SUFFIXES, FolderSource, list_folder
from goal_ray.shards.sources.img2dataset import FilesSource, TarSource
from goal_ray.shards.sources.lists import LIST_SUFFIXES, ListSource
from goal_ray.storage import file_system, join, kind

KINDS = ("folder", "coco", "list", "img2dataset")
_TABLE = re.compile(r"\d{5,}\.parquet")


@dataclass(frozen=True)
class SourceSettings:
    """Where samples come from, and how to read it.

    place: folder, file, glob or brace pattern
    kind: one of KINDS; None to tell it by what is there
    images: folder that relative paths of a list or COCO file start from; None for the file's own folder
    picture_column: column of a list with the pictures' paths; None to tell it by well-known names
    caption_column: column of a list with the captions; None to tell it by well-known names
    key_column: column of a list with the samples' keys; None for the pictures' paths
    captions: of several captions of one picture, make one long caption, or take the first
    quotes: quotation marks enclose fields of CSV and TSV
    """

    place: str
    kind: str | None = None
    images: str | None = None
    picture_column: str | None = None
    caption_column: str | None = None
    key_column: str | None = None
    captions: Literal["join", "first"] = "join"
    quotes: bool = True


def open_source(settings: SourceSettings) -> tuple[str, Source]:
    """The kind of a source and its reader. Raises StageError or ShardError where it is missing or not what it says."""
    place = settings.place
    told = settings.kind or tell_kind(place)
    if told == "coco":
        return told, CocoSource(place, settings.images or place.rpartition("/")[0] or ".", settings.captions)
    if told == "list":
        columns = (settings.picture_column, settings.caption_column, settings.key_column)
        lists = expand_files(place, LIST_SUFFIXES)
        unknown = [url for url in lists if not url.lower().endswith(LIST_SUFFIXES)]
        if unknown:
            raise StageError(f"{unknown[0]}: not a list; a list's name ends in {', '.join(LIST_SUFFIXES)}")
        return told, ListSource(lists, settings.images, columns, settings.captions, settings.quotes)
    if told == "img2dataset":
        files, folders = list_folder(*file_system(place)) if kind(place) == "directory" else ([], [])
        if any(f"{name}.parquet" in files for name in folders):
            return told, FilesSource([join(place, name) for name in folders if name])
        without_tar = [name for name in files if _TABLE.fullmatch(name) and f"{name[:-8]}.tar" not in files]
        return told, TarSource(sorted([*expand_shards(place), *(join(place, name) for name in without_tar)]))
    if kind(place) != "directory":
        raise StageError(f"{place}: no such folder")
    return told, FolderSource(place)


def tell_kind(place: str) -> str:
    """The kind of a source. Raises StageError where it may be more than one, saying how to choose."""
    name = place.lower()
    if name.endswith(LIST_SUFFIXES):
        return "list"
    if name.endswith(".json"):
        return "coco"
    if name.endswith(".tar"):
        return "img2dataset"
    if kind(place) != "directory":
        raise StageError(f"{place}: no folder, and not named as a list, a COCO file or a tar; or say --from")
    files, folders = list_folder(*file_system(place))
    files = [name.lower() for name in files]
    pictures = pictures_among(files)
    tars = [name for name in files if name.endswith(".tar")]
    tables = [name for name in files if _TABLE.fullmatch(name) and name[:-8] in folders]
    if tars or tables:
        # Pictures in folders beside tars are no part of the tars either.
        left_out = pictures or ([] if tables else pictures_in(place, folders))
        if left_out:
            raise StageError(
                f"{place}: holds {(tars or tables)[0]} and beside it {left_out[0]}; for the pictures that are files "
                "say --from folder, for those in tars, or in folders with a table beside them, --from img2dataset"
            )
        return "img2dataset"
    # img2dataset puts 00000_stats.json beside 00000.parquet.
    lists = [name for name in files if name.endswith((*LIST_SUFFIXES, ".json")) and not name.endswith("_stats.json")]
    beside = {name.rpartition(".")[0] for name in pictures}
    lists = [name for name in lists if name.rpartition(".")[0] not in beside]
    if not lists:
        return "folder"
    if not pictures and not folders and not any(name.endswith(".json") for name in lists):
        return "list"
    raise StageError(
        f"{place}: is {lists[0]} a list of pictures? Then give the list itself as SOURCE, with --images {place}; "
        "if the captions are .txt files beside the pictures, say --from folder"
    )


def pictures_among(names: list[str]) -> list[str]:
    """The names that are those of pictures."""
    return [name for name in names if name.lower().endswith(tuple(f".{suffix}" for suffix in PICTURE_SUFFIXES))]


def pictures_in(place: str, folders: list[str]) -> list[str]:
    """The pictures in the first of these folders inside `place` that has any; deeper ones are not looked for."""
    for name in filter(None, folders):
        found = pictures_among(list_folder(*file_system(join(place, name)))[0])
        if found:
            return [f"{name}/{picture}" for picture in found]
    return []
