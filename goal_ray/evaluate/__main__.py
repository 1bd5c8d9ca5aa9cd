"""`goal-ray evaluate CHECKPOINT SHARDS`, or `python -m goal_ray.evaluate CHECKPOINT SHARDS`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.evaluate.run import evaluate, print_table

DESCRIPTION = """Measure retrieval: recall at 1, 5, 25 and 50 and the median rank, from text to image and back.

CHECKPOINT is a run folder (its newest checkpoint is taken), a checkpoint or exported folder, or an open_clip
architecture with --weights. Every sample's caption must find its own picture among all pictures of SHARDS. Ties count
against the model. The similarity matrix is never held whole."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, evaluates, prints the table."""
    positionals = {"CHECKPOINT": "model to evaluate", "SHARDS": "folder, file, glob or brace pattern of tars"}
    command = parser("evaluate", DESCRIPTION, "goal-ray evaluate runs/goal shards/test/", positionals)
    command.add_argument("--weights", help="pretrained tag or weights file, for an open_clip architecture")
    command.add_argument("--batch", type=int, default=64, help="samples per forward pass (default: %(default)s)")
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--out", help="JSON file (default: RUN/evaluation/NAME_OF_SHARDS.json for a run folder)")
    command.add_argument(
        "--max-bad-share",
        type=float,
        default=0.01,
        help="fail above this share of unusable samples (default: %(default)s)",
    )
    options = command.parse_args(arguments)
    result = evaluate(
        options.checkpoint,
        options.shards,
        options.weights,
        options.batch,
        options.device,
        options.out,
        options.max_bad_share,
    )
    print_table(result)


if __name__ == "__main__":
    run_main(main)
