"""`goal-ray evaluate CHECKPOINT SHARDS`, or `python -m goal_ray.evaluate CHECKPOINT SHARDS`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.precision import NAMES

DESCRIPTION = """Measure retrieval: recall at 1, 5, 25 and 50 and mAP in percent, and the median rank, from text to
image and back. Recall at K is the share of captions (pictures) whose own picture (caption) is among the K most similar
of all in SHARDS. Ties count against the model. The similarity matrix is never held whole.

CHECKPOINT is a run folder (its best checkpoint is taken, or its newest), a checkpoint or exported folder, or an
open_clip architecture with --weights. SHARDS hold KEY.jpg|jpeg|png|webp and KEY.txt; other members do not matter.
Captions are read up to the model's context length.

With --pairs N the N best pairs of every sample (KEY.pairs.json of `goal-ray lism`) are measured too: sentences among
all these regions and back, and captions and sentences together among pictures and regions ("joint", as in the paper).

A sample that repeats picture and caption of another is left out. Where a picture has several captions, or a caption
several pictures, the best of its right answers counts. A sample that cannot be read is skipped and listed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, evaluates, prints the table."""
    positionals = {"CHECKPOINT": "model to evaluate", "SHARDS": "folder, file, glob or brace pattern of tars"}
    command = parser("evaluate", DESCRIPTION, "goal-ray evaluate runs/goal shards/test/", positionals)
    command.add_argument("--weights", metavar="W", help="pretrained tag or weights file, for an open_clip architecture")
    command.add_argument(
        "--batch", metavar="N", type=int, default=64, help="samples per forward pass (default: %(default)s)"
    )
    command.add_argument(
        "--pairs", metavar="N", type=int, default=0, help="pairs per sample to measure (default: %(default)s)"
    )
    command.add_argument(
        "--precision",
        choices=list(NAMES),
        default="fp32",
        help="the towers' format; bf16 is far faster where the hardware has it, and moves metrics by rounding "
        "(default: %(default)s)",
    )
    command.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument(
        "--out",
        metavar="FILE",
        help="JSON file with the numbers and the skipped samples (default: RUN/evaluation/NAME_OF_SHARDS.json for a "
        "run folder, else none)",
    )
    command.add_argument(
        "--max-bad-share",
        metavar="S",
        type=float,
        default=0.01,
        help="fail above this share of unusable samples (default: %(default)s)",
    )
    options = command.parse_args(arguments)
    from goal_ray.evaluate.run import evaluate, print_table, result_place  # after --help: torch takes seconds

    result = evaluate(
        options.checkpoint,
        options.shards,
        options.weights,
        options.batch,
        options.device,
        options.out,
        options.max_bad_share,
        options.pairs,
        precision=options.precision,
    )
    print_table(result)
    place = result_place(options.checkpoint, options.shards, options.out, options.precision)
    if place is not None:
        print(f"written to {place}")


if __name__ == "__main__":
    run_main(main)
