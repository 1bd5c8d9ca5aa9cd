"""`python -m goal_ray.train.benchmark`: the training step beside the published style and beside plain CLIP."""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from goal_ray.cli import run_main
from goal_ray.errors import ConfigError
from goal_ray.model import usable_device
from goal_ray.precision import Precision
from goal_ray.settings import StepConfig
from goal_ray.train.benchmark.competitors import COMPETITORS
from goal_ray.train.benchmark.measure import Variants, compare
from goal_ray.train.benchmark.table import PUBLISHED_FP32, show_competitors, show_switches
from goal_ray.train.benchmark.work import Settings

DESCRIPTION = """Measure goal_ray's training step, forward, backward and optimizer, on one synthetic batch, beside

  published  the published style of GOAL step: each tower twice for the whole and once for the part, captions tokenised
             inside the step and padded to 248, a loop over the samples, anomaly detection, unfused AdamW; beside a
             step in bf16 it is measured in bf16 and in fp32
  plain      the floor: open_clip's forwards of as many pictures and texts, and its contrastive loss; same switches,
             precision and optimizer as goal_ray's

All compute on the same pictures (noise), captions (about 100 to 200 tokens) and weights (random), take turns in one
process, and each counts by its median over the rounds. Peak memory is that of two steps in a process of its own: on a
GPU what PyTorch allocated, on a CPU everything resident. MFU is the useful work, the same for all, over time and peak:
each picture, crop, caption and sentence once through its tower and back, texts as long as the longest. The peak is the
data sheet's on a GPU, and measured on a CPU.

With --switches goal_ray's step alone is measured: as given, and with one switch at a time turned over, a multiple set
to 1."""
EXAMPLES = """examples:
  python -m goal_ray.train.benchmark --model ViT-B-16 --batch 4 --steps 7
  python -m goal_ray.train.benchmark --model ViT-L-14 --batch 128 --precision bf16 --compile --out step.json
  python -m goal_ray.train.benchmark --batch 64 --precision bf16 --switches"""
SWITCHES = (*(field.name for field in fields(StepConfig)), "precision")
GIVEN = "as given"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints, writes."""
    options = parse(arguments)
    step = StepConfig(**{field.name: getattr(options, field.name) for field in fields(StepConfig)})
    device = usable_device(options.device)
    settings = Settings(options.model, options.batch, options.precision, device, options.seed, step)
    if options.switches is None:
        variants = competing(options.competitors, settings)
    else:
        variants = {GIVEN: ("goal", settings)} | {
            label: ("goal", turned) for label, turned in (turn(settings, name) for name in options.switches or SWITCHES)
        }
    try:
        result = compare(variants, settings, options.steps, options.warmup)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(f"{error}; lower --batch, or name fewer --competitors or --switches at a time") from None
    print(show_competitors(result) if options.switches is None else show_switches(result, GIVEN))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m goal_ray.train.benchmark",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="ViT-B-16", help="open_clip architecture or .json file (%(default)s)")
    parser.add_argument("--batch", metavar="B", type=int, default=4, help="pictures, one local pair each (%(default)s)")
    parser.add_argument("--steps", metavar="N", type=int, default=7, help="timed rounds (%(default)s)")
    parser.add_argument("--warmup", metavar="N", type=int, default=2, help="untimed rounds before them (%(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the towers (%(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of weights and data (%(default)s)")
    parser.add_argument("--out", metavar="FILE", type=Path, help="also write all numbers as JSON")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--competitors",
        nargs="+",
        choices=COMPETITORS,
        default=list(COMPETITORS),
        help="whom to measure (default: all)",
    )
    which.add_argument(
        "--switches", nargs="*", choices=SWITCHES, help="measure the worth of these switches (no name: of each)"
    )
    switches = parser.add_argument_group("switches of goal_ray's step, and of plain's where it has them")
    meanings = dict(re.findall(r"^ *(\w+): (.*)$", StepConfig.__doc__ or "", re.MULTILINE))
    for field in fields(StepConfig):
        kind: dict[str, Any] = {"type": int} if field.type is int else {"action": argparse.BooleanOptionalAction}
        help_text = f"{meanings[field.name]} ({field.default})".replace("%", "%%")
        switches.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=help_text, **kind)
    options = parser.parse_args(arguments)
    if options.batch < 2:
        parser.error("--batch must be at least 2: a contrastive loss needs something to tell apart")
    if options.steps < 1 or options.warmup < 1:
        parser.error("--steps and --warmup must be at least 1")
    return options


def competing(names: Sequence[str], settings: Settings) -> Variants:
    """The competitors of these names, the published style also in fp32."""
    variants = {name: (name, settings) for name in names}
    if "published" in names and settings.precision != "fp32":
        variants[PUBLISHED_FP32] = ("published", replace(settings, precision="fp32"))
    return variants


def turn(settings: Settings, switch: str) -> tuple[str, Settings]:
    """The settings with one switch turned over, and what to call that."""
    if switch == "precision":
        other: Precision = "fp32" if settings.precision == "bf16" else "bf16"
        return other, replace(settings, precision=other)
    value = getattr(settings.step, switch)
    turned: Any = not value if isinstance(value, bool) else 1
    label = {True: "on", False: "off"}[turned] if isinstance(value, bool) else turned
    return f"{switch} {label}", replace(settings, step=replace(settings.step, **{switch: turned}))


if __name__ == "__main__":
    run_main(main)
