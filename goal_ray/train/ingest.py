"""Ray Data ingest: every worker's micro-batches, read and decoded by CPU tasks anywhere in the cluster.

What a worker sees is a function of seed and step alone (goal_ray.order), never of which task finished first: that makes
runs comparable and resumable. So each worker streams its own plan instead of sharing one split stream.
"""

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from goal_ray.batches import ExampleBuilder, collate, pack
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.order import BatchOrder
from goal_ray.ray_session import quiet_ray_data
from goal_ray.train.scan import bad_record, read_sample, scan_shard

PREFETCH_BATCHES = 4
STREAM_BATCHES = 2000


@dataclass(frozen=True)
class BatchReader:
    """Reads one rank's micro-batches by their numbers; runs in Ray Data tasks.

    builder  a pickled ExampleBuilder: its tokenizer takes longer to unpickle than a batch to read, so that every
             process does it once

    Samples that turn out unreadable are left out of their batch and reported beside it.
    """

    urls: tuple[str, ...]
    order: BatchOrder
    rank: int
    ranks: int
    accumulate: int
    builder: bytes

    def __call__(self, row: dict, first: int = 0) -> dict:
        """The micro-batch `first` + row["id"], packed, and JSON records of the samples left out of it."""
        builder = unpickled(self.builder)
        epoch, rows = self.order.micro_batch(first + int(row["id"]), self.rank, self.ranks, self.accumulate)
        examples, bad = [], []
        for shard, number in rows.tolist():
            url = self.urls[shard]
            entry = scan_shard(url, builder.pairs > 0)[0][number]
            try:
                examples.append(builder(read_sample(url, entry), url, self.order.seed + epoch))
            except (ImageError, CaptionError, ShardError) as error:
                bad.append(bad_record(url, entry.key, "decode", error))
        return {"batch": pack(collate(examples)) if examples else b"", "bad": json.dumps(bad)}


@lru_cache(maxsize=2)
def unpickled(builder: bytes) -> ExampleBuilder:
    """The builder of these bytes, the same object for the same bytes."""
    return pickle.loads(builder)


def stream_batches(reader: BatchReader, first: int, last: int) -> Iterator[tuple[bytes, list[dict[str, str]]]]:
    """Packed micro-batches `first` to `last` - 1 in order, each with the records of the samples left out of it.

    A Ray Data execution takes seconds to start, so one spans many epochs, up to what its planner holds with ease.
    """
    import ray.data

    quiet_ray_data(preserve_order=True)
    for start in range(first, last, STREAM_BATCHES):
        count = min(last - start, STREAM_BATCHES)
        # One block per micro-batch: a block is a task's unit of work and of prefetch.
        dataset = ray.data.range(count, override_num_blocks=count).map(reader, fn_args=[start])
        for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=PREFETCH_BATCHES):
            yield bytes(batch["batch"][0]), json.loads(batch["bad"][0])
