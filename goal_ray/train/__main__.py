"""`goal-ray train CONFIG`, or `python -m goal_ray.train CONFIG`."""

from collections.abc import Sequence

from goal_ray.cli import parser, run_main
from goal_ray.config import load_config
from goal_ray.train.config import TrainConfig
from goal_ray.train.run import train

DESCRIPTION = """Fine-tune a CLIP with GOAL on paired shards (from `goal-ray lism`).

Runs on the Ray cluster of RAY_ADDRESS, which every `ray job submit` sets, or on a private one on this machine. The run
folder, STORAGE_PATH/NAME, gets config.yaml, metrics.jsonl, tensorboard/, checkpoints/, cost.json and, at the end,
model/: a folder that plain open_clip loads as `local-dir:...`. With evaluation.shards every checkpoint is evaluated
beside the training, and model/ is the best one.

Workers that die are started again from the newest checkpoint. SIGTERM and Ctrl-C make the run save a checkpoint and
end; --resume goes on with it, as it does after a kill, mid-epoch, with the samples that an undisturbed run would have
seen."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, says where the model is."""
    example = "goal-ray train configs/docci_vit_b16.yaml data.shards=paired/ workers=4"
    command = parser("train", DESCRIPTION, example, {"CONFIG": "YAML file with the settings below"}, TrainConfig)
    command.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    command.add_argument(
        "--resume-if-exists",
        action="store_true",
        help="the same where the run exists, else start it: for jobs that retry",
    )
    options = command.parse_intermixed_args(arguments)
    resume = None if options.resume_if_exists else options.resume
    result = train(load_config(TrainConfig, options.config, options.settings), resume)
    best = "" if result.best_step is None else f", as of step {result.best_step}, the best"
    print(f"trained {result.steps} steps in {result.seconds:.0f} s; model: {result.model_dir}{best}")
    print(f"cost: {result.cost}")


if __name__ == "__main__":
    run_main(main)
