"""A run folder's layout, and what a finished run came to. No torch, no Ray: all stages that read a run use it.

RUN/
  config.yaml             the settings as resolved            shards.json         usable samples by tar
  metrics.jsonl           a record every few steps            tensorboard/        the same as curves
  quarantine.jsonl        samples that were not usable        cost.json           what the run has cost so far
  checkpoints/step-N/     see `goal_ray.checkpoints`          evaluations.jsonl   of the checkpoints, by step
  result.json             how the run ended                   model/              the best or last checkpoint
  evaluation/NAME.json    of `goal-ray evaluate`              export/LAYOUT/      of `goal-ray export`
  driver.json             who trains, while it does
"""

import json
from pathlib import Path
from typing import Any

from goal_ray.atomic import write_bytes
from goal_ray.checkpoints import checkpoint_folder, checkpoint_folders, resolve_checkpoint

CONFIG_FILE = "config.yaml"
DRIVER_FILE = "driver.json"
SHARDS_FILE = "shards.json"
METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
QUARANTINE_FILE = "quarantine.jsonl"
COST_FILE = "cost.json"
HISTORY_FILE = "evaluations.jsonl"
RESULT_FILE = "result.json"
MODEL_FOLDER = "model"
EVALUATION_FOLDER = "evaluation"
EXPORT_FOLDER = "export"


def run_of(path: Path) -> Path | None:
    """The run folder that `path` is, or is a checkpoint of; None where it is neither."""
    return next((folder for folder in (path, path.parent.parent) if (folder / CONFIG_FILE).is_file()), None)


def read_result(run_dir: Path) -> dict[str, Any]:
    """What a run ended with: "steps", "seconds", "ending" and "best_step"; empty where it has not ended."""
    place = run_dir / RESULT_FILE
    return json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}


def write_result(run_dir: Path, steps: int, seconds: float, ending: str, best_step: int | None) -> None:
    """Stores what a run ended with, complete or not at all."""
    result = {"steps": steps, "seconds": round(seconds, 1), "ending": ending, "best_step": best_step}
    write_bytes(str(run_dir / RESULT_FILE), json.dumps(result).encode())


def best_checkpoint(path: Path) -> Path:
    """As `resolve_checkpoint`, but for a run whose evaluations found a best checkpoint: that one."""
    newest = resolve_checkpoint(path)
    step = read_result(path).get("best_step") if checkpoint_folders(path) else None
    best = None if step is None else checkpoint_folder(path, step)
    return best if best is not None and best.exists() else newest
