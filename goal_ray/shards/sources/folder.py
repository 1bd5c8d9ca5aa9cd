"""A folder of pictures, each with its caption in a `.txt` file of the same stem beside it; folders inside count too.

A `.json` file of the same stem goes along. Hidden files are ignored; any other file that is of no use is told of.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from goal_ray.patience import patiently
from goal_ray.shards.sources.candidate import Candidate, Found, Unusable, read_file, stem_and_suffix, tar_key
from goal_ray.storage import file_system

PICTURE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif")


class FolderSource:
    """All pictures under a folder; the key is the path inside it."""

    in_folders = True

    def __init__(self, folder: str):
        self.parts = [folder]

    def candidates(self, part: str) -> Iterator[Candidate]:
        """The pictures in order: a folder's own first, then those of the folders in it, by name."""
        fs, root = file_system(part)
        return walk(fs, root.rstrip("/"), "", (real_path(fs, root),))


def walk(fs: AbstractFileSystem, root: str, inside: str, above: tuple[str, ...]) -> Iterator[Candidate]:
    """The candidates in the folder `inside` of `root`. Holds one folder's listing at a time, and those above it.

    above  the real paths of the folder and of those above it, which tell a link that leads back
    """
    try:
        files, folders = list_folder(fs, f"{root}/{inside}".rstrip("/"))
    except PermissionError as error:
        # Of a store it is said of credentials that expired.
        if not inside or not isinstance(fs, LocalFileSystem):
            raise
        yield Candidate(tar_key(inside), inside, Unusable("unreadable", f"the folder cannot be listed: {error}"))
        return
    prefix = f"{inside}/" if inside else ""
    yield from beside_each_other(fs, root, prefix, files)
    for name in folders:
        if not name:
            reason = "objects in a folder without a name, as in a//b.png, cannot be listed; rename them"
            yield Candidate(tar_key(inside), f"{prefix}/", Unusable("unreadable", reason))
            continue
        real = real_path(fs, f"{root}/{prefix}{name}")
        if real in above:
            yield Candidate(
                tar_key(prefix + name), prefix + name, Unusable("unreadable", "a link to a folder above it")
            )
        else:
            yield from walk(fs, root, prefix + name, (*above, real))


def list_folder(fs: AbstractFileSystem, path: str) -> tuple[list[str], list[str]]:
    """The names of the visible files in a folder, and of the folders in it, links to folders too; sorted.

    A folder of a store may have the name "": that of `a//b.png`, which only a listing of all objects would show.
    """
    files: list[str] = []
    folders: list[str] = []
    for entry in patiently(partial(fs.ls, path, detail=True), fs.unstrip_protocol(path)):
        whole = entry["name"].rstrip("/")
        name = "" if whole == path.rstrip("/") else whole.rsplit("/", 1)[-1]
        if name.startswith("."):
            continue
        # An empty object that marks a folder of an object store, as its web console makes one.
        if entry["type"] == "file" and (entry["name"] != whole or not name):
            continue
        # A link leads to a folder or not; where that cannot be told it is a file, which reading finds out.
        is_folder = entry["type"] == "directory" or (entry["type"] != "file" and fs.isdir(entry["name"]))
        (folders if is_folder else files).append(name)
    return sorted(files), sorted(folders)


def real_path(fs: AbstractFileSystem, path: str) -> str:
    """The path without links; stores other than the local one have none."""
    return os.path.realpath(path) if isinstance(fs, LocalFileSystem) else path.rstrip("/")


def beside_each_other(fs: AbstractFileSystem, root: str, prefix: str, names: list[str]) -> Iterator[Candidate]:
    """The candidates among the files of one folder, which are grouped by their stem."""
    groups: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        stem, suffix = stem_and_suffix(name)
        # `a.jpg` and `a.JPG` are two files; the second name finds its place under its own spelling.
        groups[stem][name if suffix in groups[stem] else suffix] = name
    for stem, files in groups.items():
        key = tar_key(prefix + stem)
        caption, fields = files.pop("txt", None), files.pop("json", None)
        pictures = [name for suffix, name in files.items() if caption is not None or suffix in PICTURE_SUFFIXES]
        addresses = [None if name is None else f"{root}/{prefix}{name}" for name in (caption, fields)]
        for name in pictures:
            load = partial(load_files, fs, f"{root}/{prefix}{name}", *addresses)
            yield Candidate(key, prefix + name, load)
        for name in files.values():
            if name not in pictures:
                yield Candidate(key, prefix + name, Unusable("not a picture", "neither a picture nor a caption of one"))
        if not pictures:
            for name in filter(None, (caption, fields)):
                yield Candidate(
                    key, prefix + name, Unusable("no picture", "no picture of the same stem stands beside it")
                )


def load_files(fs: AbstractFileSystem, picture: str, caption: str | None, fields: str | None) -> Found:
    """Reads a picture and what stands beside it."""
    text = None if caption is None else read_file(fs, caption, "caption")
    others = {} if fields is None else {"json": read_file(fs, fields, ".json beside the picture")}
    return Found(read_file(fs, picture, "picture"), text, others)
