"""The samples of shards in other shards, equally many in each, their members and headers unchanged byte for byte.

Nothing is unpacked: a sample is a run of bytes of its tar. Where each one lies is read from the headers first and held
in memory: with keys compared, or a shuffle, at most some 50 bytes per sample. In order, tars are then read from front
to back; shuffled, each sample is one read at a random place: cheap on a local SSD, a request each on an object store.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from goal_ray.ahead import read_ahead
from goal_ray.claim import claim_folder
from goal_ray.errors import ConfigError, ShardError, StageError
from goal_ray.progress import Progress
from goal_ray.shard_urls import expand_shards, shard_name
from goal_ray.shards.keys import readable_keys, repeated_keys
from goal_ray.shards.output import refuse_overlap, shards_called, tar_name
from goal_ray.shards.spans import sample_spans, write_spans
from goal_ray.shards.workers import map_shards
from goal_ray.storage import exists, identity, join, read_range

SETTINGS_FILE = "reshard.json"
_RUN_BYTES = 4_000_000
_AHEAD = 16


@dataclass(frozen=True)
class Balance:
    """How many shards come out, or how many samples go into one at most; what is made equal; the shuffle's seed."""

    shards: int | None = None
    samples_per_shard: int | None = None
    equal: Literal["samples", "bytes"] = "samples"
    shuffle: int | None = None

    def __post_init__(self) -> None:
        given = [number for number in (self.shards, self.samples_per_shard) if number is not None]
        if len(given) != 1 or given[0] < 1:
            raise ConfigError("say either --shards N or --samples-per-shard N, with N at least 1")
        if self.shuffle is not None and self.shuffle < 0:
            raise ConfigError("--shuffle takes a seed of 0 or more")


@dataclass(frozen=True)
class Plan:
    """Which sample goes where.

    urls     the input tars
    starts   (tars + 1,) number of each tar's first sample among all
    offsets  (samples,) bytes: where each sample lies in its tar
    sizes    (samples,) bytes
    order    (samples,) numbers of samples as they come out; None as they came in
    bounds   (output shards + 1,) places in that order
    """

    urls: list[str]
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    order: np.ndarray | None
    bounds: np.ndarray

    def runs(self, number: int) -> Iterator[tuple[str, int, int]]:
        """(tar, offset, size in bytes) of what makes an output shard; samples that lie side by side come together."""
        rows: np.ndarray = np.arange(self.bounds[number], self.bounds[number + 1])
        if self.order is not None:
            rows = self.order[rows]
        tars = np.searchsorted(self.starts, rows, side="right") - 1
        run: tuple[int, int, int] | None = None
        for tar, offset, size in zip(
            tars.tolist(), self.offsets[rows].tolist(), self.sizes[rows].tolist(), strict=True
        ):
            if run is not None and run[0] == tar and sum(run[1:]) == offset and run[2] + size <= _RUN_BYTES:
                run = (tar, run[1], run[2] + size)
                continue
            if run is not None:
                yield self.urls[run[0]], run[1], run[2]
            run = (tar, offset, size)
        if run is not None:
            yield self.urls[run[0]], run[1], run[2]


def reshard(spec: str, out: str, name: str | None, balance: Balance, workers: int | None) -> np.ndarray:
    """Writes the output shards that `out` lacks. Returns the number of samples in each.

    name     shards are called NAME-000000.tar, …; None for the last part of `out`
    workers  processes that read headers; None for one per CPU

    Raises ShardError for a damaged tar or a key that stands twice, StageError for a folder begun with something else.
    """
    urls = expand_shards(spec)
    refuse_overlap(out, urls)
    name = shards_called(name, out)
    identities = [(shard_name(url), *identity(url)) for url in urls]
    plan = make_plan(urls, balance, workers)
    shards = len(plan.bounds) - 1
    made_of = {
        "inputs": [[tar, size] for tar, size, _ in identities],
        # Tars are padded: two of other contents are often equally long.
        "times or checksums of inputs, which a copy changes too": [version for _, _, version in identities],
        "shards": shards,
        "equal": balance.equal,
        "shuffle": balance.shuffle,
        "name": name,
    }
    claim_folder(out, SETTINGS_FILE, made_of)
    counts = np.diff(plan.bounds)
    with Progress("reshard", "sample", int(counts.sum())) as progress:
        for number in range(shards):
            url = join(out, tar_name(name, number))
            if not exists(url):
                write_spans(url, read_ahead(read_run, plan.runs(number), _AHEAD))
            progress.add(int(counts[number]))
    return counts


def read_run(run: tuple[str, int, int]) -> bytes:
    """The bytes of a run."""
    return read_range(*run)


def make_plan(urls: list[str], balance: Balance, workers: int | None) -> Plan:
    """Reads the headers of all tars, and spreads their samples over the output shards."""
    spans = {}
    try:
        for url, found in map_shards(sample_spans, urls, workers, "headers"):
            spans[url] = found
        for key, first, again in repeated_keys({url: one.hashes for url, one in spans.items()}, readable_keys):
            raise ShardError(f"the key {key!r} stands in {first} and in {again}; rename one", key)
    except ShardError as error:
        raise ShardError(f"{error}; `goal-ray shards validate` lists all that is wrong", error.key) from None
    lost = [url for url, one in spans.items() if one.strays and len(one.edges) == 1]
    if lost:
        raise ShardError(f"{lost[0]}: holds members but no sample, so they would be lost; leave this tar out")
    edges = [one.edges for one in spans.values()]
    offsets = np.concatenate([one[:-1] for one in edges])
    sizes = np.concatenate([np.diff(one) for one in edges])
    starts = np.cumsum([0, *(len(one) - 1 for one in edges)])
    order = None if balance.shuffle is None else np.random.default_rng(balance.shuffle).permutation(len(sizes))
    bounds = spread(sizes if order is None else sizes[order], balance)
    return Plan(urls, starts, offsets, sizes, order, bounds)


def spread(sizes: np.ndarray, balance: Balance) -> np.ndarray:
    """Where to cut samples of so many bytes, (samples,), into output shards: (shards + 1,) places.

    Numbers of samples differ by at most one; or the cuts are the closest ones to equal bytes, with at least one sample
    between two. Raises StageError for more shards than samples.
    """
    samples = len(sizes)
    shards = balance.shards or -(-samples // (balance.samples_per_shard or 1))
    if not 1 <= shards <= samples:
        raise StageError(f"{samples} samples cannot be spread over {shards} shards")
    if balance.equal == "samples":
        return np.arange(shards + 1) * samples // shards
    behind = np.concatenate([[0], np.cumsum(sizes)])
    ideal = behind[-1] * np.arange(shards + 1) / shards
    closest = np.searchsorted((behind[1:] + behind[:-1]) / 2, ideal)
    rising = np.maximum.accumulate(closest - np.arange(shards + 1)) + np.arange(shards + 1)
    return np.clip(rising, np.arange(shards + 1), samples - np.arange(shards, -1, -1))
