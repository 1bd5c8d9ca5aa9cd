"""The worker's end of the ingest: micro-batches unpacked, cut into chunks and on the device before the step asks.

A thread does it, so that reading, pinning and copying overlap with the steps. With each micro-batch the ranks tell each
other its sizes, on the host: the step itself never waits for a number. The same message carries the wish to stop, so
that all ranks end after the same step.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from queue import Full, Queue
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goal_ray.errors import StageError
from goal_ray.goal_batch import GoalBatch, count_batch, unpack
from goal_ray.gradcache import split_batch
from goal_ray.losses import world_size

AHEAD = 2


class MicroBatch(NamedTuple):
    """A micro-batch in chunks, on the device.

    counts_R4     what `count_batch` finds on every rank, on the CPU
    text_lengths  tokens of every text row that goes through the text tower, padding to the chunk's longest included
    copied        on CUDA, the event that the copies end with
    """

    chunks: list[GoalBatch]
    counts_R4: Tensor
    text_lengths: list[int]
    copied: torch.cuda.Event | None


class Feed:
    """Iterates over the micro-batches of this rank; ends early, after a whole optimizer step, when a rank is to stop.

    packed      micro-batches as `goal_ray.batches.pack` made them
    chunks      parts of a micro-batch
    accumulate  micro-batches per optimizer step
    stopping    whether this rank was asked to stop
    text_multiple  as in `split_batch`
    """

    def __init__(
        self,
        packed: Iterator[bytes],
        chunks: int,
        accumulate: int,
        device: torch.device,
        stopping: Callable[[], bool],
        text_multiple: int = 1,
    ):
        self.packed = packed
        self.chunks = chunks
        self.accumulate = accumulate
        self.device = device
        self.stopping = stopping
        self.text_multiple = text_multiple
        # A group of its own: the step's collectives run in another thread, in another order.
        self.group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Chunks make a micro-batch larger than the memory that a step has for it: one that waits is enough.
        self.ready: Queue[MicroBatch | BaseException | None] = Queue(AHEAD if chunks == 1 else 1)
        self.closed = threading.Event()
        threading.Thread(target=self._run, name="feed", daemon=True).start()

    def __iter__(self) -> Iterator[MicroBatch]:
        while (item := self.ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            if item.copied is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(item.copied)
                for chunk in item.chunks:
                    for tensor in chunk[:-1]:
                        tensor.record_stream(current)
            yield item

    def close(self) -> None:
        """Lets the thread end; what it has ready is dropped."""
        self.closed.set()

    def _run(self) -> None:
        try:
            if self.stream is not None:
                # A thread begins on device 0, where every worker of a node would leave a context of half a gigabyte.
                torch.cuda.set_device(self.device)
            ending = False
            for number, packed in enumerate(self.packed):
                micro_batch, stop = self._prepare(packed)
                self._put(micro_batch)
                ending |= stop
                if self.closed.is_set() or (ending and (number + 1) % self.accumulate == 0):
                    break
            self._put(None)
        except BaseException as error:  # it belongs to the thread that waits for the batch
            self._put(error)

    def _put(self, item: MicroBatch | BaseException | None) -> None:
        while not self.closed.is_set():
            with suppress(Full):
                self.ready.put(item, timeout=0.5)
                return

    def _prepare(self, packed: bytes) -> tuple[MicroBatch, bool]:
        batch = unpack(packed)
        mine_5 = torch.cat([count_batch(batch), torch.tensor([int(self.stopping())])])
        all_R5 = [torch.empty_like(mine_5) for _ in range(world_size())]
        if self.group is None:
            all_R5 = [mine_5]
        else:
            dist.all_gather(all_R5, mine_5, group=self.group)
        counts_R5 = torch.stack(all_R5)
        counts_R4 = counts_R5[:, :4]
        try:
            parts = split_batch(batch._replace(counts_R4=counts_R4), self.chunks, self.text_multiple)
        except ValueError as error:
            raise StageError(
                f"a micro-batch lost most of its samples: {error}; mend the data, or raise `chunk`"
            ) from None
        lengths = [ids.shape[1] for part in parts for ids in (part.text_BL, part.sentences_ML) for _ in range(len(ids))]
        return MicroBatch(*self._to_device(parts, counts_R4, lengths)), bool(counts_R5[:, 4].any())

    def _to_device(
        self, parts: list[GoalBatch], counts_R4: Tensor, lengths: list[int]
    ) -> tuple[list[GoalBatch], Tensor, list[int], torch.cuda.Event | None]:
        if self.stream is None:
            return parts, counts_R4, lengths, None
        with torch.cuda.stream(self.stream):
            moved = [
                GoalBatch._make(
                    [*(each.pin_memory().to(self.device, non_blocking=True) for each in part[:-1]), counts_R4]
                )
                for part in parts
            ]
            event = torch.cuda.Event()
            event.record()
        return moved, counts_R4, lengths, event
