"""Where samples lie inside a tar, found by its headers alone, and read from there."""

import errno
import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import NamedTuple

from goal_ray.errors import ShardError
from goal_ray.storage import open_read, size_bytes
from goal_ray.tars import (
    DAMAGE,
    Gathering,
    Sample,
    describe_damage,
    iter_members,
    open_tar,
    read_member,
    sparse_problem,
    split_name,
)


def read_part(url: str, offset_bytes: int, size_bytes: int) -> Sample:
    """The one sample whose members fill a part of a tar. Raises ShardError where the part holds anything else."""
    with open_read(url) as file:
        file.seek(offset_bytes)
        part = io.BytesIO(file.read(size_bytes) + bytes(2 * tarfile.BLOCKSIZE))
    found: dict[int, Gathering] = {}
    try:
        with open_tar(part, "r:") as tar:
            for member in iter_members(tar):
                if member.sample >= 0:
                    sample = found.setdefault(member.sample, Gathering(member.key))
                    sample.add(member.extension, member.info.size, partial(read_member, tar, member.info))
    except DAMAGE as error:
        raise ShardError(f"{url}: no sample at byte {offset_bytes}: {error}; was the tar changed?") from None
    if len(found) != 1:
        raise ShardError(f"{url}: {len(found)} samples at byte {offset_bytes}, not 1; was the tar changed?")
    return found[0].sample()


@dataclass(frozen=True)
class SampleIndex:
    """Where a sample's members lie inside its tar: extension -> (offset_bytes, size_bytes)."""

    key: str
    members: dict[str, tuple[int, int]]
    repeated: tuple[str, ...] = ()


@contextmanager
def reading_headers(url: str) -> Iterator[tarfile.TarFile]:
    """Opens a tar for `iter_members` to seek from header to header, reading no member.

    Damage that is met inside the block becomes a ShardError.
    """
    with open_read(url) as file:
        try:
            with open_tar(file, "r:") as tar:
                yield tar
        except (*DAMAGE, OSError, OverflowError) as error:
            # Only a senseless place to seek to says something against the tar; else the storage fails.
            if isinstance(error, OSError) and error.errno != errno.EINVAL:
                raise
            raise ShardError(f"{url}: {describe_damage(error)}") from None


class MemberPlace(NamedTuple):
    """Where a member of a sample lies inside its tar; `sample` counts from 0."""

    sample: int
    key: str
    extension: str
    offset_bytes: int
    size_bytes: int


def member_places(url: str) -> list[MemberPlace]:
    """The members of all samples of a tar, in order, found by reading only the headers.

    Raises ShardError on a corrupt or truncated tar, and for a sparse member.
    """
    places: list[MemberPlace] = []
    size = size_bytes(url)
    with reading_headers(url) as tar:
        for member in iter_members(tar):
            info = member.info
            if member.sample < 0:
                continue
            if info.issparse():
                raise ShardError(f"{url}: {sparse_problem(info)}", member.key)
            if info.offset_data + info.size > size:
                raise tarfile.ReadError(f"member {info.name!r} reaches beyond the end of the file")
            places.append(MemberPlace(member.sample, member.key, member.extension, info.offset_data, info.size))
    return places


def group_places(places: Iterable[MemberPlace]) -> list[SampleIndex]:
    """The samples that members in order make up."""
    samples: list[SampleIndex] = []
    for (_, key), own in groupby(places, lambda place: (place.sample, place.key)):
        members: dict[str, tuple[int, int]] = {}
        repeated = []
        for _, _, extension, offset, size in own:
            if extension in members:
                repeated.append(extension)
            members[extension] = (offset, size)
        samples.append(SampleIndex(key, members, tuple(repeated)))
    return samples


def index_shard(url: str) -> list[SampleIndex]:
    """Finds every sample of a tar by its headers, to read them in any order. Raises as `member_places`."""
    return group_places(member_places(url))


def check_header(header: bytes, key: str, extension: str, size_bytes: int) -> None:
    """Raises ShardError unless 512 bytes are the header of this member, as far as such a header tells."""
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(f"no header of .{extension} where the index says: {error}") from None
    # A long name, or one that is not ASCII, may stand elsewhere.
    readable = len(info.name) < 100 and info.name.isascii() and "?" not in info.name
    if info.size != size_bytes or (readable and split_name(info.name) != (key, extension)):
        raise ShardError(f"{info.name!r} of {info.size} bytes stands where the index says .{extension} of {size_bytes}")
