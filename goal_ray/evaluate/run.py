"""One evaluation: model, shards, metrics, JSON."""

import json
import os
import re
import sys
import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from goal_ray.atomic import write_bytes
from goal_ray.bad_samples import describe_bad, most_frequent
from goal_ray.checkpoints import CHECKPOINTS_FOLDER, refuse_damaged
from goal_ray.cores import usable_cores
from goal_ray.errors import ConfigError, ModelError, StageError
from goal_ray.evaluate.embed import embed_shards
from goal_ray.metric_names import METRICS, is_rank
from goal_ray.model import load_model, usable_device
from goal_ray.patience import patiently
from goal_ray.precision import Precision
from goal_ray.retrieval import retrieval_metrics
from goal_ray.run_folder import EVALUATION_FOLDER, best_checkpoint
from goal_ray.settings import ModelConfig
from goal_ray.shard_urls import expand_shards
from goal_ray.storage import file_system, kind

SKIPPED_SHOWN = 5


def evaluate(
    checkpoint: str,
    shards: str,
    weights: str | None = None,
    batch: int = 64,
    device: str | None = None,
    out: str | None = None,
    max_bad_share: float = 0.01,
    pairs: int = 0,
    threads: int | None = None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Retrieval metrics of a model on shards, also written as JSON (see `result_place`).

    checkpoint  a run folder (its best checkpoint, or its newest), a checkpoint or exported folder, or an open_clip
                architecture
    weights     for an architecture: a pretrained tag or a file
    batch       samples per forward pass; the metrics do not depend on it, but for rounding in bf16 and fp16
    pairs       also measures so many pairs of every sample, the best by its KEY.pairs.json: `local`, sentences among
                all these regions and back, and `joint`, where captions and sentences search pictures and regions alike

    threads     that decode pictures (default: one for each core)
    precision   the towers' format; embeddings are compared in float32

    Beside the metrics the result has `pictures` and `captions`, how many of each are different; `repeated`, samples
    that say what an earlier one said, and are left out; and `skipped`, the bad ones. Raises StageError when more than
    `max_bad_share` of the samples cannot be used, where a damaged tar counts as one.
    """
    began = time.perf_counter()
    if batch < 1:
        raise ConfigError(f"batch must be at least 1, not {batch}")
    if pairs < 0:
        raise ConfigError(f"pairs must not be negative (got {pairs})")
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share must be between 0 and 1, not {max_bad_share}")
    urls = expand_shards(shards)
    device = usable_device(device)
    name = resolve_model(checkpoint, weights)
    place = result_place(checkpoint, shards, out, precision)
    if place is not None:
        claim_place(place)
    refuse_damaged(Path(name))
    title = f"evaluate {Path(checkpoint).absolute().name}"
    loaded, threads = load_model(ModelConfig(name, weights)), threads or usable_cores()
    found = embed_shards(loaded, urls, batch, device, threads, pairs, title, precision)
    total = found.samples + len(found.skipped)
    if len(found.skipped) > max_bad_share * total:
        raise StageError(
            f"{len(found.skipped)} of {total} samples could not be used (allowed share {max_bad_share}); "
            f"{most_frequent(found.skipped)}; mend them, or allow a larger share with --max-bad-share"
        )
    if pairs and len(found.local_P2) == 0:
        raise StageError(f"{shards}: no sample has a pair of sentence and region; leave out --pairs")

    def measure(*pairs_P2: torch.Tensor) -> dict[str, Any]:
        found_P2 = torch.cat(pairs_P2).unique(dim=0)
        try:
            image_IE, text_TE = found.image_IE.to(device), found.text_TE.to(device)
            return retrieval_metrics(image_IE, text_TE, pairs_P2=found_P2.to(device))
        except torch.OutOfMemoryError:  # what the model's passes took hours for is not lost
            return retrieval_metrics(found.image_IE, found.text_TE, pairs_P2=found_P2)

    result = {
        "model": name,
        "shards": shards,
        **measure(found.pairs_P2),
        **({"local": measure(found.local_P2), "joint": measure(found.pairs_P2, found.local_P2)} if pairs else {}),
        "pictures": len(found.pairs_P2[:, 0].unique()),
        "captions": len(found.pairs_P2[:, 1].unique()),
        "repeated": found.samples - len(found.pairs_P2),
        "skipped": found.skipped,
        "device": device,
        "precision": precision,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if place is not None:
        write_bytes(place, json.dumps(result, indent=2, ensure_ascii=False).encode())
    return result


def resolve_model(checkpoint: str, weights: str | None) -> str:
    """The name that `load_model` takes. Raises StageError, and ModelError for an architecture without weights."""
    if os.path.isdir(checkpoint) or ("/" in checkpoint and not checkpoint.endswith(".json")):
        if os.path.isfile(checkpoint):
            raise StageError(f"{checkpoint}: not a folder; for a weights file give ARCHITECTURE --weights {checkpoint}")
        return str(best_checkpoint(Path(checkpoint)))
    if weights is None:
        raise ModelError(
            f"{checkpoint!r} is no folder, and as an open_clip architecture its weights would be random; "
            "mend the path, or name a pretrained tag or a file with --weights"
        )
    return checkpoint


def result_place(checkpoint: str, shards: str, out: str | None, precision: Precision = "fp32") -> str | None:
    """Where the JSON goes: `out`; for a run folder by default RUN/evaluation/NAME.json, else nowhere.

    NAME is the last part of `shards` that holds more than signs of a pattern: `test` for `docci/test/*.tar`, and
    `test-bf16` for that in another precision than fp32. Where a result of other shards has that name, a digest of these
    is added to it.
    """
    if out is not None or not (Path(checkpoint) / CHECKPOINTS_FOLDER).is_dir():
        return out
    parts = [re.sub(r"[^\w.-]+", "_", part.removesuffix(".tar")).strip("._-") for part in shards.split("/")]
    stem = next(filter(None, reversed(parts)), "shards") + (f"-{precision}" if precision != "fp32" else "")
    place = Path(checkpoint) / EVALUATION_FOLDER / f"{stem}.json"
    if place.exists() and read_shards(place) != shards:
        place = place.with_name(f"{stem}-{blake2b(shards.encode(), digest_size=4).hexdigest()}.json")
    return str(place)


def read_shards(place: Path) -> str | None:
    """The shards that a result is of; None for a file that does not tell."""
    with suppress(ValueError, TypeError, KeyError):
        return str(json.loads(place.read_text(encoding="utf-8"))["shards"])
    return None


def claim_place(place: str) -> None:
    """Refuses a place where no file can be written before the work is done, not after it. Raises ConfigError."""
    fs, path = file_system(place)
    try:
        if kind(place) == "directory":
            raise IsADirectoryError("it is a folder")
        patiently(lambda: fs.makedirs(fs._parent(path), exist_ok=True), place)
    except OSError as error:
        raise ConfigError(f"{place}: cannot write the JSON file there: {error}; choose another --out") from None


def print_table(result: dict[str, Any]) -> None:
    """Prints the metrics of both directions, and on stderr why samples were skipped."""
    repeated = f"{result['repeated']} repeated, " if result["repeated"] else ""
    print(
        f"{result['count']} pairs of {result['pictures']} pictures and {result['captions']} captions; "
        f"{repeated}{len(result['skipped'])} skipped; on {result['device']} in {result['seconds']} s"
    )
    rows = {"text → image": result["text_to_image"], "image → text": result["image_to_text"]}
    if "local" in result:
        local, joint = result["local"], result["joint"]
        rows |= {"sentence → region": local["text_to_image"], "region → sentence": local["image_to_text"]}
        rows |= {"joint, text → image": joint["text_to_image"], "joint, image → text": joint["image_to_text"]}
    names = [name for name in METRICS if any(name in shares for shares in rows.values())]
    print(f"{'':<22}" + "".join(f"{name.removesuffix('_rank'):>9}" for name in names))
    digits = {name: 1 if is_rank(name) else 2 for name in names}  # a rank is whole, or half of two
    for title, shares in rows.items():
        cells = (f"{shares[name]:>9.{digits[name]}f}" if name in shares else f"{'–':>9}" for name in names)
        print(f"{title:<22}" + "".join(cells))
    for record in result["skipped"][:SKIPPED_SHOWN]:
        print(f"skipped: {describe_bad(record)}", file=sys.stderr)
    if len(result["skipped"]) > SKIPPED_SHOWN:
        print(f"skipped: {len(result['skipped']) - SKIPPED_SHOWN} more; --out FILE lists them all", file=sys.stderr)
