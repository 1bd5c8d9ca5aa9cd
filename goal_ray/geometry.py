"""One geometry for pixels and boxes: a box goes through exactly the resize and crop that its picture went through.

CLIP resizes the short side and center-crops, so a box in the margin of a wide picture is cut or gone; mapping it as if
the picture were squashed would pool the wrong patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

from goal_ray.config import strict

# Of a picture whose short side is resized: the longer side of a thread, 12,000×1 pixels, would become gigabytes.
MAX_ASPECT = 32
BoxPx = tuple[int, int, int, int]


@strict
@dataclass(frozen=True)
class ResizeConfig:
    """How a picture becomes the square that the model reads.

    mode: shortest resizes the short side and center-crops (CLIP's own), squash ignores the aspect ratio,
        random_resized_crop draws a crop per sample and epoch (training only)
    min_scale: random_resized_crop keeps at least this share of the picture's area
    min_visible: a region of which the crop leaves less than this share of its area is dropped from the TSL
    """

    mode: Literal["shortest", "squash", "random_resized_crop"] = "shortest"
    min_scale: float = 0.9
    min_visible: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be in (0, 1], not {self.min_scale}")
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"min_visible must be in [0, 1], not {self.min_visible}")


class PixelGeometry:
    """Turns a picture and boxes on it into the model's square of `size_px` pixels and boxes in patch cells.

    size_px        side of the model's input, pixels
    grid_HW        patch grid of the vision tower, cells
    interpolation  "bicubic" or "bilinear", as the model's preprocessing says
    """

    def __init__(self, config: ResizeConfig, size_px: int, grid_HW: tuple[int, int], interpolation: str = "bicubic"):
        self.config = config
        self.size_px = size_px
        self.grid_HW = grid_HW
        mode = InterpolationMode(interpolation)
        steps: dict[str, list[torch.nn.Module]] = {
            "shortest": [v2.Resize(size_px, mode), v2.CenterCrop(size_px)],
            "squash": [v2.Resize((size_px, size_px), mode)],
            "random_resized_crop": [v2.RandomResizedCrop(size_px, (config.min_scale, 1.0), interpolation=mode)],
        }
        self.transform = v2.Compose(steps[config.mode])

    def __call__(
        self, image: Image.Image, boxes_px_M4: np.ndarray, seed: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the square, uint8 (3, size_px, size_px), and the boxes in patch cells, float32 (M, 4).

        image        RGB
        boxes_px_M4  (x0, y0, x1, y1) in pixels of `image`
        seed         fixes random_resized_crop; the process's own random state is left as it was

        A box is clipped to the square. One whose visible share is below `min_visible` becomes (0, 0, 0, 0), which the
        TSL leaves out.
        """
        left, top, right, bottom = self._seen(*image.size)
        if (right - left, bottom - top) != image.size:
            image = image.crop((left, top, right, bottom))
        boxes_px_M4 = np.asarray(boxes_px_M4, np.float32).reshape(-1, 4) - np.array([left, top, left, top], np.float32)
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(boxes_px_M4),
            format="XYXY",
            canvas_size=(image.height, image.width),
            clamping_mode=None,
        )
        with torch.random.fork_rng(devices=[]):
            if seed is not None:
                # torch.manual_seed would also queue a call, with its stack, for a CUDA that is never started here.
                torch.default_generator.manual_seed(seed)
            square, moved_M4 = self.transform(image, boxes)
        boxes_px = moved_M4.as_subclass(torch.Tensor)
        clipped_px = boxes_px.clamp(0, self.size_px)
        visible_M = area(clipped_px) / area(boxes_px).clamp(min=torch.finfo(torch.float32).tiny)
        kept_px = torch.where((visible_M >= self.config.min_visible)[:, None], clipped_px, 0.0)
        rows, columns = self.grid_HW
        scale = torch.tensor([columns, rows, columns, rows]) / self.size_px
        return np.asarray(square).transpose(2, 0, 1).copy(), (kept_px * scale).numpy()

    def square(self, picture_3HW: torch.Tensor) -> torch.Tensor:
        """The square of a uint8 picture on any device, (3, size_px, size_px) uint8, without leaving the device.

        Values differ from those of `__call__`, which PIL resizes, by 2 at most where bicubic does not overshoot black
        or white: PIL rounds and clips between its two passes.
        """
        left, top, right, bottom = self._seen(picture_3HW.shape[2], picture_3HW.shape[1])
        return self.transform(picture_3HW[:, top:bottom, left:right])

    def _seen(self, width: int, height: int) -> BoxPx:
        """What is resized: all, but of a thread not its ends, which the center crop would cut off anyway."""
        longest = MAX_ASPECT * min(width, height)
        if self.config.mode != "shortest":
            longest = max(width, height)
        left, top = (max(0, (side - longest) // 2) for side in (width, height))
        return left, top, width - left, height - top


def area(boxes_M4: torch.Tensor) -> torch.Tensor:
    """Areas (M,) of (x0, y0, x1, y1) boxes."""
    return (boxes_M4[:, 2] - boxes_M4[:, 0]) * (boxes_M4[:, 3] - boxes_M4[:, 1])


def outer_box(box_px: Sequence[float], size: tuple[int, int]) -> BoxPx:
    """The whole pixels under a box: edges rounded outwards, within the picture of `size` (W, H), at least one pixel."""
    width, height = size
    x0, y0 = min(max(math.floor(box_px[0]), 0), width - 1), min(max(math.floor(box_px[1]), 0), height - 1)
    return x0, y0, max(min(width, math.ceil(box_px[2])), x0 + 1), max(min(height, math.ceil(box_px[3])), y0 + 1)


def crop_box(image: Image.Image, box_px: Sequence[float]) -> Image.Image:
    """The part of a picture under a box, its background kept."""
    return image.crop(outer_box(box_px, image.size))
