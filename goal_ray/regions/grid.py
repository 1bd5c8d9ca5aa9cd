"""Regions without looking: a regular division of the image, FAST-GOAL's replacement for a segmenter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from goal_ray.config import strict
from goal_ray.regions.protocol import RegionProposer, Regions, all_from


@strict
@dataclass(frozen=True)
class GridConfig:
    """A regular division of the image; needs no weights (FAST-GOAL, arXiv 2605.26615).

    name: grid
    levels: cells per side; [2, 3] gives 2×2 and 3×3 cells
    overlap: share of a cell's side that it has in common with the next cell
    """

    name: Literal["grid"] = "grid"
    levels: tuple[int, ...] = (2, 3)
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError("levels must be one or more numbers of at least 2; the whole image is matched anyway")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), not {self.overlap}")

    def check(self) -> None:
        """Nothing is needed."""

    def build(self, device: str = "cpu") -> RegionProposer:  # noqa: ARG002 (every config's build takes a device)
        """The proposer."""
        return GridProposer(self)


class GridProposer:
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
