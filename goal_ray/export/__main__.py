"""`goal-ray export RUN`, or `python -m goal_ray.export RUN`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main

DESCRIPTION = """Write a model as a folder for others, with a model card, README.md: how to load it, architecture,
start, settings, data, losses, retrieval metrics and cost, as far as the run folder knows them.

RUN is a run folder (its best checkpoint is taken, or its newest), one of its checkpoints, or any folder with a CLIP
that goal_ray, open_clip or transformers saved; the last is a conversion, whose card knows the architecture alone.

open_clip: for open_clip.create_model_and_transforms("local-dir:FOLDER")
hf: for transformers.CLIPModel.from_pretrained(FOLDER), with tokenizer and image processor; what CLIPModel cannot
  express is refused

The folder appears complete or not at all. Evaluate before you export: the card shows what `goal-ray evaluate` measured
of this checkpoint."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, exports, says where the folder is."""
    command = parser("export", DESCRIPTION, "goal-ray export runs/goal --format hf", {"RUN": "model to export"})
    command.add_argument(
        "--format", choices=("open_clip", "hf"), default="open_clip", help="whose layout (default: %(default)s)"
    )
    command.add_argument(
        "--out", metavar="FOLDER", help="a new folder (default: RUN/export/FORMAT; needed where RUN is no run)"
    )
    options = command.parse_args(arguments)
    from goal_ray.export.run import export  # after --help: torch takes seconds

    print(f"{options.format} model: {export(options.run, options.format, options.out)}")


if __name__ == "__main__":
    run_main(main)
