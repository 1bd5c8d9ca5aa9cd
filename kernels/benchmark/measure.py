"""The measurements: relative errors anywhere; times, bandwidth and memory on a GPU.

Times are the GPU's: each pass is queued behind a pause, so that the host's launches are ahead of it, as they are in
training, where the towers keep the GPU busy. What waits for the GPU, as `.item()` does, pays for its launches. The L2
cache holds nothing of a pass when it begins.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.tsl.reference import TslResult, tsl_reference

EPS = 1e-5
LEAVES = ("tokens_BND", "ln_weight_D", "ln_bias_D", "proj_DE", "target_ME")
CACHE_BYTES = 256 * 2**20  # more than any L2
COPY_BYTES = 2**30
LAUNCH_CYCLES_PER_S = 5e9  # twice any GPU's clock: the pause is at least twice what the host takes to launch a pass
Loss = Callable[..., TslResult]


def with_leaves(inputs: dict[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The inputs with their differentiable ones as fresh leaves, converted where a dtype is given."""
    return {
        **inputs,
        **{name: inputs[name].detach().to(dtype or inputs[name].dtype).requires_grad_() for name in LEAVES},
    }


def relative_errors(loss: Loss, inputs: dict[str, Any], mode: str) -> dict[str, float]:
    """|x - exact| / |exact| of loss and gradients; exact is the reference on the same values in float64.

    Of cosines, the largest error: their scale is 1, and those of unrelated vectors are as near 0 as chance has it.
    """

    def outcome(function: Loss, arguments: dict[str, Any]) -> dict[str, Tensor]:
        result = function(**arguments, mode=mode, eps=EPS)
        result.loss.backward()
        gradients = {name: arguments[name].grad for name in LEAVES}
        return {"loss": result.loss.detach(), "cosine": result.cosine_M.detach(), **gradients}

    exact = outcome(tsl_reference, with_leaves(inputs, torch.float64))
    found = outcome(loss, with_leaves(inputs))
    errors = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items()}
    return {**errors, "cosine": (found["cosine"] - exact["cosine"]).abs().max().item()}


def copy_bandwidth(repeats: int = 20) -> float:
    """Bytes per second, read and written, of a plain copy on the GPU."""
    source, target = (torch.ones(COPY_BYTES, dtype=torch.uint8, device="cuda") for _ in range(2))
    events = []
    for _ in range(repeats):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        marks[0].record()
        target.copy_(source)
        marks[1].record()
        events.append(marks)
    return 2 * COPY_BYTES / median_seconds(events, 0, 1)


def median_seconds(events: list[list[torch.cuda.Event]], start: int, end: int) -> float:
    """Median time between two marks of each pass."""
    torch.cuda.synchronize()
    return statistics.median(marks[start].elapsed_time(marks[end]) for marks in events) / 1000


def time_loss(loss: Loss, inputs: dict[str, Any], mode: str, repeats: int) -> dict[str, float]:
    """Median seconds of forward, backward and both, and the peak of memory beyond inputs and gradients, in bytes."""
    arguments = with_leaves(inputs)

    def once() -> list[torch.cuda.Event]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        marks[0].record()
        result = loss(**arguments, mode=mode, eps=EPS)
        marks[1].record()
        result.loss.backward()
        marks[2].record()
        for name in LEAVES:
            arguments[name].grad = None
        return marks

    for _ in range(min(3, repeats)):
        once()
    torch.cuda.synchronize()

    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    once()
    pause = int((time.perf_counter() - began) * LAUNCH_CYCLES_PER_S)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - held - sum(inputs[name].nbytes for name in LEAVES)

    # Read, not written: a cache full of written lines would have to write them back within the pass.
    displacing = torch.zeros(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    events = []
    for _ in range(repeats):
        displacing.max()
        torch.cuda._sleep(pause)
        events.append(once())
    spans = {"forward": (0, 1), "backward": (1, 2), "both": (0, 2)}
    return {**{name: median_seconds(events, *span) for name, span in spans.items()}, "extra_bytes": extra}
