"""What a finished run came to: result.json, and the checkpoint that it stands for."""

import json
from pathlib import Path
from typing import Any

from goal_ray.storage import write_bytes
from goal_ray.train.checkpoint import checkpoint_folder, checkpoint_folders, resolve_checkpoint

RESULT_FILE = "result.json"
EVALUATION_FOLDER = "evaluation"


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
