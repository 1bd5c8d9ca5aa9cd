"""LISM against the truth: does a sentence's region lie on the object that the sentence speaks of?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from goal_ray.errors import ShardError, StageError
from goal_ray.pairs import best_pairs, read_pairs
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import Sample, stream_samples

HIT_IOU = 0.5
TRUTH_EXTENSION = "json"
Box = Sequence[float]


@dataclass(frozen=True)
class LismAccuracy:
    """Shares in [0, 1]. A region is right where its IoU with the true box is 0.5 or more.

    sentences        sentences of the truth that speak of one object
    right_region     share of them whose region is right. A sentence that LISM cut otherwise than the truth has no
                     region, and counts as wrong
    right_pair       share of pictures whose most similar pair (the one the paper trains on) is right; the true box of a
                     sentence on the whole scene is the picture
    object_recall    share of objects for which any proposed region is right: no matcher can do better
    """

    sentences: int
    right_region: float
    right_pair: float
    object_recall: float


@dataclass(frozen=True)
class Truth:
    """What a drawn scene shows: boxes in pixels of the picture.

    objects    box of every object
    sentences  (start, end) characters of the caption -> box of what the sentence speaks of
    on_object  the sentences that speak of one object
    """

    objects: Sequence[Box]
    sentences: dict[tuple[int, int], Box]
    on_object: set[tuple[int, int]]


def lism_accuracy(paired: str) -> LismAccuracy:
    """Compares paired shards of drawn scenes with the truth in their KEY.json.

    Raises ShardError for a sample without truth or pairs, StageError where nothing speaks of an object.
    """
    hits, pair_hits, found = [], [], []
    for url in expand_shards(paired):
        for sample in stream_samples(url):
            where = f"{url}: sample {sample.key!r}"
            truth, record = read_truth(sample, where), read_pairs(sample, url)
            boxes = [region.box for region in record.regions]
            best = best_pairs(record, len(record.sentences))
            matched = {record.sentences[pair.sentence]: boxes[pair.region] for pair in best}
            right = {
                span for span, box in matched.items() if span in truth.sentences and hit(box, truth.sentences[span])
            }
            hits += [span in right for span in truth.on_object]
            pair_hits.append(bool(best) and record.sentences[best[0].sentence] in right)
            found += (iou(boxes, truth.objects).max(axis=0, initial=0) >= HIT_IOU).tolist()
    if not hits:
        raise StageError(f"{paired}: no sentence of these scenes speaks of an object, so there is nothing to measure")
    return LismAccuracy(len(hits), float(np.mean(hits)), float(np.mean(pair_hits)), float(np.mean(found)))


def read_truth(sample: Sample, where: str) -> Truth:
    """The truth of a drawn scene. Raises ShardError for any other sample."""
    try:
        tree = json.loads(sample.members[TRUTH_EXTENSION])
        objects = [tuple(map(float, thing["box"])) for thing in tree["objects"]]
        picture = (0.0, 0.0, *map(float, tree["size"]))
        spans = {(part["start"], part["end"]): part["object"] for part in tree["sentences"]}
        boxes = {span: picture if number is None else objects[number] for span, number in spans.items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ShardError(
            f"{where} has no truth in a .{TRUTH_EXTENSION} member ({error!r}); accuracy needs shards that "
            "`goal-ray scenes` drew and `goal-ray lism` paired",
            sample.key,
        ) from None
    return Truth(objects, boxes, {span for span, number in spans.items() if number is not None})


def hit(box: Box, target: Box) -> bool:
    """Whether a region is right."""
    return bool(iou([box], [target])[0, 0] >= HIT_IOU)


def iou(left: Sequence[Box], right: Sequence[Box]) -> np.ndarray:
    """Intersection over union of every box with every other, (left, right)."""
    left_R4, right_O4 = (torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4) for boxes in (left, right))
    return box_iou(left_R4, right_O4).numpy()
