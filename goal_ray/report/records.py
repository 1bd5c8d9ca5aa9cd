"""What a run folder holds, read back and checked."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from goal_ray.config import load_config
from goal_ray.errors import StageError
from goal_ray.jsonl import read_records
from goal_ray.train.config import TrainConfig
from goal_ray.train.recorder import METRICS_FILE
from goal_ray.train.result import EVALUATION_FOLDER
from goal_ray.train.run import CONFIG_FILE
from goal_ray.train.scan import QUARANTINE_FILE


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
    local: Retrieval | None = None
    joint: Retrieval | None = None

    @property
    def rankings(self) -> dict[str, Retrieval]:
        """Each ranking by what it ranks."""
        whole = Retrieval(self.text_to_image, self.image_to_text, self.count)
        found = {"captions and pictures": whole, "sentences and regions": self.local, "both together": self.joint}
        return {name: ranking for name, ranking in found.items() if ranking is not None}


@dataclass(frozen=True)
class RunRecords:
    """One run.

    name         told apart from the other runs
    config_yaml  the resolved config as stored
    metrics      log records, oldest first; empty before the first log line
    quarantine   a record for every bad sample
    """

    name: str
    folder: Path
    config: TrainConfig
    config_yaml: str
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    quarantine: list[dict[str, Any]]


_EVALUATION = TypeAdapter(Evaluation)


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
        [read_evaluation(path) for path in sorted((folder / EVALUATION_FOLDER).glob("*.json"))],
        read_records(folder / QUARANTINE_FILE, ("stage", "reason")),
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
