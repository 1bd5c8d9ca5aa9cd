"""`goal-ray scenes OUT --count N --seed S`, or `python -m goal_ray.scenes ...`."""

import time
from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.config import build_config
from goal_ray.scenes.run import SceneSettings, draw_scenes

DESCRIPTION = """Draw pictures with long captions and known truth, as WebDataset tars that every stage reads.

A scene shows several shapes that differ in form, colour, pattern, size and place. Its caption spends one sentence on
each and some on the whole; it is mostly longer than CLIP's 77 tokens. OUT gets scenes-000000.tar, ... with KEY.png,
KEY.txt and KEY.json (boxes in pixels, and which characters of the caption speak of which object), and scenes.json with
the settings. The same command gives the same bytes; after an interruption it draws what is missing.

With --short captions are like alt text: the shape, colour and pattern of each object, sometimes its place. With
--crops some pictures show one object alone, as a region cut from a scene shows it. Together that is what a CLIP should
know before it is fine-tuned on long captions: --short --crops 0.6 --min-objects 2 --max-objects 3.

With --paired each sample also has KEY.pairs.json, as if from a LISM that never errs: to train on true pairs, or to
measure with `goal-ray evaluate --pairs`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, draws, says what was drawn."""
    defaults = SceneSettings()
    positionals = {"OUT": "folder for the tars; any storage fsspec reaches"}
    command = parser("scenes", DESCRIPTION, "goal-ray scenes scenes/train --count 1000 --seed 1", positionals)
    command.add_argument("--count", type=int, default=1000, help="scenes to draw (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="another seed, other scenes (default: %(default)s)")
    for name, text in {
        "shard_size": "scenes per tar",
        "size": "picture height in pixels; the width is 1 to 1.25 times that",
        "min_objects": "fewest objects in a scene",
        "max_objects": "most objects in a scene, at most 9",
        "family": "consecutive scenes that share all but the patterns of their objects",
    }.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, type=int, default=getattr(defaults, name), help=f"{text} (default: %(default)s)")
    crops = "share of the pictures that show one object alone, as a region crop (default: %(default)s)"
    command.add_argument("--crops", type=float, default=defaults.crops, help=crops)
    command.add_argument(
        "--short", action="store_true", help="short captions: no sizes, few places, nothing on the whole scene"
    )
    command.add_argument("--paired", action="store_true", help="write each sentence's true region as KEY.pairs.json")
    options = vars(command.parse_args(arguments))
    out, count, seed = options.pop("out"), options.pop("count"), options.pop("seed")
    started = time.monotonic()
    tars = draw_scenes(out, count, seed, build_config(SceneSettings, options, source="goal-ray scenes"))
    print(f"{count} scenes in {len(tars)} tars under {out} ({time.monotonic() - started:.1f} s)")


if __name__ == "__main__":
    run_main(main)
