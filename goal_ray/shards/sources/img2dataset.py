"""What img2dataset leaves behind: tars, or folders of files, each with a Parquet table that also tells of failures.

Keys stay those of img2dataset. Its other format, Parquet tables that hold the pictures, is read as a list.
"""

import json
from collections.abc import Iterator
from functools import partial

from goal_ray.errors import ShardError, StageError
from goal_ray.shards.sources.candidate import Candidate, Found, Kind, Unusable
from goal_ray.shards.sources.folder import beside_each_other, list_folder
from goal_ray.shards.sources.lists import rows
from goal_ray.storage import exists, file_system
from goal_ray.tars import CAPTION_EXTENSION, IMAGE_EXTENSIONS, Sample, image_extension, stream_samples

FAILED: Kind = "failed download"


class TarSource:
    """Tars of `KEY.jpg`, `KEY.txt`, `KEY.json` and maybe other members, as `webdataset` output is; keys stay.

    urls  tars, and tables whose tar is missing
    """

    in_folders = False

    def __init__(self, urls: list[str]):
        self.parts = urls

    def candidates(self, part: str) -> Iterator[Candidate]:
        """The samples of a tar up to its damage, the damage, and what its table says failed."""
        name = part.rsplit("/", 1)[-1]
        keys = set[str]()
        if name.endswith(".parquet"):
            yield from table_says(part, name, keys)
            return
        try:
            for sample in stream_samples(part):
                keys.add(sample.key)
                yield Candidate(sample.key, name, partial(load_sample, sample))
        except ShardError as error:
            keys.add(error.key)
            yield Candidate(error.key, name, Unusable("damaged tar", f"{error}; samples behind that place are lost"))
        yield from table_says(f"{part.removesuffix('.tar')}.parquet", name, keys)


class FilesSource:
    """Folders of files, as `files` output is; the base name is the key."""

    in_folders = True

    def __init__(self, folders: list[str]):
        self.parts = folders

    def candidates(self, part: str) -> Iterator[Candidate]:
        """The pictures of a folder, and what its table says failed."""
        fs, path = file_system(part)
        name = part.rsplit("/", 1)[-1]
        keys = set()
        for found in beside_each_other(fs, path, "", list_folder(fs, path)[0]):
            keys.add(found.key)
            yield Candidate(found.key, f"{name}/{found.origin}", found.content)
        yield from table_says(f"{part}.parquet", name, keys)


def load_sample(sample: Sample) -> Found:
    """What a tar holds for a sample."""
    try:
        sample.check_sizes()
    except ShardError as error:
        raise Unusable("too large", str(error)) from None
    if sample.repeated:
        raise Unusable("repeated members", f"more than one .{' and .'.join(sample.repeated)} stand under this key")
    # Where there is a picture, the `status` of a .json is any other program's.
    if not sample.members.keys() & set(IMAGE_EXTENSIONS):
        check_status(sample.members.get("json"))
    try:
        picture = image_extension(sample.key, sample.members)
    except ShardError as error:
        raise Unusable("no picture", str(error)) from None
    others = {name: data for name, data in sample.members.items() if name not in (picture, CAPTION_EXTENSION)}
    return Found(sample.members[picture], sample.members.get(CAPTION_EXTENSION), others)


def check_status(data: bytes | None) -> None:
    """Raises Unusable where a sample's .json says that its picture was not downloaded."""
    try:
        fields = json.loads(data or b"null")
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict) and fields.get("status", "success") != "success":
        raise Unusable(FAILED, str(fields.get("error_message") or fields["status"]))


def table_says(url: str, name: str, keys: set[str]) -> Iterator[Candidate]:
    """A candidate for every row of img2dataset's table that is not among the keys that were found.

    Each says why its download failed, or that its picture is missing although the table says success. A table that
    cannot be read, as an interrupted img2dataset leaves it, says only that.
    """
    if not exists(url):
        return
    try:
        yield from table_rows(url, name, keys)
    except StageError as error:
        yield Candidate("", name, Unusable("bad row", f"{error}; failed downloads are not listed"))


def table_rows(url: str, name: str, keys: set[str]) -> Iterator[Candidate]:
    """As `table_says`, of a table that is there. Raises StageError."""
    for number, row in rows(url, quotes=True):
        if isinstance(row, Unusable) or "status" not in row or str(row.get("key")) in keys:
            continue
        key, origin = str(row.get("key")), f"{name} (table row {number})"
        if row["status"] == "success":
            yield Candidate(
                key, origin, Unusable("no picture", "the table says it was downloaded, and it is not there")
            )
        else:
            yield Candidate(key, origin, Unusable(FAILED, str(row.get("error_message") or row["status"])))
