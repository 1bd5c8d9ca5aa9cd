"""What a failed attempt to train died of, found in the errors that Ray wraps it into."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goal_ray.errors import GoalRayError, StageError


class WorkerDied(StageError):
    """A worker's process or node is gone; a new attempt may go on."""


def own_error(error: BaseException, run_dir: Path) -> BaseException:
    """What to raise for Ray's error: a worker's GoalRayError, a WorkerDied for its death, else its own error."""
    from ray.exceptions import RayActorError

    inside = list(unwrapped(error))
    for cause in inside:
        if isinstance(cause, GoalRayError):
            return cause
    for cause in inside:
        if isinstance(cause, RayActorError):
            return WorkerDied(
                f"a training worker died ({first_line(cause)}); the memory may have run out: set `chunk` below "
                "batch_per_worker, or step.checkpoint_activations=true, then go on with --resume; Ray's logs say more; "
                f"run folder: {run_dir}"
            )
    for cause in inside:
        if type(cause).__name__.startswith("WorkerGroupStartup"):
            return WorkerDied(f"the workers could not be started ({first_line(cause)}); run folder: {run_dir}")
    # A worker whose peer died may tell of it first, as an error of the collective that it waited in.
    # An AcceleratorError is a GPU's own, after which its process is of no use.
    kinds = re.compile("RuntimeError|AcceleratorError|Dist.*Error")
    return next((cause for cause in inside if kinds.fullmatch(type(cause).__name__)), error)


def first_line(error: BaseException) -> str:
    """The beginning of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The error and all that Ray wrapped into it."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        waiting += [getattr(current, name, None) for name in ("cause", "health_check_failure", "controller_failure")]
        waiting += list(getattr(current, "worker_failures", {}).values())
