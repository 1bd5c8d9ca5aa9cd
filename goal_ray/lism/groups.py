"""What travels through the pipeline: samples on their way, a few consecutive ones of a shard as a group."""

import pickle
import zlib
from dataclasses import dataclass, field

import numpy as np

from goal_ray.errors import GoalRayError
from goal_ray.lism.work import Work
from goal_ray.regions import Regions


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used: the stage that found out, and the reason for people."""

    stage: str
    reason: str


@dataclass(frozen=True, slots=True)
class Item:
    """A sample on its way; one with a problem passes every later stage untouched.

    number       counts the samples of the shard from 0
    key          its key, storable as text
    size_bytes   of its members in the tar
    sentences    character offsets into the caption
    size         (W, H) of the stored picture
    picture_HW3  the working picture, RGB uint8, from decoding to matching
    regions      on the working picture, from proposing to matching
    packed       pairs.json, in the end: compressed, for the driver holds those of all shards that are being read
    """

    number: int
    key: str
    size_bytes: int = 0
    problem: Problem | None = None
    caption: str = ""
    sentences: tuple[tuple[int, int], ...] = ()
    size: tuple[int, int] = (0, 0)
    picture_HW3: np.ndarray | None = None
    regions: Regions | None = None
    packed: bytes = b""

    @property
    def record(self) -> bytes:
        """pairs.json."""
        return zlib.decompress(self.packed)

    def done(self, record: bytes) -> "Item":
        """The item with its pairs.json, and nothing that was needed for it."""
        return Item(self.number, self.key, self.size_bytes, packed=zlib.compress(record, level=1))

    def failed(self, stage: str, error: Exception) -> "Item":
        """The item as the quarantine will record it."""
        return Item(self.number, self.key, self.size_bytes, Problem(stage, describe(error)))


def describe(error: Exception) -> str:
    """An error for people: its message, with its type unless that is one of ours."""
    return str(error) if isinstance(error, GoalRayError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Group:
    """Consecutive samples of shard number `shard`.

    count    of all its samples, in its last group
    failure  what makes the whole run impossible (storage fails, a model does not load). It travels here, since Ray Data
             would bury it in tracebacks, and start the actor again.
    work     what the stages took for it so far; no part of what the group is
    """

    shard: int
    items: list[Item]
    count: int | None = None
    failure: str = ""
    work: tuple[Work, ...] = field(default=(), compare=False)

    def to_row(self) -> dict[str, bytes]:
        """The group as a row of a dataset."""
        return {"group": pickle.dumps(self, protocol=5)}

    @staticmethod
    def from_row(row: dict[str, bytes]) -> "Group":
        """The group in a row."""
        return pickle.loads(row["group"])


def storable_key(key: str) -> str:
    """A key with the bytes that are not UTF-8 (tarfile's surrogates) as escapes, so that it can be stored as text."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
