"""Keys of many millions of samples, as hashes: which were seen before, and which stand in more than one shard."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress

import numpy as np

from goal_ray.errors import ShardError
from goal_ray.tar_places import reading_headers
from goal_ray.tars import iter_members

HASH_BYTES = 16
_RECENT = 1_000_000


def key_hash(key: str) -> bytes:
    """128 bits of a key: two keys of 100 million share them with a probability of 1e-23."""
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


def short_hashes(keys: Iterable[str]) -> np.ndarray:
    """The distinct 64-bit hashes of keys, sorted: (n,) uint64."""
    packed = b"".join(key_hash(key)[:8] for key in keys)
    return np.unique(np.frombuffer(packed, np.uint64))


class KeySet:
    """The keys that were seen, in 16 bytes each, and some 100 MB for the most recent ones."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, f"S{HASH_BYTES}")
        self._recent: set[bytes] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, key: str) -> bool:
        wanted = key_hash(key)
        if wanted in self._recent:
            return True
        place = int(np.searchsorted(self._sorted, np.bytes_(wanted)))
        # numpy drops zero bytes at the end, which keeps hashes of one length apart.
        return place < len(self._sorted) and bytes(self._sorted[place]) == wanted.rstrip(b"\0")

    def add(self, hashes: Iterable[bytes]) -> None:
        """Adds keys that are not in it, by their hashes."""
        self._recent.update(hashes)
        if len(self._recent) >= _RECENT:
            recent = np.frombuffer(b"".join(self._recent), self._sorted.dtype)
            # A stable sort merges the two sorted runs that these nearly are.
            self._sorted = np.sort(np.concatenate([self._sorted, np.sort(recent)]), kind="stable")
            self._recent = set()


def repeated_keys(
    hashes: Mapping[str, np.ndarray], keys_of: Callable[[str], Iterable[str]]
) -> Iterator[tuple[str, str, str]]:
    """(key, first shard, later shard) for every key that stands in several shards.

    hashes   shard -> `short_hashes` of its keys; 8 bytes per sample, and twice that while they are compared
    keys_of  reads the keys of a shard again, only where one of its hashes repeats; so equal hashes of different keys
             are told apart
    """
    together = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
    repeated = np.unique(together[1:][together[1:] == together[:-1]])
    del together
    first: dict[str, str] = {}
    for shard, own in hashes.items():
        if not np.isin(own, repeated).any():
            continue
        keys = sorted(set(keys_of(shard)))
        again = np.isin([int.from_bytes(key_hash(key)[:8], "little") for key in keys], repeated)
        for key in np.asarray(keys, object)[again]:
            other = first.setdefault(key, shard)
            if other != shard:
                yield key, other, shard


def readable_keys(url: str) -> list[str]:
    """The keys of a tar's samples, by its headers, up to its damage."""
    keys: list[str] = []
    with suppress(ShardError), reading_headers(url) as tar:
        for member in iter_members(tar):
            if member.sample == len(keys):
                keys.append(member.key)
    return keys
