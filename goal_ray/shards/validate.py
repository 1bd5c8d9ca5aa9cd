"""Everything in shards that breaks the contract of `goal_ray.tars` and `goal_ray.pairs`."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from goal_ray.cli import printable
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.images import EXTENSIONS, decode_image, format_name
from goal_ray.pairs import examine
from goal_ray.shard_urls import expand_shards
from goal_ray.shards.keys import readable_keys, repeated_keys, short_hashes
from goal_ray.shards.workers import map_shards
from goal_ray.tar_places import reading_headers
from goal_ray.tars import (
    CAPTION_EXTENSION,
    CORRUPT,
    IMAGE_EXTENSIONS,
    PAIRS_EXTENSION,
    TWO_PLACES,
    Gathering,
    Member,
    Sample,
    image_extension,
    iter_members,
    read_member,
    sparse_problem,
)

_READ = (*IMAGE_EXTENSIONS, CAPTION_EXTENSION, PAIRS_EXTENSION)
_CHUNK_BYTES = 1_000_000


@dataclass(frozen=True)
class Violation:
    """One thing that breaks the contract; `key` is empty where it concerns no single sample."""

    shard: str
    key: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(printable(part) for part in (self.shard, self.key, self.problem) if part)


@dataclass
class Checked:
    """What was found in one shard, or, with `shards` 0, between shards; `hashes` are those of its keys."""

    shards: int = 1
    samples: int = 0
    violations: list[Violation] = field(default_factory=list)
    hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))


def validate_shards(spec: str, headers_only: bool, max_pixels: int, workers: int | None) -> Iterator[Checked]:
    """What was found in each shard, in order; at the end, the keys that stand in more than one.

    headers_only  reads no member: fast, and sees nothing that is inside one

    Memory: a shard's keys per worker, 8 bytes per sample of all shards and twice that to compare them, and the keys
    that stand in several shards. Raises ShardError where there are no shards, OSError where a storage fails.
    """
    shards = expand_shards(spec)
    hashes = {}
    check = partial(check_shard, headers_only=headers_only, max_pixels=max_pixels)
    for shard, checked in map_shards(check, shards, workers, "validate"):
        hashes[shard] = checked.hashes
        yield checked
    for key, first, again in repeated_keys(hashes, readable_keys):
        yield Checked(0, 0, [Violation(again, key, f"the key stands in {first} too; rename one of the two samples")])


def check_shard(shard: str, headers_only: bool, max_pixels: int) -> Checked:
    """Checks one tar, one sample in memory at a time."""
    checked, keys = Checked(), set()

    def tell(key: str, problem: str) -> None:
        checked.violations.append(Violation(shard, key, problem))

    try:
        with reading_headers(shard) as tar:
            for found in samples_and_strays(tar, headers_only):
                if isinstance(found, Member):
                    tell("", stray_problem(found))
                    continue
                checked.samples += 1
                sample, odd_members = found
                for problem in odd_members:
                    tell(sample.key, problem)
                if sample.key in keys:
                    tell(sample.key, TWO_PLACES)
                keys.add(sample.key)
                for problem in sample_problems(sample, None if headers_only else max_pixels):
                    tell(sample.key, problem)
            if behind_end(tar):
                tell(
                    "",
                    "data behind the end mark, which no reader sees; is it two tars, one behind the other? part them",
                )
    except ShardError as error:
        problem = str(error).removeprefix(f"{shard}: ")
        remedy = "; make or copy it again" if problem.startswith(CORRUPT) else ""
        tell("", f"{problem}; {checked.samples} samples stand complete before that place{remedy}")
    else:
        if not checked.samples:
            tell("", "holds no sample; leave this tar out")
    checked.hashes = short_hashes(keys)
    return checked


def samples_and_strays(tar: tarfile.TarFile, headers_only: bool) -> Iterator[tuple[Sample, list[str]] | Member]:
    """The samples of a tar from `reading_headers`, and the members of no sample that are more than folders.

    With each sample comes what is wrong with its members' headers.

    Of a sample's members only those that the contract speaks of are read; with `headers_only` none. What is not read
    is one byte long here, or empty where it is empty.
    """
    current: Gathering | None = None
    number, odd = -1, list[str]()
    for member in iter_members(tar):
        if member.sample < 0:
            if not member.info.isdir():
                yield member
            continue
        if member.sample != number:
            if current is not None:
                yield current.sample(), odd
            current, number, odd = Gathering(member.key), member.sample, []
        assert current is not None
        if not headers_only and member.extension in _READ:
            read = partial(read_member, tar, member.info)
        else:
            read = partial(bytes, min(1, member.info.size))
        current.add(member.extension, member.info.size, read)
        written = member.info.name.rpartition("/")[2].partition(".")[2]
        if written != member.extension:
            odd.append(f"the extension .{written} is not in lower case; `goal-ray shards make` mends it")
        if member.info.issparse():
            odd.append(sparse_problem(member.info))
    if current is not None:
        yield current.sample(), odd


def stray_problem(member: Member) -> str:
    """What is wrong with a member of no sample."""
    name = member.info.name
    if not member.info.isreg():
        return f"the member {name!r} is no file but a link or a device; store the file itself"
    return f"the member {name!r} belongs to no sample, for its name is not KEY.EXTENSION; leave it out"


def behind_end(tar: tarfile.TarFile) -> bool:
    """Whether anything but zeros stands behind the end mark."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    return any(chunk.strip(b"\0") for chunk in iter(lambda: tar.fileobj.read(_CHUNK_BYTES), b""))


def sample_problems(sample: Sample, max_pixels: int | None) -> Iterator[str]:
    """What is wrong with a sample; None for `max_pixels` looks at no member's content."""
    try:
        sample.check_sizes()
    except ShardError as error:
        yield str(error)
        return
    for extension in sorted(set(sample.repeated) - {*IMAGE_EXTENSIONS, CAPTION_EXTENSION}):
        yield f"more than one .{extension}; keep one"
    name = picture = caption = None
    try:
        name = image_extension(sample.key, sample.members, sample.repeated)
        picture = None if max_pixels is None else decode_image(sample.members[name], max_pixels)
    except (ShardError, ImageError) as error:
        yield str(error)
    try:
        caption = sample.caption()
    except CaptionError as error:
        yield str(error)
    if max_pixels is None:
        return
    held = None if name is None else format_name(sample.members[name])
    if name is not None and held is not None and EXTENSIONS[held] != name.replace("jpeg", "jpg"):
        yield f"the .{name} holds a picture in {held}; `goal-ray shards make` names it for what it holds"
    if PAIRS_EXTENSION in sample.members:
        record, problems = examine(sample.members[PAIRS_EXTENSION], caption)
        yield from problems
        if record is not None and picture is not None and record.size != picture.size:
            yield f"pairs: size = {record.size} and the picture's is {picture.size}; run `goal-ray lism` on it again"
