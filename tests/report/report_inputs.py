"""Real inputs of a report."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.tars import Sample, stream_samples, write_tar


def pair_by_truth(sample: Sample) -> PairRecord:
    """Every sentence on its object's box; sentences about the scene on the whole image."""
    truth = json.loads(sample.members["json"])
    width, height = truth["size"]
    regions = [Region((0.0, 0.0, float(width), float(height)), 1.0, "image")]
    regions += [Region(tuple(thing["box"]), 1.0, "truth") for thing in truth["objects"]]
    sentences, pairs = [], []
    for number, sentence in enumerate(truth["sentences"]):
        sentences.append((sentence["start"], sentence["end"]))
        region = 0 if sentence["object"] is None else sentence["object"] + 1
        pairs.append(Pair(number, region, round(0.2 + 0.01 * number, 3)))
    return PairRecord((width, height), tuple(sentences), tuple(regions), tuple(pairs), {})


def write_paired(source: str, target: Path) -> None:
    """A tar of scenes with the pairs of the truth added."""

    def paired() -> Iterator[tuple[str, dict[str, bytes]]]:
        for sample in stream_samples(source):
            yield sample.key, {**sample.members, "pairs.json": pair_by_truth(sample).to_bytes()}

    write_tar(str(target), paired())


def log_record(step: int, **changes: Any) -> dict[str, Any]:
    """A log line as training leaves it."""
    return {
        "step": step,
        "total_steps": 40,
        "epoch": step / 10,
        "loss": 4.0 / step,
        "loss_global": 3.0 / step,
        "loss_local": 2.0 / step,
        "loss_tsl_image": 0.5 / step,
        "loss_tsl_text": 0.25 / step,
        "lr": 1e-4 / step,
        "grad_norm": None,
        "images_per_s": 100.0,
        "seconds": 2.0 * step,
        **changes,
    }


def add_evaluation(run: Path, name: str = "test", **changes: Any) -> None:
    """An evaluation as `goal_ray.evaluate` stores it."""
    direction = {"R@1": 10.0, "R@5": 30.0, "R@25": 60.0, "R@50": 80.0, "median_rank": 12.5}
    result = {
        "model": str(run / "checkpoints" / "step-00000040"),
        "shards": f"shards/{name}/",
        "text_to_image": direction,
        "image_to_text": direction,
        "count": 100,
        "pictures": 100,
        "captions": 100,
        "repeated": 0,
        "skipped": [],
        "seconds": 1.0,
        **changes,
    }
    (run / "evaluation").mkdir(exist_ok=True)
    (run / "evaluation" / f"{name}.json").write_text(json.dumps(result))


def add_history(run: Path, *records: dict[str, Any]) -> None:
    """Evaluations beside the training, as `evaluations.jsonl` keeps them."""
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def add_quarantine(run: Path, *records: tuple[str, str, str]) -> None:
    """The samples that training left out: (shard, stage, reason)."""
    lines = [dict(zip(("shard", "stage", "reason"), each, strict=True), key="k") for each in records]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def add_cost(run: Path, **changes: Any) -> None:
    """What a run cost, as training stores it."""
    cost = {
        "device": "NVIDIA H100",
        "workers": 8,
        "seconds": 5400.0,
        "gpu_hours": 12.0,
        "worker_hours": 12.0,
        "flops": 3.1e18,
        "mfu": 0.412,
        "images_per_s": 2345.6,
        "peak_memory_bytes": 3 * 2**30,
        "energy_joules": 7.2e6,
        **changes,
    }
    (run / "cost.json").write_text(json.dumps(cost))
