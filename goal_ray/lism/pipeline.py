"""The Ray Data pipeline: read and decode (CPU tasks) → propose (actors) → match (actors); rows come back in any order.

Rows carry a picture from decoding to matching and only its pairs after that. A row with `error` set passes every later
stage untouched. Columns: shard, sample (number within the shard), last (is it the shard's last), key, error; then
caption, pixels (RGB bytes), shape (H, W), size (W, H of the stored picture), regions, and finally pairs and counts.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from goal_ray.errors import CaptionError, GoalRayError, ShardError
from goal_ray.images import decode_image, shrink
from goal_ray.lism.config import LismConfig
from goal_ray.lism.matching import Matcher, MatchTask
from goal_ray.pairs import PairRecord, Region
from goal_ray.ray_session import quiet_ray_data
from goal_ray.regions import usable
from goal_ray.shards import Sample, shard_name, stream_samples
from goal_ray.text import split_sentences

Row = dict[str, Any]


def stream_rows(shards: list[str], config: LismConfig, provenance: dict[str, Any], use_gpu: bool) -> Iterator[Row]:
    """Runs the pipeline over shards; yields a row for every sample: `pairs` (bytes) or `error` (stage and reason)."""
    import ray.data
    from ray.data import ActorPoolStrategy

    quiet_ray_data(preserve_order=False)
    device = "cuda" if use_gpu else "cpu"
    resources = {"num_gpus": config.gpus_per_actor} if use_gpu else {"num_cpus": 1}
    items = [{"number": number, "url": url} for number, url in enumerate(shards)]
    dataset = (
        ray.data.from_items(items, override_num_blocks=len(items))
        .flat_map(lambda item: read_rows(item["number"], item["url"], config))
        .map_batches(
            ProposeRegions,
            fn_constructor_args=(config, device),
            batch_size=config.images_per_batch,
            compute=ActorPoolStrategy(min_size=config.proposer_actors[0], max_size=config.proposer_actors[1]),
            **resources,
        )
        .map_batches(
            MatchSentences,
            fn_constructor_args=(config, provenance, device),
            batch_size=config.images_per_batch,
            compute=ActorPoolStrategy(min_size=config.matcher_actors[0], max_size=config.matcher_actors[1]),
            **resources,
        )
    )
    yield from dataset.iter_rows()


def read_rows(shard: int, url: str, config: LismConfig) -> Iterator[Row]:
    """Decoded rows of one tar. Its last row says so, that the shard's end is known downstream."""
    held: Row | None = None
    number = 0
    try:
        for sample in stream_samples(url):
            if held is not None:
                yield held
            held = decode_row(empty_row(shard, number, sample.key), sample, config)
            number += 1
    except ShardError as error:
        if held is not None:
            yield held
        held = failed(empty_row(shard, number, error.key), "read", error)
    if held is None:
        held = failed(empty_row(shard, 0, ""), "read", ShardError(f"{shard_name(url)} holds no sample"))
    yield {**held, "last": True}


def empty_row(shard: int, sample: int, key: str) -> Row:
    """A row with every column, so that all blocks have one schema."""
    return {
        "shard": shard,
        "sample": sample,
        "last": False,
        "key": key,
        "error": "",
        "caption": "",
        "pixels": b"",
        "shape": [0, 0],
        "size": [0, 0],
    }


def failed(row: Row, stage: str, error: Exception) -> Row:
    """The row as the quarantine will record it."""
    reason = str(error) if isinstance(error, GoalRayError) else f"{type(error).__name__}: {error}"
    return {**row, "error": json.dumps({"stage": stage, "reason": reason}, ensure_ascii=False), "pixels": b""}


def decode_row(row: Row, sample: Sample, config: LismConfig) -> Row:
    """Fills in caption and picture, or the error."""
    try:
        caption = sample.caption()
        image = decode_image(sample.image_bytes(), config.max_pixels)
    except GoalRayError as error:
        return failed(row, "decode", error)
    working = shrink(image, config.max_side_px)
    return {
        **row,
        "caption": caption,
        "pixels": working.tobytes(),
        "shape": [working.height, working.width],
        "size": [image.width, image.height],
    }


def pixels_of(row: Row) -> np.ndarray:
    """The working picture of a row, (H, W, 3) uint8, without a copy."""
    height, width = row["shape"]
    return np.frombuffer(row["pixels"], np.uint8).reshape(height, width, 3)


