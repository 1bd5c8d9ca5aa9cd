"""`goal-ray report RUN [RUN ...]`, or `python -m goal_ray.report RUN [RUN ...]`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.report.run import write_report

DESCRIPTION = """Write one HTML page about training runs: settings, curves, cost, retrieval metrics, pictures.

RUN is a folder that `goal-ray train` made; several runs are drawn over each other, each in a colour of its own. Metrics
come from RUN/evaluation/, which `goal-ray evaluate RUN SHARDS` fills, and over the steps from the checkpoints that were
evaluated during the training (`evaluation.shards`). The pictures are a sample of the paired shards that the last run
with local pairs was trained on; each sentence has the colour of its region. The page holds all it shows and loads
nothing, so it can be mailed and read offline. It can be written while a run still goes on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, writes the page, says where it is."""
    command = parser("report", DESCRIPTION, "goal-ray report runs/global runs/goal --out goal.html", {})
    command.add_argument("runs", metavar="RUN", nargs="+", help="run folder")
    command.add_argument("--out", metavar="FILE", help="the page (default: report.html in the last RUN)")
    command.add_argument("--shards", metavar="PAIRED", help="take the pictures from these paired shards instead")
    command.add_argument("--images", metavar="N", type=int, default=12, help="pictures (default: %(default)s)")
    command.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: %(default)s)")
    options = command.parse_args(arguments)
    page = write_report(options.runs, options.out, options.shards, options.images, options.seed)
    print(f"{page.url} ({page.size_bytes / 1e6:.1f} MB): runs {len(options.runs)}, pictures {page.pictures}")
    if page.note:
        print(f"no pictures: {page.note}")


if __name__ == "__main__":
    run_main(main)
