"""From a stored sample to a row of a GOAL batch: decode once, cut crops from that picture, tokenise once.

Core code: it runs in Ray Data tasks, in a DataLoader, or in a notebook.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load, save

from goal_ray.errors import ShardError
from goal_ray.geometry import PixelGeometry, crop_box
from goal_ray.images import decode_image
from goal_ray.losses import GoalBatch
from goal_ray.pairs import PairRecord, best_pairs
from goal_ray.tars import PAIRS_EXTENSION, Sample
from goal_ray.text import CaptionEncoder, pad_batch


@dataclass(frozen=True)
class Example:
    """One picture with its caption and P local pairs; see GoalBatch for dtypes and units.

    image_3SS · text_L · crops_P3SS · sentences: P arrays of ids · boxes_P4 · spans_P2
    """

    image_3SS: np.ndarray
    text_L: np.ndarray
    crops_P3SS: np.ndarray
    sentences: list[np.ndarray]
    boxes_P4: np.ndarray
    spans_P2: np.ndarray


@dataclass(frozen=True)
class ExampleBuilder:
    """Turns a sample into an Example.

    geometry        of the whole picture
    crop_geometry   of the region crops
    encoder         the model's tokenizer
    context_length  text positions, tokens
    pairs           local pairs per picture at most; 0 reads no pairs at all
    """

    geometry: PixelGeometry
    crop_geometry: PixelGeometry
    encoder: CaptionEncoder
    context_length: int
    pairs: int

    def __call__(self, sample: Sample, where: str, seed: int) -> Example:
        """Raises ImageError, CaptionError or ShardError for a sample that breaks the contract.

        where  names the tar in errors
        seed   fixes the random crop, together with the sample's key
        """
        image = decode_image(sample.image_bytes())
        caption = sample.caption()
        pairs, boxes_px, spans = self._pairs(sample, caption, image, where)
        square, boxes = self.geometry(image, boxes_px, zlib.crc32(sample.key.encode(), seed))
        encoded = self.encoder.encode(caption, spans, self.context_length)
        crops = [self.crop_geometry(crop_box(image, tuple(box)), np.empty((0, 4)))[0] for box in boxes_px]
        return Example(
            image_3SS=square,
            text_L=encoded.ids,
            crops_P3SS=np.stack(crops) if pairs else np.empty((0, *square.shape), np.uint8),
            sentences=[self.encoder.encode(caption[a:b], [], self.context_length).ids for a, b in spans],
            boxes_P4=boxes,
            spans_P2=encoded.spans_tokens,
        )

    def _pairs(self, sample: Sample, caption: str, image: Image.Image, where: str):
        if not self.pairs:
            return [], np.empty((0, 4), np.float32), []
        if PAIRS_EXTENSION not in sample.members:
            raise ShardError(
                f"{where}: sample {sample.key!r} has no .{PAIRS_EXTENSION}; run `goal-ray lism` on these shards first, "
                "or set the local and TSL weights to 0"
            )
        record = PairRecord.from_bytes(sample.members[PAIRS_EXTENSION], caption, f"{where}: {sample.key}")
        if tuple(record.size) != image.size:
            raise ShardError(
                f"{where}: sample {sample.key!r}: pairs are for {record.size} pixels, the picture has {image.size}"
            )
        pairs = best_pairs(record, self.pairs)
        boxes_px = np.array([record.regions[pair.region].box for pair in pairs], np.float32).reshape(-1, 4)
        return pairs, boxes_px, [record.sentences[pair.sentence] for pair in pairs]


def collate(examples: Sequence[Example]) -> dict[str, np.ndarray]:
    """Stacks examples into the arrays of a GoalBatch, texts cut to the batch's longest."""
    counts = [len(example.sentences) for example in examples]
    sentences = [ids for example in examples for ids in example.sentences]
    return {
        "images_B3SS": np.stack([example.image_3SS for example in examples]),
        "text_BL": pad_batch([example.text_L for example in examples]),
        "crops_M3SS": np.concatenate([example.crops_P3SS for example in examples]),
        "sentences_ML": pad_batch(sentences) if sentences else np.zeros((0, 1), np.int64),
        "boxes_M4": np.concatenate([example.boxes_P4 for example in examples]).astype(np.float32),
        "spans_M2": np.concatenate([example.spans_P2.reshape(-1, 2) for example in examples]).astype(np.int64),
        "sample_index_M": np.repeat(np.arange(len(examples)), counts).astype(np.int64),
    }


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """A collated batch as one block of bytes (safetensors), so that ragged arrays travel as one value."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def unpack(data: bytes, device: str | torch.device = "cpu") -> GoalBatch:
    """The batch of `pack`, on a device."""
    return GoalBatch(**{name: torch.from_numpy(array).to(device) for name, array in load(data).items()})
