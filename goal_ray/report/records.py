"""What a run folder holds, read back and checked."""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from goal_ray.config import load_config
from goal_ray.errors import StageError
from goal_ray.jsonl import read_records
from goal_ray.lism.run import SUMMARY_FILE
from goal_ray.patience import patience
from goal_ray.run_folder import (
    CONFIG_FILE,
    COST_FILE,
    EVALUATION_FOLDER,
    HISTORY_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    read_result,
)
from goal_ray.storage import join, read_bytes
from goal_ray.train.config import TrainConfig


class Ranking(NamedTuple):
    """What is ranked, and its two directions, in words."""

    title: str
    text_to_image: str
    image_to_text: str


# By the name under which an evaluation stores them.
RANKINGS = {
    "": Ranking("captions and pictures", "text → image", "image → text"),
    "local": Ranking("sentences and regions", "sentence → region", "region → sentence"),
    "joint": Ranking("both together", "joint, text → image", "joint, image → text"),
}


def metric_title(metric: str) -> str:
    """A metric of the history in words: `local.text_to_image.R@1` is sentence → region R@1."""
    *ranking, direction, name = metric.split(".")
    return f"{getattr(RANKINGS[''.join(ranking)], direction)} {name.replace('_', ' ')}"


@dataclass(frozen=True)
class Retrieval:
    """One ranking; each direction maps R@K and mAP (percent) and median_rank to a value."""

    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    count: int


@dataclass(frozen=True)
class Evaluation:
    """What `goal-ray evaluate` stored: captions and pictures; with pairs, sentences and regions, and all together."""

    model: str
    shards: str
    text_to_image: dict[str, float]
    image_to_text: dict[str, float]
    count: int
    skipped: list[dict[str, str]]
    precision: str = "fp32"
    local: Retrieval | None = None
    joint: Retrieval | None = None

    @property
    def rankings(self) -> dict[str, Retrieval]:
        """Those of RANKINGS that were measured."""
        whole = Retrieval(self.text_to_image, self.image_to_text, self.count)
        found = {"": whole, "local": self.local, "joint": self.joint}
        return {name: ranking for name, ranking in found.items() if ranking is not None}


@dataclass(frozen=True)
class LismSummary:
    """What LISM made of the shards · reasons: stage and kind of reason -> samples in the quarantine."""

    samples: int
    quarantined: int
    reasons: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RunRecords:
    """One run.

    name         told apart from the other runs
    config_yaml  the resolved config as stored
    metrics      log records, oldest first; empty before the first log line
    history      of every checkpoint that was evaluated while the run trained: its step and metrics by dotted names
    best_step    of the checkpoint that training chose; None before its end, and without evaluations
    cost         what the run has cost so far, as stored; empty where that is not known
    quarantine   a record for every bad sample
    """

    name: str
    folder: Path
    config: TrainConfig
    config_yaml: str
    metrics: list[dict[str, Any]]
    history: list[dict[str, Any]]
    best_step: int | None
    evaluations: list[Evaluation]
    cost: dict[str, Any]
    quarantine: list[dict[str, Any]]

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and value, by `evaluation.metric`, of the checkpoint that training chose, or would choose of these.

        None before the first evaluation.
        """
        metric = self.config.evaluation.metric
        values = {record["step"]: record[metric] for record in self.history if metric in record}
        if self.best_step is not None and self.best_step in values:  # a better one may have been damaged
            return self.best_step, values[self.best_step]
        sign = -1 if self.config.evaluation.lower_is_better else 1
        return max(sorted(values.items()), key=lambda item: sign * item[1], default=None)


PATIENCE_S = 5.0  # for a storage without which there is a report, too
_EVALUATION = TypeAdapter(Evaluation)
_LISM = TypeAdapter(LismSummary)


def read_runs(folders: Sequence[str]) -> list[RunRecords]:
    """The runs in the order given, each once; named by folder, or by path where two folders share a name.

    Raises StageError or ConfigError, naming the file, for a folder that is no run or a file that is damaged.
    """
    paths = {os.path.abspath(folder): Path(folder) for folder in folders}
    names = [Path(path).name for path in paths]
    unique = len(set(names)) == len(names)
    return [read_run(path, name if unique else str(path)) for name, path in zip(names, paths.values(), strict=True)]


def read_run(folder: Path, name: str) -> RunRecords:
    """One run folder. Raises as `read_runs` does."""
    if not folder.is_dir():
        raise StageError(f"{folder}: no such run folder; give the folder that `goal-ray train` made, STORAGE_PATH/NAME")
    for file in (CONFIG_FILE, METRICS_FILE):
        if not (folder / file).is_file():
            raise StageError(
                f"{folder}: no run, it has no {file}; give the folder that `goal-ray train` made, STORAGE_PATH/NAME"
            )
    return RunRecords(
        name,
        folder,
        load_config(TrainConfig, folder / CONFIG_FILE),
        (folder / CONFIG_FILE).read_text(encoding="utf-8"),
        read_records(folder / METRICS_FILE, ("step", "total_steps", "loss", "seconds")),
        read_records(folder / HISTORY_FILE, ("step",)),
        read_result(folder).get("best_step"),
        [read_evaluation(path) for path in sorted((folder / EVALUATION_FOLDER).glob("*.json"))],
        read_object(folder / COST_FILE),
        read_records(folder / QUARANTINE_FILE, ("shard", "stage", "reason")),
    )


def read_evaluation(path: Path) -> Evaluation:
    """One evaluation. Raises StageError for a file that `goal-ray evaluate` did not write."""
    try:
        return _EVALUATION.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StageError(
            f"{path}: not an evaluation: {place + ': ' if place else ''}{first['msg']}; "
            "make it again with `goal-ray evaluate`, or delete it"
        ) from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing. Raises StageError for anything else."""
    if not path.is_file():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StageError(f"{path}: not JSON ({error}); delete the file to go on without it") from None
    if not isinstance(tree, dict):
        raise StageError(f"{path}: not a JSON object; delete the file to go on without it")
    return tree


def read_lism_summary(shards: str) -> LismSummary | None:
    """LISM's summary that lies beside shards, as a run's settings name them; None where there is none to be read."""
    names_files = re.search(r"(\.tar|[*?\[{][^/]*)$", shards)
    folder = (shards.rpartition("/")[0] or ".") if names_files else shards
    try:
        with patience(PATIENCE_S):
            return _LISM.validate_json(read_bytes(join(folder, SUMMARY_FILE)))
    # Of other shards, of another version, or on a storage that is out of reach, each with errors of its own.
    except Exception:
        return None
