"""The few pairs of a run that its gallery shows: the best, the worst, and random ones.

Each shard keeps its own, and those of a run are found among its shards': exactly, in any order, in little memory.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from heapq import nsmallest
from typing import Any

SHOWN = 12


@dataclass(frozen=True, slots=True)
class Pick:
    """One pair.

    shard         file name of the tar
    sample        number of the sample in the input tar
    key           its key, as it can be stored
    sentence      and region: indices into the sample's record
    offset_bytes  and size_bytes: the part of the paired tar that holds the sample's members
    """

    shard: str
    sample: int
    key: str
    sentence: int
    region: int
    similarity: float
    offset_bytes: int = 0
    size_bytes: int = 0

    @property
    def place(self) -> tuple[str, int, int, int]:
        """What tells it from all others."""
        return self.shard, self.sample, self.sentence, self.region


def best_first(pick: Pick) -> tuple[Any, ...]:
    """Orders by similarity, the highest first."""
    return -pick.similarity, pick.place


def worst_first(pick: Pick) -> tuple[Any, ...]:
    """Orders by similarity, the lowest first."""
    return pick.similarity, pick.place


def shuffled(pick: Pick) -> tuple[Any, ...]:
    """Orders at random, and in every run alike: by a hash of the pair's place."""
    return hashlib.blake2b(repr(pick.place).encode("utf-8", "backslashreplace"), digest_size=8).digest(), pick.place


ORDERS: dict[str, Callable[[Pick], tuple[Any, ...]]] = {"random": shuffled, "best": best_first, "worst": worst_first}


@dataclass(frozen=True)
class Picks:
    """The first SHOWN pairs of a shard or run in each of ORDERS."""

    random: list[Pick] = field(default_factory=list)
    best: list[Pick] = field(default_factory=list)
    worst: list[Pick] = field(default_factory=list)

    @staticmethod
    def among(pairs: Iterable[Pick]) -> "Picks":
        """Those of a shard."""
        pairs = list(pairs)
        return Picks(**{name: nsmallest(SHOWN, pairs, key=order) for name, order in ORDERS.items()})

    def merged(self, other: "Picks") -> "Picks":
        """Those of two sets of shards."""
        return Picks(
            **{
                name: nsmallest(SHOWN, [*getattr(self, name), *getattr(other, name)], key=order)
                for name, order in ORDERS.items()
            }
        )

    def placed(self, parts: Mapping[int, tuple[int, int]]) -> "Picks":
        """The same, with the parts of the paired tar that hold them: sample -> (offset_bytes, size_bytes)."""

        def place(pick: Pick) -> Pick:
            offset_bytes, size_bytes = parts[pick.sample]
            return replace(pick, offset_bytes=offset_bytes, size_bytes=size_bytes)

        return Picks(**{name: [place(pick) for pick in getattr(self, name)] for name in ORDERS})
