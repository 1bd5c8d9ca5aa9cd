"""From a stored sample to a row of a GOAL batch: decode once, cut crops from that picture, tokenise once.

Core code: it runs in Ray Data tasks, in a DataLoader, or in a notebook.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow
import torch
from PIL import Image

from goal_ray.geometry import PixelGeometry, View, outer_box
from goal_ray.images import open_picture
from goal_ray.pairs import best_pairs, read_pairs
from goal_ray.tars import Sample
from goal_ray.text import CaptionEncoder, pad_batch

# Decoded pixels per pixel of a square, along either axis, that a smaller decoding must leave. At 1.5 the squares of
# photographs differ by less than 2 levels of 256 on average from those of whole pictures, and edges are at most one
# pixel of the square off (tests/test_batches.py); less would blur more, and more would seldom allow a smaller decoding.
HEADROOM = 1.5


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
        picture = open_picture(sample.image_bytes())
        caption = sample.caption()
        boxes_px, spans = self._pairs(sample, picture.size, where)
        whole = self.geometry.view(picture.size, zlib.crc32(sample.key.encode(errors="surrogateescape"), seed))
        crops = [self._crop_view(box, picture.size) for box in boxes_px.tolist()]
        decoded = picture.decode(decode_factor([whole, *crops]))
        pixels = pixels_CHW(decoded)
        squares = np.empty((1 + len(crops), 3, self.geometry.size_px, self.geometry.size_px), np.uint8)
        squares[0] = self.geometry.square(pixels, whole, picture.size)[:3].numpy()
        for square, view in zip(squares[1:], crops, strict=True):
            square[:] = self.crop_geometry.square(pixels, view, picture.size)[:3].numpy()
        encoded = self.encoder.encode(caption, spans, self.context_length)
        return Example(
            image_3SS=squares[0],
            text_L=encoded.ids,
            crops_P3SS=squares[1:],
            sentences=[self.encoder.encode(caption[a:b], [], self.context_length).ids for a, b in spans],
            boxes_P4=self.geometry.cells(whole, boxes_px),
            spans_P2=encoded.spans_tokens,
        )

    def _crop_view(self, box_px: list[float], size: tuple[int, int]) -> View:
        x0, y0, x1, y1 = outer_box(box_px, size)
        return self.crop_geometry.view((x1 - x0, y1 - y0)).moved(x0, y0)

    def _pairs(self, sample: Sample, size: tuple[int, int], where: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        """Boxes (P, 4) in pixels and sentences in characters of the best pairs."""
        if not self.pairs:
            return np.empty((0, 4), np.float32), []
        record = read_pairs(sample, where, size, ", or set the local and TSL weights to 0")
        pairs = best_pairs(record, self.pairs)
        boxes_px = np.array([record.regions[pair.region].box for pair in pairs], np.float32).reshape(-1, 4)
        return boxes_px, [record.sentences[pair.sentence] for pair in pairs]


def decode_factor(views: Sequence[View]) -> int:
    """How much smaller a picture may be decoded, 1, 2, 4 or 8 times, and still show all the views in full."""
    detail = HEADROOM * max(view.detail for view in views)
    return next((factor for factor in (8, 4, 2) if factor * detail <= 1), 1)


def collate(examples: Sequence[Example], text_multiple: int = 1, context_length: int = 0) -> dict[str, np.ndarray]:
    """Stacks examples into the arrays of a GoalBatch, texts cut to the batch's longest.

    text_multiple   tokens; that length is rounded up to a multiple of it, at most to `context_length`, so that a
                    compiled model meets few shapes. What is added is padding, which a causal tower never sees.
    """

    def padded(ids: list[np.ndarray]) -> np.ndarray:
        longest = max(map(len, ids))
        rounded = -(-longest // text_multiple) * text_multiple
        return pad_batch(ids, length=max(longest, min(rounded, context_length)))

    counts = [len(example.sentences) for example in examples]
    sentences = [ids for example in examples for ids in example.sentences]
    return {
        "images_B3SS": np.stack([example.image_3SS for example in examples]),
        "text_BL": padded([example.text_L for example in examples]),
        "crops_M3SS": np.concatenate([example.crops_P3SS for example in examples]),
        "sentences_ML": padded(sentences) if sentences else np.zeros((0, 1), np.int64),
        "boxes_M4": np.concatenate([example.boxes_P4 for example in examples]).astype(np.float32),
        "spans_M2": np.concatenate([example.spans_P2.reshape(-1, 2) for example in examples]).astype(np.int64),
        "sample_index_M": np.repeat(np.arange(len(examples)), counts).astype(np.int64),
    }


def pixels_CHW(image: Image.Image) -> torch.Tensor:
    """The pixels of an RGB picture, uint8 (C, H, W), to be read only, each pixel's channels side by side in memory.

    The first three channels are red, green and blue. PIL keeps an unused byte behind them, which comes along as a
    fourth channel where that saves a copy.
    """
    try:
        flat = torch.from_dlpack(pyarrow.array(image).flatten())
    except ValueError:  # PIL cuts large pictures into several blocks of memory
        flat = torch.from_numpy(np.array(image))
    return flat.view(image.height, image.width, -1).permute(2, 0, 1)
