"""What a region proposer is, what it gives, and which of its regions are worth matching."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Regions:
    """The regions of one image, in pixels of the image that the proposer was given.

    boxes_px  (R, 4) float32, x0, y0, x1, y1 with exclusive x1, y1: the edges of pixels, not their centres
    scores    (R,) float32, the better the higher; comparable within one source only
    areas_px  (R,) float32, area of the mask where the proposer has masks, else of the box
    sources   (R,) str, the proposers' names, as stored in pairs.json
    """

    boxes_px: np.ndarray
    scores: np.ndarray
    areas_px: np.ndarray
    sources: np.ndarray


def all_from(source: str, count: int) -> np.ndarray:
    """`Regions.sources` of `count` regions that one proposer found."""
    return np.full(count, source)


class RegionProposer(Protocol):
    """Finds regions. `build_proposer(config, device)` makes one.

    at_once  how much it takes at once, such as pictures and points; only speed and memory depend on it. Who uses the
             proposer may set it lower
    """

    at_once: tuple[int, ...] = ()

    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The regions of each image, (H, W, 3) uint8 RGB; sizes may differ."""
        ...


def usable(
    regions: Regions, size: tuple[int, int], min_area: float = 0.01, max_area: float = 0.80, max_iou: float = 0.95
) -> Regions:
    """The regions worth matching, best score first; ties ordered by box.

    size                (W, H) of the image, pixels; boxes are clipped to it
    min_area, max_area  shares of the image that a region's area must lie between, both included
    max_iou             of two boxes that overlap more than this, only the one of higher score stays
    Source of the area limits: GOAL (arXiv 2503.17782), which filters by the area of SAM's masks.
    """
    # Here, since the processes that only hand regions on need neither.
    import torch
    from torchvision.ops import nms

    width, height = size
    boxes_R4 = np.clip(regions.boxes_px.astype(np.float32), 0, np.array([width, height, width, height], np.float32))
    # Adding 0 turns -0.0 into 0.0, which sorts and prints alike.
    boxes_R4 = boxes_R4 + np.float32(0)
    box_areas_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).clip(min=0).prod(axis=1)
    # Where a box was clipped, the part outside does not count.
    areas_R = np.minimum(regions.areas_px, box_areas_R).astype(np.float32)
    shares_R = areas_R / (width * height)
    kept = np.flatnonzero((box_areas_R > 0) & (shares_R >= min_area) & (shares_R <= max_area))
    kept = kept[np.lexsort((*boxes_R4[kept].T[::-1], -regions.scores[kept]))]
    # nms sees ranks, not scores, so that its order is this order also among equal scores.
    ranks = torch.arange(len(kept), 0, -1, dtype=torch.float32)
    kept = kept[nms(torch.from_numpy(boxes_R4[kept]), ranks, max_iou).numpy()]
    return Regions(boxes_R4[kept], regions.scores[kept].astype(np.float32), areas_R[kept], regions.sources[kept])
