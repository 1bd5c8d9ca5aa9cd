"""LISM against the truth: does a sentence's region lie on the object that the sentence speaks of?"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from goal_ray.pairs import PairRecord, best_pairs
from goal_ray.shards import PAIRS_EXTENSION, expand_shards, stream_samples

HIT_IOU = 0.5


@dataclass(frozen=True)
class LismAccuracy:
    """Shares in [0, 1], at IoU >= 0.5.

    sentences        sentences of the truth that speak of one object
    right_region     share of them whose matched region lies on that object
    right_pair       share of pictures whose most similar pair (the one the paper trains on) is right
    object_recall    share of objects on which any proposed region lies: no matcher can do better
    """

    sentences: int
    right_region: float
    right_pair: float
    object_recall: float

    def as_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


def lism_accuracy(paired: str) -> LismAccuracy:
    """Compares paired shards of drawn scenes with the truth in their KEY.json."""
    hits, pair_hits, found = [], [], []
    for url in expand_shards(paired):
        for sample in stream_samples(url):
            truth = json.loads(sample.members["json"])
            record = PairRecord.from_bytes(sample.members[PAIRS_EXTENSION], sample.caption(), f"{url}: {sample.key}")
            overlap_RO = iou([region.box for region in record.regions], [o["box"] for o in truth["objects"]])
            found += (overlap_RO.max(axis=0) >= HIT_IOU).tolist()
            object_of = {(s["start"], s["end"]): s["object"] for s in truth["sentences"] if s["object"] is not None}
            region_of = {tuple(record.sentences[pair.sentence]): pair.region for pair in record.pairs}
            hits += [
                span in region_of and bool(overlap_RO[region_of[span], number] >= HIT_IOU)
                for span, number in object_of.items()
            ]
            for pair in best_pairs(record, 1):
                number = object_of.get(tuple(record.sentences[pair.sentence]))
                pair_hits.append(number is not None and bool(overlap_RO[pair.region, number] >= HIT_IOU))
    return LismAccuracy(len(hits), float(np.mean(hits)), float(np.mean(pair_hits)), float(np.mean(found)))


def iou(left_R4: list, right_O4: list) -> np.ndarray:
    """Intersection over union of every box with every other, (R, O)."""
    return box_iou(torch.tensor(left_R4).float(), torch.tensor(right_O4).float()).numpy()
