"""Regions without looking: a regular division of the image, FAST-GOAL's replacement for a segmenter."""

from collections.abc import Sequence

import numpy as np

from goal_ray.regions.config import GridConfig
from goal_ray.regions.protocol import RegionProposer, Regions, all_from


class GridProposer(RegionProposer):
    """Gives every image the same division, scaled to its size."""

    def __init__(self, config: GridConfig):
        self.unit_boxes_R4 = np.concatenate([cells(level, config.overlap) for level in config.levels])

    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The cells of each image, all with score 1."""
        return [self.divide(*image.shape[:2]) for image in images]

    def divide(self, height: int, width: int) -> Regions:
        """The cells of an image of this size."""
        boxes_R4 = (self.unit_boxes_R4 * [width, height, width, height]).astype(np.float32)
        areas_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(axis=1)
        return Regions(boxes_R4, np.ones(len(boxes_R4), np.float32), areas_R, all_from("grid", len(boxes_R4)))


def cells(count: int, overlap: float) -> np.ndarray:
    """count × count boxes, (count², 4) float64, that cover the unit square and overlap by a share of their side."""
    side = 1 / (count - (count - 1) * overlap)
    low_C = np.arange(count) * side * (1 - overlap)
    # The last edge is set, not computed, so that no rounding leaves it short of the border.
    high_C = np.append(low_C[:-1] + side, 1.0)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(count), np.arange(count)))
    return np.stack([low_C[x], low_C[y], high_C[x], high_C[y]], axis=1)
