"""`goal-ray lism IN OUT`, or `python -m goal_ray.lism IN OUT`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.config import load_config
from goal_ray.lism.config import LismConfig
from goal_ray.lism.counts import print_summary
from goal_ray.lism.run import run_lism
from goal_ray.storage import join

DESCRIPTION = """Match each sentence of every caption to a region of its picture (LISM).

IN is a folder, file, glob or brace pattern of WebDataset tars with KEY.jpg|jpeg|png|webp and KEY.txt. OUT gets one tar
of the same name for each, its members unchanged plus KEY.pairs.json. A sample that cannot be used goes to
OUT/quarantine with the reason. OUT/gallery.html shows what came out: numbers, and random, best and worst pairs. Run
the same command again after an interruption: only what is missing is done, and tars whose size has changed. For tars
that were replaced by others of the same size, which the padding of small tars makes likely, use a new OUT."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, runs LISM, prints the summary."""
    example = "goal-ray lism shards/ paired/ proposer.name=sam proposer.checkpoint=sam_vit_b_01ec64.pth"
    positionals = {"IN": "tars to read", "OUT": "folder for paired tars; any storage fsspec reaches"}
    command = parser("lism", DESCRIPTION, example, positionals, LismConfig)
    command.add_argument("--config", metavar="FILE", help="YAML file with the settings below")
    command.add_argument(
        "--retry-quarantined", action="store_true", help="also do the samples in OUT/quarantine again, and only them"
    )
    options = command.parse_intermixed_args(arguments)
    config = load_config(LismConfig, options.config, options.settings)
    result = run_lism(getattr(options, "in"), options.out, config, options.retry_quarantined)
    print_summary(result)
    if result["gallery"]:
        print(f"pairs as pictures: {join(options.out, result['gallery'])}")


if __name__ == "__main__":
    run_main(main)
