"""A run folder as training leaves it, with a tiny real model."""

import json
from pathlib import Path
from typing import Any

from tiny_architecture import shake

from goal_ray.checkpoints import OPTIMIZER_FILE, STATE_FILE
from goal_ray.config import load_config, to_yaml
from goal_ray.model import load_model, save_model
from goal_ray.train.config import TrainConfig


def write_checkpoint(run: Path, config: TrainConfig, step: int) -> Path:
    """A checkpoint with weights of its own."""
    loaded = load_model(config.model, seed=step)
    shake(loaded.clip, seed=step)
    folder = run / "checkpoints" / f"step-{step:08d}"
    save_model(folder, loaded, loaded.clip.state_dict())
    (folder / OPTIMIZER_FILE).write_bytes(b"not read by an export")
    (folder / STATE_FILE).write_text(json.dumps({"step": step}))
    return folder


def write_run(run: Path, *settings: str, steps: tuple[int, ...] = (20, 40)) -> Path:
    """A run with a checkpoint and a log line at each of the steps."""
    config = load_config(TrainConfig, None, ["data.shards=paired/train", *settings])
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    (run / "metrics.jsonl").write_text("".join(json.dumps(log_line(step)) + "\n" for step in steps))
    (run / "shards.json").write_text(json.dumps({"a.tar": 30, "b.tar": 12}))
    for step in steps:
        write_checkpoint(run, config, step)
    return run


def log_line(step: int) -> dict[str, Any]:
    """A log line as training writes it."""
    terms = {"loss_global": 3 / step, "loss_local": 2 / step, "loss_tsl_image": 0.5, "loss_tsl_text": 0.25}
    return {"step": step, "total_steps": 40, "loss": 5 / step, **terms, "seconds": 2.0 * step}


def write_evaluation(run: Path, name: str, model: str, first: float) -> None:
    """An evaluation whose R@1 is `first`, as `goal-ray evaluate` writes it."""
    direction = {"R@1": first, "R@5": 30.0, "R@25": 60.0, "R@50": 80.0, "mAP": 20.0, "median_rank": 12.5}
    directions = {"text_to_image": direction, "image_to_text": direction}
    result = {"model": model, "shards": f"shards/{name}", **directions, "count": 100, "skipped": []}
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(result))
