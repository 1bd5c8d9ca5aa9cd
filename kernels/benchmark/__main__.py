"""`python -m kernels.benchmark`: the token-similarity loss in Triton against the published style and PyTorch."""

import argparse
import importlib.util
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from kernels.benchmark.cases import DTYPES, SHAPES, Case, necessary_bytes
from kernels.benchmark.competitors import POOLS, RAGGED, eager_with, loop
from kernels.benchmark.measure import Loss, copy_bandwidth, relative_errors, time_loss
from kernels.benchmark.plot import plot
from kernels.tsl.triton_cells import IS_INTERPRETED
from kernels.tsl.triton_op import tsl_triton

DESCRIPTION = """Compare the Triton kernels of the token-similarity loss with a Python loop per region (the published
style), with eager PyTorch (four ways to pool) and with torch.compile of the fastest; in the case of the goals, of all.
First every one is checked against the reference in float64; then, on a GPU, forward and backward are timed by CUDA
events (medians, with nothing of the input in the L2 cache). Writes OUT.json after each case, and OUT.png where
matplotlib is installed.

By default there are 96 cases, with two compilations each: start with one,
  python -m kernels.benchmark --shapes L/14 --batches 256 --regions 4 --dtypes bf16

Without a GPU only the check is made, in Triton's interpreter, and nothing is written: timings need a GPU."""