def map_good(rows: list[Row], stage: str, work: Callable[[list[Row]], list[Row]]) -> list[Row]:
    """Applies a batched stage to the rows without an error; where the batch fails, row by row, to find the culprit.

    This is the one place that catches everything: a sample that breaks a model must not break the run.
    """
    good = [row for row in rows if not row["error"]]
    try:
        done = work(good) if good else []
    except Exception:
        done = []
        for row in good:
            try:
                done += work([row])
            except Exception as error:
                done.append(failed(row, stage, error))
    by_sample = {(row["shard"], row["sample"]): row for row in done}
    return [by_sample.get((row["shard"], row["sample"]), row) for row in rows]


def to_rows(batch: dict[str, np.ndarray]) -> list[Row]:
    """Columns to rows."""
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def to_columns(rows: list[Row], names: list[str]) -> dict[str, list[Any]]:
    """Rows to columns."""
    return {name: [row[name] for row in rows] for name in names}


class ProposeRegions:
    """Actor: adds `regions`, a JSON list of {box, score, source} on the working picture."""

    def __init__(self, config: LismConfig, device: str):
        self.config = config
        self.proposer = config.proposer.build(device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [{**row, "regions": "[]"} for row in to_rows(batch)]
        rows = map_good(rows, "propose", self.propose)
        return to_columns(rows, [*batch, "regions"])

    def propose(self, rows: list[Row]) -> list[Row]:
        """Regions of every row, filtered by area."""
        found = self.proposer.propose([pixels_of(row) for row in rows])
        result = []
        for row, regions in zip(rows, found, strict=True):
            height, width = row["shape"]
            kept = usable(regions, (int(width), int(height)), self.config.min_area, self.config.max_area)
            listed = [
                {"box": [float(x) for x in box], "score": float(score), "source": kept.source}
                for box, score in zip(kept.boxes_px, kept.scores, strict=True)
            ]
            result.append({**row, "regions": json.dumps(listed)})
        return result


class MatchSentences:
    """Actor: replaces the picture by `pairs`, the sample's pairs.json, and `similarities` of its pairs."""

    COLUMNS = ("shard", "sample", "last", "key", "error", "pairs")

    def __init__(self, config: LismConfig, provenance: dict[str, Any], device: str):
        self.config = config
        self.provenance = provenance
        self.matcher = Matcher(config.matcher, device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        rows = [{**row, "pairs": b""} for row in to_rows(batch)]
        return to_columns(map_good(rows, "match", self.match), list(self.COLUMNS))

    def match(self, rows: list[Row]) -> list[Row]:
        """The pairs of every row; all their crops and sentences go through the model together."""
        regions, spans, tasks = [], [], []
        for row in rows:
            height, width = row["shape"]
            whole = Region((0.0, 0.0, float(width), float(height)), 1.0, "image")
            regions.append(
                [whole, *(Region(tuple(r["box"]), r["score"], r["source"]) for r in json.loads(row["regions"]))]
            )
            spans.append(split_sentences(row["caption"], self.config.language))
            if not spans[-1]:
                raise CaptionError(f"caption of sample {row['key']!r} holds no sentence")
            boxes = np.array([region.box for region in regions[-1]], np.float32)
            tasks.append(MatchTask(pixels_of(row), boxes, [row["caption"][a:b] for a, b in spans[-1]]))
        matched = self.matcher.match(tasks)
        result = []
        for row, candidates, sentences, pairs in zip(rows, regions, spans, matched, strict=True):
            scale = (row["size"][0] / row["shape"][1], row["size"][1] / row["shape"][0])
            stored = tuple(replace(region, box=scale_box(region.box, scale, row["size"])) for region in candidates)
            size = (int(row["size"][0]), int(row["size"][1]))
            record = PairRecord(size, tuple(sentences), stored, tuple(pairs), self.provenance)
            result.append({**row, "pairs": record.to_bytes()})
        return result


def scale_box(
    box: tuple[float, float, float, float], scale: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box on the working picture, in pixels of the stored one."""
    x0, y0, x1, y1 = box
    return (x0 * scale[0], y0 * scale[1], min(x1 * scale[0], size[0]), min(y1 * scale[1], size[1]))
