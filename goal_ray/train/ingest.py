"""Ray Data ingest: every worker's micro-batches, read and decoded by CPU tasks anywhere in the cluster.

What a worker sees is a function of seed and step alone (goal_ray.order), never of which task finished first: that makes
runs comparable and resumable. So each worker streams its own plan instead of sharing one split stream.
"""

import json
import pickle
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from goal_ray.batches import ExampleBuilder, collate, pack
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.order import BatchOrder
from goal_ray.ray_session import quiet_ray_data
from goal_ray.tars import Sample
from goal_ray.train.scan import ShardIndex, bad_record, own_scan, read_sample

PREFETCH_BATCHES = 4
STREAM_BATCHES = 2000
READ_AHEAD = 8


@dataclass(frozen=True)
class BatchReader:
    """Reads one rank's micro-batches by their numbers; runs in Ray Data tasks.

    builder        a pickled ExampleBuilder: its tokenizer takes longer to unpickle than a batch to read, so that every
                   process does it once
    indexes        Ray's references to the tars' indexes, as `index_shards` gives them; without, each process scans the
                   tars that it meets
    text_multiple  as in `collate`

    Samples that turn out unreadable are left out of their batch and reported beside it.
    """

    urls: tuple[str, ...]
    order: BatchOrder
    rank: int
    ranks: int
    accumulate: int
    builder: bytes
    indexes: tuple[Any, ...] | None = None
    text_multiple: int = 1

    def __call__(self, row: dict, first: int = 0) -> dict:
        """The micro-batch `first` + row["id"], packed, and JSON records of the samples left out of it."""
        builder = unpickled(self.builder)
        epoch, rows = self.order.micro_batch(first + int(row["id"]), self.rank, self.ranks, self.accumulate)
        places = [(self.urls[shard], self._index(shard, builder.pairs > 0), number) for shard, number in rows.tolist()]
        examples, bad = [], []
        for (url, index, number), sample in zip(places, read_ahead(places), strict=True):
            try:
                examples.append(builder(sample, url, self.order.seed + epoch))
            except (ImageError, CaptionError, ShardError) as error:
                bad.append(bad_record(url, index.key(number), "decode", error))
        packed = pack(collate(examples, self.text_multiple, builder.context_length)) if examples else b""
        return {"batch": packed, "bad": json.dumps(bad)}

    def _index(self, shard: int, needs_pairs: bool) -> ShardIndex:
        return own_scan(self.urls[shard], needs_pairs) if self.indexes is None else fetched(self.indexes[shard])


@lru_cache(maxsize=2)
def unpickled(builder: bytes) -> ExampleBuilder:
    """The builder of these bytes, the same object for the same bytes."""
    return pickle.loads(builder)


@lru_cache(maxsize=64)
def fetched(reference: Any) -> Any:
    """What a Ray reference stands for, got once in this process."""
    import ray

    return ray.get(reference)


def read_ahead(places: list[tuple[str, ShardIndex, int]]) -> Iterator[Sample]:
    """The samples in order; some are read ahead in threads, while those before are decoded."""
    waiting: deque[Future[Sample]] = deque()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for place in places:
            waiting.append(pool.submit(read_sample, *place))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_planned(row: dict, first: int, plan: Any) -> dict:
    """A micro-batch of the BatchReader that a Ray reference stands for."""
    return fetched(plan)(row, first)


def stream_batches(reader: BatchReader, first: int, last: int) -> Iterator[tuple[bytes, list[dict[str, str]]]]:
    """Packed micro-batches `first` to `last` - 1 in order, each with the records of the samples left out of it.

    A Ray Data execution takes seconds to start, so one spans many epochs, up to what its planner holds with ease.
    """
    import ray
    import ray.data

    quiet_ray_data(preserve_order=True)
    plan = ray.put(reader)  # its addresses, counts and tokenizer are megabytes: a process takes them once, not a task
    for start in range(first, last, STREAM_BATCHES):
        count = min(last - start, STREAM_BATCHES)
        # One block per micro-batch: a block is a task's unit of work and of prefetch.
        numbers = ray.data.range(count, override_num_blocks=count)
        dataset = numbers.map(read_planned, fn_args=[start, plan])  # type: ignore[arg-type]  # knows no fn_args
        for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=PREFETCH_BATCHES):
            yield bytes(batch["batch"][0]), json.loads(batch["bad"][0])
