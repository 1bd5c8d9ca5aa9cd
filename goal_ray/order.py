"""Which sample is read when: a function of counts, seed, epoch and step alone, the same for any number of workers."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from goal_ray.errors import StageError


@dataclass(frozen=True)
class BatchOrder:
    """The order of training: shards shuffled, then samples shuffled within windows of consecutive shards.

    counts         samples in every shard
    global_batch   samples an optimizer step sees, over all workers and accumulation steps
    seed           fixes every epoch's order
    window_shards  how many shards are mixed: bounds what must be at hand to read in this order
    """

    counts: tuple[int, ...]
    global_batch: int
    seed: int
    window_shards: int

    def __post_init__(self) -> None:
        if sum(self.counts) < self.global_batch:
            raise StageError(
                f"the shards hold {sum(self.counts)} usable samples, less than a global batch of {self.global_batch}; "
                "lower the batch, the accumulation or the number of workers, or add data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch; the samples left over, others each time, sit it out."""
        return sum(self.counts) // self.global_batch

    def micro_batch(self, number: int, rank: int, ranks: int, accumulate: int) -> tuple[int, np.ndarray]:
        """(epoch, (n, 2) rows) of one rank's micro-batch; `number` counts them from the start of the run.

        The global batch of a step is the same rows whatever `ranks` and `accumulate` are.
        """
        step, part = divmod(number, accumulate)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.global_batch
        return epoch, self._rows(epoch, start, start + self.global_batch).reshape(accumulate, ranks, -1, 2)[part, rank]

    def _rows(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` - 1 of an epoch's order; only the windows that they lie in are made."""
        ends = _epoch_windows(self, epoch)[1]
        first, last = np.searchsorted(ends, [start, stop - 1], side="right").tolist()
        rows = np.concatenate([_window_rows(self, epoch, window) for window in range(first, last + 1)])
        before = int(ends[first - 1]) if first else 0
        return rows[start - before : stop - before]


# 10,000 shards of 10,000 samples are 1.6 GB of rows an epoch, but 2.6 MB a window of 16 shards; every reading process
# holds some windows, never an epoch.
@lru_cache(maxsize=2)
def _epoch_windows(order: BatchOrder, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shards in an epoch's order, and at which of its rows each window of them ends."""
    shards = np.random.default_rng([order.seed, epoch]).permutation(len(order.counts))
    ends = np.cumsum(np.array(order.counts, np.int64)[shards])
    last = np.minimum(
        np.arange(order.window_shards, len(shards) + order.window_shards, order.window_shards), len(shards)
    )
    return shards, ends[last - 1]


@lru_cache(maxsize=8)
def _window_rows(order: BatchOrder, epoch: int, window: int) -> np.ndarray:
    """(n, 2) rows of a window, shuffled by a generator of its own, so that no other window is needed for it."""
    start = window * order.window_shards
    shards = _epoch_windows(order, epoch)[0][start : start + order.window_shards]
    counts = np.array(order.counts, np.int64)[shards]
    samples = np.concatenate([np.arange(count) for count in counts])
    rows = np.stack([np.repeat(shards, counts), samples], axis=1)
    return rows[np.random.default_rng([order.seed, epoch, 1 + window]).permutation(len(rows))]
