"""Time of competitors that take turns, and the peak memory of each in a process of its own."""

import multiprocessing
import statistics
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch

from goal_ray.flops import peak_flops
from goal_ray.precision import dtype
from goal_ray.timing import measure
from goal_ray.train.benchmark.competitors import COMPETITORS, PARTS, Competitor
from goal_ray.train.benchmark.work import Settings, make_work

Rounds = list[dict[str, float]]
"""Seconds by part, for every round."""
Variants = Mapping[str, tuple[str, Settings]]
"""What to call it -> a name in COMPETITORS, and its settings."""


def compare(variants: Variants, settings: Settings, rounds: int, warmup: int) -> dict[str, Any]:
    """Measures all variants; returns plain values.

    settings  what the variants have in common: model, batch, device, seed
    """
    memory = peak_memory(variants)  # first, while this process holds nothing on the device
    device = torch.device(settings.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # times are read off the current device
    loaded = settings.load()
    built = [COMPETITORS[kind](name, loaded, make_work(loaded, own), own) for name, (kind, own) in variants.items()]
    times = time_in_turn(built, rounds, warmup)
    work = make_work(loaded, settings)
    flops = work.useful_flops(loaded.clip)
    return {
        "settings": asdict(settings),
        "machine": machine(settings.device),
        "tokens": dict(zip(("captions", "sentences"), work.longest, strict=True)),
        "useful_flops": flops,
        "variants": {name: numbers(times[name], flops, memory[name], own) for name, (_, own) in variants.items()},
    }


def numbers(rounds: Rounds, flops: int, memory: int, settings: Settings) -> dict[str, Any]:
    """What is known of one variant. `mfu`, model FLOPs utilisation, is None where the device's peak is unknown."""
    seconds = statistics.median(step_seconds(rounds))
    peak = peak_flops(torch.device(settings.device), dtype(settings.precision))
    return {
        "seconds": seconds,
        "parts": {part: statistics.median(each[part] for each in rounds) for part in PARTS},
        "images_per_s": settings.batch / seconds,
        "peak_flops": peak,
        "mfu": None if peak is None else flops / seconds / peak,
        "peak_bytes": memory,
        "rounds": rounds,
    }


def machine(device: str) -> dict[str, str]:
    """The device and the software."""
    on_gpu = device.startswith("cuda")
    cpu = f"{torch.get_num_threads()} CPU threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else cpu,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
    }


def time_in_turn(competitors: list[Competitor], rounds: int, warmup: int) -> dict[str, Rounds]:
    """Each competitor's parts in every round after `warmup` untimed ones.

    They take turns, so that a machine that slows down slows all. On a GPU each finds an empty queue, whether or not the
    one before waits for the GPU.
    """
    times: dict[str, Rounds] = {competitor.name: [] for competitor in competitors}
    for number in range(warmup + rounds):
        print(f"round {number + 1} of {warmup + rounds}, {warmup} of them untimed", file=sys.stderr, flush=True)
        with measure("between") as seconds:
            for competitor in competitors:
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                competitor.step()
        for name, each in times.items():
            if number >= warmup:
                each.append({part: seconds.get(f"{name}: {part}", 0.0) for part in PARTS})
    return times


def step_seconds(rounds: Rounds) -> list[float]:
    """The whole step's seconds, for every round."""
    return [sum(parts.values()) for parts in rounds]


def ratio(over: Rounds, under: Rounds) -> tuple[float, float, float]:
    """Quotient of two competitors' times: its quartiles over the rounds, the median in the middle.

    Round by round, since the two of a round ran under like conditions.
    """
    quotients = [a / b for a, b in zip(step_seconds(over), step_seconds(under), strict=True)]
    low, median, high = statistics.quantiles(quotients, method="inclusive") if len(quotients) > 1 else quotients * 3
    return low, median, high


def peak_memory(variants: Variants) -> dict[str, int]:
    """Bytes at the peak of two steps of each variant, each in a fresh process.

    On a GPU what PyTorch allocated; on a CPU all that the process held, Python and its libraries included.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, and nothing computed yet
    found = {}
    for name, variant in variants.items():
        print(f"peak memory: {name}", file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=context) as process:
            found[name] = process.submit(own_peak_memory, *variant).result()
    return found


def own_peak_memory(competitor: str, settings: Settings) -> int:
    """Bytes at this process's peak after two steps: the second has gradients, activations and optimizer together."""
    loaded = settings.load()
    work = make_work(loaded, settings)
    built = COMPETITORS[competitor](competitor, loaded, work, settings)
    for _ in range(2):
        built.step()
    if settings.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(settings.device)
    # Not getrusage, which counts what the parent held when it started this process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024
