"""What happens in a run, for log collectors: one record each through Python's logging, with run, stage and shard.

With GOAL_RAY_LOG=json in its environment a stage writes them, and all other log records of its driver and workers, as
JSON lines to stderr, where Ray adds job, node, worker and task. Without it there are none: the progress line and the
messages around it say the same to people.
"""

import logging
import os
import sys
from typing import Any

from tqdm import tqdm


def wants_json() -> bool:
    """Whether log records are to be JSON lines."""
    return os.environ.get("GOAL_RAY_LOG") == "json"


def say(stage: str, run: str, text: str) -> None:
    """Says on stderr what people should know of a run; as a log record where those are wanted."""
    if wants_json():
        event(stage, run, text, logging.WARNING)
    else:
        tqdm.write(text, file=sys.stderr)


def event(stage: str, run: str, message: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs what happened, where log records are wanted.

    run     the output folder of LISM, the run folder of a training
    fields  `shard`, `step` and whatever else belongs to it; plain values
    """
    if wants_json():
        logging.getLogger(f"goal_ray.{stage}").log(level, message, extra={"run": run, "stage": stage, **fields})
