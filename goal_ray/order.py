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

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch * global_batch, 2) int64 rows (shard, sample within the shard) in reading order."""
        generator = np.random.default_rng([self.seed, epoch])
        shards = generator.permutation(len(self.counts))
        windows = []
        for start in range(0, len(shards), self.window_shards):
            rows = np.concatenate([self._rows(shard) for shard in shards[start : start + self.window_shards]])
            windows.append(rows[generator.permutation(len(rows))])
        return np.concatenate(windows)[: self.steps_per_epoch * self.global_batch]

    def _rows(self, shard: int) -> np.ndarray:
        count = self.counts[shard]
        return np.stack([np.full(count, shard, dtype=np.int64), np.arange(count, dtype=np.int64)], axis=1)

    def micro_batch(self, number: int, rank: int, ranks: int, accumulate: int) -> tuple[int, np.ndarray]:
        """(epoch, (n, 2) rows) of one rank's micro-batch; `number` counts them from the start of the run.

        The global batch of a step is the same rows whatever `ranks` and `accumulate` are.
        """
        step, part = divmod(number, accumulate)
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        rows = _epoch_rows(self, epoch).reshape(self.steps_per_epoch, accumulate, ranks, -1, 2)
        return epoch, rows[step_in_epoch, part, rank]


@lru_cache(maxsize=2)
def _epoch_rows(order: BatchOrder, epoch: int) -> np.ndarray:
    return order.epoch(epoch)
