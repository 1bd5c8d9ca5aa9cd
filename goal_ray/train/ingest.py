"""Ray Data ingest: every worker's micro-batches, read and decoded by CPU tasks anywhere in the cluster.

What a worker sees is a function of seed and step alone (goal_ray.order), never of which task finished first: that makes
runs comparable and resumable. So each worker streams its own plan instead of sharing one split stream.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from goal_ray.ahead import read_ahead
from goal_ray.bad_samples import bad_record
from goal_ray.batches import ExampleBuilder, collate
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.goal_batch import pack
from goal_ray.order import BatchOrder
from goal_ray.ray_session import quiet_ray_data
from goal_ray.train.scan import ShardIndex, own_scan, read_sample

# Ray gives a CPU its next task some hundredths of a second after the last: too long for tasks of one small micro-batch.
SAMPLES_PER_TASK = 64
PREFETCH_TASKS = 2
STREAM_TASKS = 1000
READ_AHEAD = 8


@dataclass(frozen=True)
class BatchReader:
    """Reads one rank's micro-batches by their numbers; runs in Ray Data tasks.

    builder        an ExampleBuilder as `pickled` gives it: its tokenizer takes longer to unpickle than a batch to read,
                   so that every process does it once
    indexes        Ray's references to the tars' indexes, as `scan_shards` gives them; without, each process scans the
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

    def __call__(self, row: dict[str, int]) -> dict[str, Any]:
        """The micro-batch number row["id"], packed, and JSON records of the samples left out of it."""
        builder = unpickled(self.builder)
        epoch, rows = self.order.micro_batch(row["id"], self.rank, self.ranks, self.accumulate)
        places = [(self.urls[shard], self._index(shard, builder.pairs > 0), number) for shard, number in rows.tolist()]
        examples, bad = [], []
        samples = read_ahead(lambda place: read_sample(*place), places, READ_AHEAD, READ_AHEAD)
        for (url, index, number), sample in zip(places, samples, strict=True):
            try:
                examples.append(builder(sample, url, self.order.seed + epoch))
            except (ImageError, CaptionError, ShardError) as error:
                bad.append(bad_record(url, index.key(number), "decode", str(error)))
        packed = pack(collate(examples, self.text_multiple, builder.context_length)) if examples else b""
        return {"batch": packed, "bad": json.dumps(bad)}

    def _index(self, shard: int, needs_pairs: bool) -> ShardIndex:
        return own_scan(self.urls[shard], needs_pairs) if self.indexes is None else fetched(self.indexes[shard])


def pickled(builder: ExampleBuilder) -> bytes:
    """The builder in bytes that are read without open_clip, whose import would take a reader 6 s and 300 MB."""
    import open_clip.tokenizer
    from ray import cloudpickle

    # What is left of open_clip in a builder is the function that cleans its tokenizer's texts.
    cloudpickle.register_pickle_by_value(open_clip.tokenizer)
    try:
        return bytes(cloudpickle.dumps(builder))
    finally:
        cloudpickle.unregister_pickle_by_value(open_clip.tokenizer)


@lru_cache(maxsize=2)
def unpickled(builder: bytes) -> ExampleBuilder:
    """The builder of these bytes, the same object for the same bytes."""
    return pickle.loads(builder)


@lru_cache(maxsize=256)  # indexes of more shards than are mixed at a time; they lie in shared memory
def fetched(reference: Any) -> Any:
    """What a Ray reference stands for, got once in this process."""
    import ray

    return ray.get(reference)


def read_run(numbers: Any, plan: Any, first: int, last: int, together: int) -> Any:
    """The micro-batches of a task, `together` of them from `first` + `together` times its number on, as a table."""
    import pyarrow

    start = first + together * numbers["id"][0].as_py()
    read = [fetched(plan)({"id": number}) for number in range(start, min(start + together, last))]
    return pyarrow.table(
        {
            "batch": pyarrow.array([batch["batch"] for batch in read], pyarrow.large_binary()),
            "bad": [batch["bad"] for batch in read],
        }
    )


def stream_batches(reader: BatchReader, first: int, last: int) -> Iterator[tuple[bytes, list[dict[str, str]]]]:
    """Packed micro-batches `first` to `last` - 1 in order, each with the records of the samples left out of it.

    A Ray Data execution takes seconds to start, so one spans many epochs, up to what its planner holds with ease.
    """
    import ray
    import ray.data

    quiet_ray_data(preserve_order=True)
    plan = ray.put(reader)  # its addresses, counts and tokenizer are megabytes: a process takes them once, not a task
    together = max(1, SAMPLES_PER_TASK * reader.ranks * reader.accumulate // reader.order.global_batch)
    for start in range(first, last, STREAM_TASKS * together):
        stop = min(start + STREAM_TASKS * together, last)
        tasks = -(-(stop - start) // together)
        # One block per task: a block is a unit of work and of prefetch.
        numbers = ray.data.range(tasks, override_num_blocks=tasks)
        read = partial(read_run, plan=plan, first=start, last=stop, together=together)
        blocks = numbers.map_batches(read, batch_size=None, batch_format="pyarrow")
        for table in blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH_TASKS):
            for batch, bad in zip(table["batch"], table["bad"], strict=True):
                yield batch.as_py(), json.loads(bad.as_py())
