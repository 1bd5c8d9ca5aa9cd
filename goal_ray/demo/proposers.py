"""`python -m goal_ray.demo.proposers FOLDER`: what each region proposer finds on drawn scenes, and how fast."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from goal_ray.atomic import write_bytes
from goal_ray.cli import parser, run_main
from goal_ray.config import load_config
from goal_ray.demo.accuracy import lism_accuracy
from goal_ray.lism.config import LismConfig
from goal_ray.lism.run import run_lism
from goal_ray.ray_session import ray_session

DESCRIPTION = """Compare region proposers with the truth of drawn scenes, matched by one CLIP.

SCENES is a tar, or a folder of tars, that `goal-ray scenes` drew; OUT gets a folder of paired tars for each proposer,
and proposers.json. Prints for each: regions per picture; how many of the objects have a region with IoU >= 0.5; how
many of the sentences got one; pictures per second of a single actor, on one core where there is no GPU. Runs again
where it was interrupted."""
DEFAULT = ("name=felzenszwalb", "name=grid")


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, compares, prints, writes."""
    example = (
        "python -m goal_ray.demo.proposers demo/seed-0/scenes/train/scenes-000000.tar proposers "
        'matcher.model.name=demo/seed-0/runs/start/model --proposer "name=sam checkpoint=mobile_sam.pt"'
    )
    places = {"SCENES": "drawn tars", "OUT": "folder for what comes out"}
    command = parser("proposers", DESCRIPTION, example, places, LismConfig, "python -m goal_ray.demo.proposers")
    command.add_argument(
        "--proposer",
        metavar="SETTINGS",
        action="append",
        help=f"settings of a proposer, as key=value words; may be given often (default: {', '.join(DEFAULT)})",
    )
    options = command.parse_intermixed_args(arguments)
    rows = compare(options.scenes, options.out, options.proposer or DEFAULT, options.settings)
    write_bytes(str(Path(options.out) / "proposers.json"), json.dumps(rows, indent=1).encode())
    print(f"{'regions':>9}{'objects found':>15}{'sentences right':>17}{'images/s':>10}  proposer")
    for row in rows:
        shares = f"{100 * row['object_recall']:>13.1f} %{100 * row['right_region']:>15.1f} %"
        print(f"{row['regions_per_image']:>9.1f}{shares}{row['images_per_s']:>10.2f}  {row['proposer']}")


def compare(scenes: str, out: str, proposers: Sequence[str], settings: Sequence[str]) -> list[dict[str, Any]]:
    """{"proposer", "images", "regions_per_image", "images_per_s", accuracy} for each proposer, as `key=value` words."""
    rows = []
    with ray_session(busy_cpus=2):
        for number, words in enumerate(proposers):
            overrides = [f"proposer.{word}" for word in shlex.split(words)]
            config = load_config(LismConfig, None, [*settings, *overrides])
            paired = str(Path(out).absolute() / f"{number}-{config.proposer.name}")
            summary = run_lism(scenes, paired, config)
            phases = [summary["work"][phase] for phase in ("encode", "propose") if phase in summary["work"]]
            rows.append(
                {
                    "proposer": words,
                    "images": summary["paired"],
                    "regions_per_image": summary["regions_per_image"],
                    "images_per_s": summary["paired"] / sum(phase["seconds"] for phase in phases),
                    **asdict(lism_accuracy(paired)),
                }
            )
    return rows


if __name__ == "__main__":
    run_main(main)