LIMITS = {"fp32": 1e-5, "bf16": 1e-2}
GOAL_CASE = Case("L/14", 256, 4, "bf16")
MODE = "touch"
REPEATS = 30
LOOP_REPEATS = 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.benchmark",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), help="towers (default: all)")
    parser.add_argument("--batches", nargs="+", type=int, default=[16, 64, 256, 1024], help="samples (16 64 256 1024)")
    parser.add_argument("--regions", nargs="+", type=int, default=[1, 4, 8], help="boxes per sample (1 4 8)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="tokens (default: both)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/tsl"), help="results, without suffix")
    options = parser.parse_args(arguments)
    if min(options.batches) < 1 or min(options.regions) < 1:
        parser.error("--batches and --regions must be at least 1")
    if torch.cuda.is_available() and IS_INTERPRETED:
        parser.error("TRITON_INTERPRET is set, and the interpreter's times mean nothing; unset it")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks, and on a GPU times; returns 1 where an implementation is further from the reference than allowed."""
    options = parse(arguments)
    on_gpu = torch.cuda.is_available()
    eager = {f"eager, {name}": eager_with(pool) for name, pool in POOLS.items()}
    checks = check({"triton": tsl_triton, **eager, "loop": loop}, options, "cuda" if on_gpu else "cpu")
    if on_gpu:
        results: dict[str, Any] = {
            "versions": versions(),
            "mode": MODE,
            "limits": LIMITS,
            "checks": checks,
            "cases": [],
        }
        time_cases(results, tsl_triton, eager, options)
        if not results["cases"]:
            print("\nno case fits this GPU's memory, and nothing was written; lower --batches")
            return 1
        print_goals(results["cases"])
        if importlib.util.find_spec("matplotlib") is not None:
            print(f"plot: {plot(results, options.out.with_suffix('.png'))}")
        print(f"all numbers: {options.out.with_suffix('.json')}")
    else:
        print("\nno GPU here: timings need one; the kernels were checked in Triton's interpreter")
    return 0 if all(each["within"] for each in checks) else 1


def cases(options: argparse.Namespace) -> list[Case]:
    """Every combination that was asked for."""
    return [
        Case(shape, batch, regions, dtype)
        for shape, dtype, batch, regions in itertools.product(
            options.shapes, options.dtypes, options.batches, options.regions
        )
    ]


def versions() -> dict[str, str]:
    """The GPU and the software."""
    device = torch.cuda.get_device_name()
    return {"device": device, "torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}


def check(losses: dict[str, Loss], options: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Relative errors against float64, at two samples of three boxes, for every shape and dtype."""
    print(f"largest relative error of outputs and gradients against float64, on {device}")
    rows = []
    for shape, dtype in itertools.product(options.shapes, options.dtypes):
        inputs = Case(shape, 2, 3, dtype).inputs(device)
        for name, loss in losses.items():
            errors = relative_errors(loss, inputs, MODE)
            worst = max(errors, key=lambda each: errors[each])
            within = errors[worst] <= LIMITS[dtype]
            rows.append({"shape": shape, "dtype": dtype, "name": name, "errors": errors, "within": within})
            verdict = "" if within else f"  exceeds {LIMITS[dtype]:g}"
            print(f"  {shape:<9} {dtype}  {name:<18} {errors[worst]:.1e}  ({worst}){verdict}", flush=True)
    return rows


def time_cases(results: dict[str, Any], kernel: Loss, eager: dict[str, Loss], options: argparse.Namespace) -> None:
    """Times every case into `results`, which is written after each, so that an interrupted run keeps what it has."""
    bandwidth = results["copy_bytes_per_s"] = copy_bandwidth()
    print(f"\n{results['versions']['device']}: copies {bandwidth / 1e12:.2f} TB/s")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(options):
        row = measure(case, kernel, eager, bandwidth)
        if row is None:
            continue
        results["cases"].append(row)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def measure(case: Case, kernel: Loss, eager: dict[str, Loss], bandwidth: float) -> dict[str, Any] | None:
    """Times of all implementations in one case, printed and returned; None where memory ends before the kernel's."""
    inputs = case.inputs("cuda")
    forward, backward = necessary_bytes(inputs)
    times: dict[str, dict[str, float]] = {}

    def take(name: str, loss: Loss, repeats: int = REPEATS) -> None:
        try:
            times[name] = time_loss(loss, inputs, MODE, repeats)
        except torch.cuda.OutOfMemoryError:
            print(f"  {name}: out of memory", flush=True)
        torch.cuda.empty_cache()

    print(f"\n{case.shape}, {case.batch} × {case.regions} boxes, {case.dtype}", flush=True)
    take("triton", kernel)
    if "triton" not in times:
        return None
    for name, loss in eager.items():
        take(name, loss)
    ragged = [f"eager, {name}" for name in RAGGED if f"eager, {name}" in times]
    # Compilation may turn the order around, so that what the goal compares with is the fastest of all.
    compiled = ragged if case == GOAL_CASE else sorted(ragged, key=lambda name: times[name]["both"])[:1]
    for name in (*compiled, "eager, padded"):
        torch.compiler.reset()  # else earlier shapes fill its cache, and it falls back to eager without a word
        take(name.replace("eager", "compiled"), torch.compile(eager[name], dynamic=False))
    take("loop", loop, LOOP_REPEATS)

    ours = times["triton"]
    for name, each in times.items():
        print(
            f"  {name:<28}"
            + "".join(f"{1e6 * each[part]:>11.0f}" for part in ("forward", "backward", "both"))
            + f" µs {each['extra_bytes'] / 2**20:>9.1f} MiB {each['both'] / ours['both']:>8.2f} ×"
        )
    must_move = forward + backward
    share = must_move / ours["both"] / bandwidth
    print(f"  triton moves the {must_move / 1e6:.0f} MB that must move at {100 * share:.0f} % of copy bandwidth")
    return {
        **vars(case),
        "forward_bytes": forward,
        "backward_bytes": backward,
        "floor_s": must_move / bandwidth,
        "bandwidth_share": share,
        "times": times,
    }


def print_goals(rows: list[dict[str, Any]]) -> None:
    """Prints how far the case of interest is from its goals, where it was measured."""
    found = [row for row in rows if all(row[key] == value for key, value in vars(GOAL_CASE).items())]
    if not found:
        return
    row, times = found[0], found[0]["times"]
    ours = times["triton"]["both"]
    absent = {"both": math.nan}
    ragged = [times[name]["both"] for name in (f"compiled, {pool}" for pool in RAGGED) if name in times]
    compiled = min(ragged, default=math.nan)
    padded, published = (times.get(name, absent)["both"] for name in ("compiled, padded", "loop"))
    print(f"\ngoals at {GOAL_CASE.shape}, {GOAL_CASE.batch} × {GOAL_CASE.regions} boxes, {GOAL_CASE.dtype}:")
    print(f"  {compiled / ours:.1f} × faster than torch.compile for any number of boxes per sample (goal 3);", end="")
    print(f" {padded / ours:.1f} × for equally many")
    print(f"  {published / ours:.0f} × faster than the loop (goal 100)")
    print(f"  {100 * row['bandwidth_share']:.0f} % of copy bandwidth (goal 70): {1e6 * ours:.0f} µs measured, ", end="")
    print(f"{1e6 * row['floor_s']:.0f} µs at full copy bandwidth")
    print(f"  {times['triton']['extra_bytes'] / 2**20:.1f} MiB of memory beside inputs and gradients")


if __name__ == "__main__":
    sys.exit(main())
