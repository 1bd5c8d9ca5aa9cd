"""The batch that a step reads, and how it travels from the readers to the workers."""

from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor


class GoalBatch(NamedTuple):
    """One rank's batch; M local pairs, ragged over B pictures.

    images_B3SS     uint8 pictures, already resized and cropped
    text_BL         int64 caption ids, padded with 0 to the batch's longest
    crops_M3SS      uint8 region crops
    sentences_ML    int64 sentence ids, padded likewise
    boxes_M4        float32 (x0, y0, x1, y1) in patch cells, clipped to the grid; zero area = left out of the image TSL
    spans_M2        int64 half-open token spans within text_BL; (-1, -1) = left out of the text TSL
    sample_index_M  int64 row of images_B3SS that each pair belongs to, non-decreasing
    counts_R4       what `count_batch` finds on every rank, int64 on the CPU; None on one rank, or to have the step
                    gather it, which stalls a GPU
    """

    images_B3SS: Tensor
    text_BL: Tensor
    crops_M3SS: Tensor
    sentences_ML: Tensor
    boxes_M4: Tensor
    spans_M2: Tensor
    sample_index_M: Tensor
    counts_R4: Tensor | None = None


def count_batch(batch: GoalBatch) -> Tensor:
    """Pictures, local pairs, regions in the image TSL and spans in the text TSL, int64 (4,), where the boxes are."""
    x0, y0, x1, y1 = batch.boxes_M4.unbind(1)
    start_M, end_M = batch.spans_M2.unbind(1)
    sizes = torch.tensor([len(batch.images_B3SS), len(batch.crops_M3SS)], device=x0.device)
    seen = torch.stack([((x1 > x0) & (y1 > y0)).sum(), ((end_M > start_M) & (start_M >= 0)).sum()])
    return torch.cat([sizes, seen])


def pack(arrays: dict[str, np.ndarray]) -> bytes:
    """A collated batch as one block of bytes (safetensors), so that ragged arrays travel as one value."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def unpack(data: bytes) -> GoalBatch:
    """The batch of `pack`, on the CPU."""
    return GoalBatch(**{name: torch.from_numpy(array) for name, array in load(data).items()})
