"""One evaluation: model, shards, metrics, JSON."""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs

from goal_ray.errors import ConfigError, ModelError, StageError
from goal_ray.evaluate.embed import describe_skip, embed_shards
from goal_ray.model import ModelConfig, load_model
from goal_ray.retrieval import retrieval_metrics
from goal_ray.shards import expand_shards
from goal_ray.storage import write_bytes
from goal_ray.train.checkpoint import resolve_checkpoint

EVALUATION_FOLDER = "evaluation"
SKIPPED_SHOWN = 5


def evaluate(
    checkpoint: str,
    shards: str,
    weights: str | None = None,
    batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    max_bad_share: float = 0.01,
) -> dict[str, Any]:
    """Retrieval metrics of a model on shards, also written as JSON (see `result_place`).

    checkpoint  a run folder (its newest checkpoint), a checkpoint or exported folder, or an open_clip architecture
    weights     for an architecture: a pretrained tag or a file
    batch       samples per forward pass; the metrics do not depend on it

    Beside the metrics the result has `pictures` and `captions`, how many of each are different; `repeated`, samples
    that say what an earlier one said, and are left out; and `skipped`, the bad ones. Raises StageError when more than
    `max_bad_share` of the samples cannot be used, where a damaged tar counts as one.
    """
    began = time.perf_counter()
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, not {batch}")
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share must be between 0 and 1, not {max_bad_share}")
    urls = expand_shards(shards)
    device = usable_device(device)
    name = resolve_model(checkpoint, weights)
    place = result_place(checkpoint, shards, out)
    if place is not None:
        claim_place(place)
    found = embed_shards(load_model(ModelConfig(name, weights)), urls, batch, device, threads=os.cpu_count() or 1)
    total = found.samples + len(found.skipped)
    if len(found.skipped) > max_bad_share * total:
        raise StageError(
            f"{len(found.skipped)} of {total} samples could not be used (allowed share {max_bad_share}); "
            f"the first: {describe_skip(found.skipped[0])}"
        )
    image_IE, text_TE, pairs_P2 = (part.to(device) for part in (found.image_IE, found.text_TE, found.pairs_P2))
    result = {
        "model": name,
        "shards": shards,
        **retrieval_metrics(image_IE, text_TE, pairs_P2=pairs_P2),
        "pictures": len(image_IE),
        "captions": len(text_TE),
        "repeated": found.samples - len(pairs_P2),
        "skipped": found.skipped,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if place is not None:
        write_bytes(place, json.dumps(result, indent=2, ensure_ascii=False).encode())
    return result


def usable_device(name: str | None) -> str:
    """The device to run on; by default a GPU where there is one. Raises ConfigError for one that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).float().sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}; use cpu, or cuda on a GPU") from None
    return name


def resolve_model(checkpoint: str, weights: str | None) -> str:
    """The name that `load_model` takes. Raises StageError, and ModelError for an architecture without weights."""
    if os.path.isdir(checkpoint) or ("/" in checkpoint and not checkpoint.endswith(".json")):
        if os.path.isfile(checkpoint):
            raise StageError(f"{checkpoint}: not a folder; for a weights file give ARCHITECTURE --weights {checkpoint}")
        return str(resolve_checkpoint(Path(checkpoint)))
    if weights is None:
        raise ModelError(
            f"{checkpoint!r} is no folder, and as an open_clip architecture its weights would be random; "
            "mend the path, or name a pretrained tag or a file with --weights"
        )
    return checkpoint


def result_place(checkpoint: str, shards: str, out: str | None) -> str | None:
    """Where the JSON goes: `out`; for a run folder by default RUN/evaluation/NAME.json, else nowhere.

    NAME is the last part of `shards` that holds more than signs of a pattern: `test` for `docci/test/*.tar`.
    """
    if out is not None or not (Path(checkpoint) / "checkpoints").is_dir():
        return out
    parts = [re.sub(r"[^\w.-]+", "_", part.removesuffix(".tar")).strip("._-") for part in shards.split("/")]
    stem = next(filter(None, reversed(parts)), "shards")
    return str(Path(checkpoint) / EVALUATION_FOLDER / f"{stem}.json")


def claim_place(place: str) -> None:
    """Refuses a place where no file can be written before the work is done, not after it. Raises ConfigError."""
    fs, path = url_to_fs(place)
    try:
        if fs.isdir(path):
            raise IsADirectoryError("it is a folder")
        fs.makedirs(fs._parent(path), exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{place}: cannot write the JSON file there: {error}; choose another --out") from None


def print_table(result: dict[str, Any]) -> None:
    """Prints the metrics of both directions, and on stderr why samples were skipped."""
    names = list(result["text_to_image"])
    repeated = f"{result['repeated']} repeated, " if result["repeated"] else ""
    print(
        f"{result['count']} pairs of {result['pictures']} pictures and {result['captions']} captions; "
        f"{repeated}{len(result['skipped'])} skipped"
    )
    print(f"{'':<16}" + "".join(f"{name:>13}" for name in names))
    for direction in ("text_to_image", "image_to_text"):
        print(f"{direction.replace('_', ' '):<16}" + "".join(f"{result[direction][name]:>13.2f}" for name in names))
    for record in result["skipped"][:SKIPPED_SHOWN]:
        print(f"skipped: {describe_skip(record)}", file=sys.stderr)
    if len(result["skipped"]) > SKIPPED_SHOWN:
        print(f"skipped: {len(result['skipped']) - SKIPPED_SHOWN} more; --out FILE lists them all", file=sys.stderr)
