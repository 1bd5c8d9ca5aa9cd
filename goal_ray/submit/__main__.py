"""`goal-ray submit STAGE ...`, or `python -m goal_ray.submit STAGE ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from goal_ray.cli import parser, run_main
from goal_ray.errors import StageError
from goal_ray.submit.run import JobFollower, runtime_environment

STAGES = ("lism", "train", "evaluate", "export", "scenes", "shards", "report")
DESCRIPTION = """Run a stage as a job on a Ray cluster: what `ray job submit -- python -m goal_ray.STAGE ...` does.

Sends the working folder (without what .gitignore names), shows the job's output until it ends, and fails where the job
fails. Ctrl-C stops the showing, not the job. Options stand before the stage, the stage's own arguments behind it; paths
among them are the cluster's, relative ones those of the working folder's copy.

The token is taken from RAY_AUTH_TOKEN or ~/.ray/auth_token, with RAY_AUTH_MODE=token; it is never part of the job."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, submits, follows."""
    example = "goal-ray submit --name goal-1 train configs/docci_vit_b16.yaml workers=8 storage_path=/mnt/runs"
    command = parser("submit", DESCRIPTION, example, {})
    command.add_argument("--address", default="http://127.0.0.1:8265", help="the cluster's dashboard (%(default)s)")
    command.add_argument(
        "--working-dir", type=Path, default=Path(), help="folder that the job runs in a copy of (here)"
    )
    command.add_argument("--runtime-env", type=Path, help="YAML file with more of Ray's runtime environment")
    command.add_argument("--name", help="the job's id; one that is taken is refused (Ray makes one up)")
    command.add_argument(
        "--gpus",
        type=float,
        default=0,
        help="GPUs for the stage's own process, such as evaluate's; the workers of lism and train have their own (0)",
    )
    command.add_argument("--no-wait", action="store_true", help="return at once")
    command.add_argument("stage", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the stage's arguments")
    options = command.parse_args(arguments)
    runtime_env = runtime_environment(options.working_dir.absolute(), options.runtime_env)
    follower = JobFollower(options.address)
    entry = ["python", "-m", f"goal_ray.{options.stage}", *options.arguments]
    job = follower.submit(entry, runtime_env, options.name, options.gpus)
    how = f"ray job status|logs|stop --address {options.address} {job}"
    print(f"job {job}: {how}", file=sys.stderr)
    if options.no_wait:
        return
    try:
        status = follower.follow(job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        print(f"\njob {job} goes on: {how}", file=sys.stderr)
        raise SystemExit(130) from None
    if status != "SUCCEEDED":
        raise StageError(f"job {job}: {status.lower()}")
    print(f"job {job} succeeded", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
