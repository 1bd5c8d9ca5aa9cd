"""Where samples lie in a tar as runs of its bytes, headers included: what can be copied without looking into it."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from goal_ray.atomic import open_atomic
from goal_ray.errors import ShardError
from goal_ray.shards.keys import short_hashes
from goal_ray.tar_places import reading_headers
from goal_ray.tars import end_mark, iter_members


@dataclass(frozen=True)
class Spans:
    """The samples of a tar in order.

    edges    (samples + 1,) int64, bytes: sample i is edges[i] to edges[i + 1]. A member of no sample belongs to the
             sample before it, and at the front to the first, so that no member is lost.
    hashes   (samples,) of the keys, `short_hashes`
    strays   members of no sample
    """

    edges: np.ndarray
    hashes: np.ndarray
    strays: int


def sample_spans(url: str) -> Spans:
    """Finds the samples of a tar by its headers.

    Raises ShardError on a corrupt or truncated tar, on a key at two places, and on headers that hold for all members
    behind them.
    """
    keys: list[str] = []
    edges, strays = [0], 0
    with reading_headers(url) as tar:
        for member in iter_members(tar):
            if tar.pax_headers:
                raise ShardError(
                    f"{url}: its members share a global header ({', '.join(tar.pax_headers)}), so they cannot be moved "
                    "one by one; pack it again, for example with `tar --format=gnu`"
                )
            if member.sample < 0:
                strays += 1
            elif member.sample == len(keys):
                keys.append(member.key)
                if member.sample:
                    edges.append(member.info.offset)
        edges.append(tar.offset)
    if not keys:
        edges = [0]
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ShardError(
                f"{url}: the key {key!r} stands at two places; rename one",
                key,
            )
        seen.add(key)
    return Spans(np.asarray(edges, np.int64), short_hashes(keys), strays)


def write_spans(url: str, spans: Iterable[bytes]) -> None:
    """Writes runs of bytes of tars as one tar, atomically."""
    size = 0
    with open_atomic(url) as file:
        for data in spans:
            file.write(data)
            size += len(data)
        file.write(end_mark(size))
