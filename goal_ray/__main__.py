"""`goal-ray STAGE ...`: the console script; the same as `python -m goal_ray.STAGE ...`."""

import importlib
import sys

from goal_ray import __version__
from goal_ray.cli import run_main

STAGES = {
    "demo": "run every stage on drawn scenes, on this machine, with measured results",
    "scenes": "draw pictures with long captions and known truth",
    "shards": "make shards of pictures and captions; inspect, validate and reshard them",
    "lism": "match each sentence of a caption to a region of its picture",
    "train": "fine-tune a CLIP with GOAL",
    "evaluate": "measure retrieval of a model on shards",
    "export": "write a model for open_clip or transformers, with a model card",
    "submit": "run one of these as a job on a Ray cluster, and follow it",
    "spot": "on a spot machine: tell Ray when the cloud takes it away",
    "report": "write one HTML page with curves, metrics and pictures",
}

HELP = f"""goal-ray {__version__}: fine-tune CLIP on long captions with GOAL

usage: goal-ray STAGE [arguments]      goal-ray STAGE --help teaches each stage

stages:
""" + "\n".join(f"  {name:<10}{text}" for name, text in STAGES.items())


def main() -> None:
    """Dispatches to a stage; only that stage is imported."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(HELP)
        return
    if sys.argv[1] == "--version":
        print(__version__)
        return
    stage = sys.argv[1]
    if stage not in STAGES:
        print(f"error: no stage {stage!r}; there are: {', '.join(STAGES)}", file=sys.stderr)
        raise SystemExit(2)
    run_main(importlib.import_module(f"goal_ray.{stage}.__main__").main, sys.argv[2:])


if __name__ == "__main__":
    main()
