"""One evaluation: model, shards, metrics, JSON."""

import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from goal_ray.errors import StageError
from goal_ray.evaluate.embed import embed_shards
from goal_ray.model import ModelConfig, load_model
from goal_ray.retrieval import retrieval_metrics
from goal_ray.shards import expand_shards
from goal_ray.storage import write_bytes
from goal_ray.train.checkpoint import resolve_checkpoint

EVALUATION_FOLDER = "evaluation"


def evaluate(
    checkpoint: str,
    shards: str,
    weights: str | None = None,
    batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    max_bad_share: float = 0.01,
) -> dict[str, Any]:
    """Retrieval metrics of a model on shards, also written as JSON.

    checkpoint  a run folder (its newest checkpoint), a checkpoint or exported folder, or an open_clip architecture
    weights     for an architecture: a pretrained tag or a file
    out         JSON file; for a run the default is RUN/evaluation/NAME_OF_SHARDS.json

    Raises StageError when more than `max_bad_share` of the samples cannot be used.
    """
    began = time.perf_counter()
    urls = expand_shards(shards)
    is_path = os.path.exists(checkpoint) or "/" in checkpoint
    name = str(resolve_checkpoint(Path(checkpoint))) if is_path else checkpoint
    loaded = load_model(ModelConfig(name, weights))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found = embed_shards(loaded, urls, batch, device, threads=os.cpu_count() or 1)
    total = len(found.keys) + len(found.skipped)
    if len(found.skipped) > max_bad_share * total:
        raise StageError(
            f"{len(found.skipped)} of {total} samples could not be used (allowed share {max_bad_share}); "
            f"the first: {found.skipped[0]}"
        )
    result = {
        "model": name,
        "shards": shards,
        **retrieval_metrics(found.image_NE.to(device), found.text_NE.to(device)),
        "skipped": found.skipped,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if out is None and (Path(checkpoint) / "checkpoints").is_dir():
        stem = Path(shards.rstrip("/")).name.removesuffix(".tar") or "shards"
        out = str(Path(checkpoint) / EVALUATION_FOLDER / f"{stem}.json")
    if out is not None:
        write_bytes(out, json.dumps(result, indent=2).encode())
    return result


def print_table(result: dict[str, Any]) -> None:
    """Prints the metrics of both directions."""
    names = list(result["text_to_image"])
    print(f"{result['count']} image-caption pairs, {len(result['skipped'])} skipped")
    print(f"{'':<16}" + "".join(f"{name:>13}" for name in names))
    for direction in ("text_to_image", "image_to_text"):
        print(f"{direction.replace('_', ' '):<16}" + "".join(f"{result[direction][name]:>13.2f}" for name in names))
