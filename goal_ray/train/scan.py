"""Which samples of the shards can be trained on, and where they lie, from the tars' indexes or headers alone.

No torch here: it runs in many tasks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from tarfile import BLOCKSIZE
from typing import Any, NamedTuple

import numpy as np

from goal_ray.bad_samples import bad_record
from goal_ray.errors import ShardError
from goal_ray.storage import read_range
from goal_ray.tar_index import index_url, read_index
from goal_ray.tar_places import SampleIndex, check_header, group_places, member_places
from goal_ray.tars import (
    CAPTION_EXTENSION,
    IMAGE_EXTENSIONS,
    LARGEST_MEMBER_BYTES,
    PAIRS_EXTENSION,
    Sample,
    image_extension,
)

EXTENSIONS = (*IMAGE_EXTENSIONS, CAPTION_EXTENSION, PAIRS_EXTENSION)
MEMBERS = 3


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of a tar, S of them, and where their members lie.

    keys_S       keys, UTF-8
    members_SM   which of EXTENSIONS, uint8 (S, 3): picture, caption, pairs
    places_SM2   (offset, size) of these members in the tar, bytes, int64 (S, 3, 2); size -1 where there are no pairs
    bad          the records of the samples that are not usable

    About 70 bytes a sample: 0.7 MB for a tar of 10,000, 7 GB for 10,000 of those, which therefore stay in Ray's object
    stores, where the tars were scanned. A reader asks for those of the shards that are mixed at the time, and sees them
    in shared memory.
    """

    keys_S: np.ndarray
    members_SM: np.ndarray
    places_SM2: np.ndarray
    bad: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.keys_S)

    def key(self, number: int) -> str:
        """The key of a usable sample."""
        return self.keys_S[number].decode(errors="surrogateescape")


def scan_shard(url: str, needs_pairs: bool) -> ShardIndex:
    """Finds the usable samples of a tar by its index, or its headers. Raises ShardError on a corrupt tar."""
    keys, members, places = [], [], []
    bad = []
    indexed = read_index(url)
    for sample in group_places(member_places(url) if indexed is None else indexed):
        try:
            present = needed_members(sample, needs_pairs)
        except ShardError as error:
            bad.append(bad_record(url, sample.key, "scan", str(error)))
            continue
        keys.append(sample.key.encode(errors="surrogateescape"))
        members.append([EXTENSIONS.index(extension) for extension in present])
        places.append([sample.members.get(extension, (0, -1)) for extension in present])
    return ShardIndex(
        np.array(keys, np.bytes_),
        np.array(members, np.uint8).reshape(-1, MEMBERS),
        np.array(places, np.int64).reshape(-1, MEMBERS, 2),
        bad,
    )


def needed_members(sample: SampleIndex, needs_pairs: bool) -> tuple[str, str, str]:
    """The extensions of a usable sample's picture, caption and pairs. Raises ShardError for one that is not usable."""
    picture = image_extension(sample.key, sample.members, sample.repeated)
    for extension in (CAPTION_EXTENSION, *([PAIRS_EXTENSION] if needs_pairs else [])):
        if extension not in sample.members or extension in sample.repeated:
            remedy = "; run `goal-ray lism` on these shards" if extension == PAIRS_EXTENSION else ""
            raise ShardError(f"sample {sample.key!r} needs exactly one .{extension} member{remedy}")
    for extension in (picture, CAPTION_EXTENSION, PAIRS_EXTENSION):
        if sample.members.get(extension, (0, 0))[1] > LARGEST_MEMBER_BYTES:
            raise ShardError(f"sample {sample.key!r}: member .{extension} has more than {LARGEST_MEMBER_BYTES} bytes")
    places = [sample.members[each] for each in (picture, CAPTION_EXTENSION, PAIRS_EXTENSION) if each in sample.members]
    apart = max(offset + size for offset, size in places) - min(offset for offset, _ in places)
    if apart > LARGEST_MEMBER_BYTES:
        raise ShardError(
            f"sample {sample.key!r}: its picture, caption and pairs stand {apart} bytes apart, more than "
            f"{LARGEST_MEMBER_BYTES}; put them side by side, before larger members"
        )
    return picture, CAPTION_EXTENSION, PAIRS_EXTENSION


# More shards than are mixed at a time, or every batch would scan them anew.
own_scan = lru_cache(maxsize=128)(scan_shard)


class Scan(NamedTuple):
    """What the scan of all shards found.

    counts   usable samples per tar
    bad      the records of all others
    indexes  for each tar, Ray's reference to its ShardIndex
    """

    counts: list[int]
    bad: list[dict[str, str]]
    indexes: tuple[Any, ...]


def scan_shards(urls: Sequence[str], needs_pairs: bool) -> Scan:
    """Scans the tars in parallel, on Ray. Raises ShardError on a corrupt tar."""
    import ray

    @ray.remote(num_returns=2, max_retries=-1)  # an index goes with its node, as often as nodes go
    def scan(url: str) -> tuple[tuple[int, list[dict[str, str]]], ShardIndex]:
        index = scan_shard(url, needs_pairs)
        return (len(index), index.bad), index

    found: list[Any] = [scan.remote(url) for url in urls]
    try:
        results = ray.get([summary for summary, _ in found])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return Scan(
        [count for count, _ in results],
        [record for _, records in results for record in records],
        tuple(index for _, index in found),
    )


def read_sample(url: str, index: ShardIndex, number: int) -> Sample:
    """Reads the members that training uses, by one request: they stand side by side in the tar.

    What stands between them is read too, and dropped. Raises ShardError where another member stands at a place, and
    OSError where the tar ends before it.
    """
    key = index.key(number)
    places_M2 = index.places_SM2[number]
    present = places_M2[:, 1] >= 0
    start = int(places_M2[present, 0].min()) - BLOCKSIZE
    data = memoryview(read_range(url, start, int(places_M2[present].sum(axis=1).max()) - start))
    members = {}
    for extension, (offset, size) in zip(index.members_SM[number].tolist(), places_M2.tolist(), strict=True):
        if size < 0:
            continue
        place = offset - start
        try:
            check_header(bytes(data[place - BLOCKSIZE : place]), key, EXTENSIONS[extension], size)
        except ShardError as error:
            raise ShardError(
                f"{url}: sample {key!r}: {error}; was the tar changed? Delete {index_url(url)} if there is one, then "
                "start again"
            ) from None
        members[EXTENSIONS[extension]] = bytes(data[place : place + size])
    return Sample(key, members)
