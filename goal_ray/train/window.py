"""Means of the loss terms, speed and cost between two log lines, without stalling the device.

The device adds up; at a log line the sums are reduced over the ranks and copied to the host in the background, and the
record is made when they have arrived, some steps later. The same way a loss that is not finite is noticed.
"""

import resource
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from goal_ray.losses import world_size
from goal_ray.settings import TERMS
from goal_ray.train.feed import MicroBatch
from goal_ray.train.meter import EnergyMeter, WaitMeter

NEVER = 2**52  # exact in float64, beyond any step


class Arriving(NamedTuple):
    """A log line whose sums are on their way.

    values  terms, gradient norm, first step of a loss that is not finite, then sums over the ranks: images, FLOPs,
            joules; then the most of any rank: peak bytes, seconds of waiting for data
    copied  on CUDA, the event that the copy ends with
    """

    record: dict[str, Any]
    weights: Sequence[float]
    values: Tensor
    copied: torch.cuda.Event | None
    seconds: float


class LogWindow:
    """Adds up micro-batches; every rank must make the same calls in the same order."""

    def __init__(self, device: torch.device):
        self.device = device
        self.sum_4 = torch.zeros(len(TERMS), device=device)
        self.bad_step = torch.full((), NEVER, dtype=torch.float64, device=device)
        self.micro_batches = self.images = self.flops = self.steps = 0
        self.wait = WaitMeter(device)
        self.last_step = -1
        self.since = time.perf_counter()
        self.energy = EnergyMeter(device)
        self.arriving: Arriving | None = None

    def add(self, step: int, terms_4: Tensor, micro_batch: MicroBatch, flops: int) -> None:
        """Adds the terms of a micro-batch of step `step`, and the FLOPs it took on this rank."""
        self.sum_4 += terms_4
        this_step = torch.full_like(self.bad_step, step)
        self.bad_step = torch.where(terms_4.sum().isfinite(), self.bad_step, torch.minimum(self.bad_step, this_step))
        self.steps += step != self.last_step
        self.last_step = step
        self.micro_batches += 1
        self.images += sum(len(chunk.images_B3SS) for chunk in micro_batch.chunks)
        self.flops += flops

    def close(self, record: dict[str, Any], weights: Sequence[float], grad_norm: Any) -> None:
        """Ends the window: its means will complete `record`; begins the next one.

        weights    of the terms, for the record's "loss"
        grad_norm  of the last step, a number, a tensor or None
        """
        norm = torch.as_tensor(torch.nan if grad_norm is None else grad_norm, dtype=torch.float64, device=self.device)
        mean_4 = self.sum_4.double() / max(1, self.micro_batches) / world_size()
        sums = torch.tensor([self.images, self.flops, self.energy.joules()], dtype=torch.float64)
        extremes = torch.tensor([float(peak_bytes(self.device)), self.wait.seconds()], dtype=torch.float64)
        added = torch.cat([mean_4, sums.to(self.device, non_blocking=True)])
        most = torch.cat([-self.bad_step[None], extremes.to(self.device, non_blocking=True)])
        if world_size() > 1:
            dist.all_reduce(added)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        values = torch.cat([added[:4], norm.reshape(1), -most[:1], added[4:], most[1:]])
        copied = None
        if self.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        now = time.perf_counter()
        record = {**record, "window_steps": self.steps}
        self.arriving = Arriving(record, weights, values, copied, now - self.since)
        self.sum_4 = torch.zeros_like(self.sum_4)
        self.micro_batches = self.images = self.flops = self.steps = 0
        self.since = now

    def arrived(self, wait: bool = False) -> dict[str, Any] | None:
        """The record of the window that was closed, once, when its sums are here; None before that and after it.

        Its "nonfinite_step" is the step, from 0, of the first loss that was not finite, or None.
        """
        line = self.arriving
        if line is None or not (wait or line.copied is None or line.copied.query()):
            return None
        self.arriving = None
        if line.copied is not None:
            line.copied.synchronize()
        values = line.values.tolist()
        terms, (norm, bad_step, images, flops, joules, peak, waited_s) = values[:4], values[4:]
        return {
            **line.record,
            "loss": sum(weight * term for weight, term in zip(line.weights, terms, strict=True)),
            **{f"loss_{name}": term for name, term in zip(TERMS, terms, strict=True)},
            "grad_norm": None if norm != norm else norm,
            "images_per_s": images / line.seconds,
            "data_wait_share": min(1.0, waited_s / line.seconds),
            "window_seconds": line.seconds,
            "images": int(images),
            "flops": flops,
            "peak_memory_bytes": int(peak),
            "energy_joules": joules or None,
            "nonfinite_step": None if bad_step >= NEVER else int(bad_step),
        }


def peak_bytes(device: torch.device) -> int:
    """The most memory this process has held: allocated on a GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
