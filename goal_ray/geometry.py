"""One geometry for pixels and boxes: a box goes through exactly the resize and crop that its picture went through.

CLIP resizes the short side and center-crops, so a box in the margin of a wide picture is cut or gone; mapping it as if
the picture were squashed would pool the wrong patches.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from goal_ray.settings import ResizeConfig

# Of a picture whose short side is resized: the longer side of a thread, 12,000×1 pixels, would become gigabytes.
MAX_ASPECT = 32
# Pixels of the picture by which a box may reach over an edge unseen: the 0.01 that pairs.json allows, and float32's
# rounding of coordinates.
SLACK_PX = 0.02
PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
BoxPx = tuple[int, int, int, int]
T = TypeVar("T", Image.Image, Tensor)


@dataclass(frozen=True)
class View:
    """How the model's square is seen in a picture: a part of it is resized, and the square is cut out of that.

    part_px     (x0, y0, x1, y1) of the picture
    resized_HW  what the part is resized to, pixels
    corner      (left, top) of the square in the resized part, pixels
    """

    part_px: BoxPx
    resized_HW: tuple[int, int]
    corner: tuple[int, int]

    @property
    def detail(self) -> float:
        """Pixels of the square per pixel of the picture, along the axis that has more of them."""
        x0, y0, x1, y1 = self.part_px
        return max(self.resized_HW[1] / (x1 - x0), self.resized_HW[0] / (y1 - y0))

    def moved(self, x_px: int, y_px: int) -> "View":
        """The view of a crop, as one of the picture that the crop was cut from at (x_px, y_px)."""
        x0, y0, x1, y1 = self.part_px
        return replace(self, part_px=(x0 + x_px, y0 + y_px, x1 + x_px, y1 + y_px))


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
        self.interpolation = interpolation

    def __call__(
        self, image: Image.Image, boxes_px_M4: np.ndarray, seed: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the square, uint8 (3, size_px, size_px), and the boxes in patch cells; PIL resizes, as in open_clip.

        image        RGB
        boxes_px_M4  as in `cells`
        seed         as in `view`
        """
        view = self.view(image.size, seed)
        part = image if view.part_px == (0, 0, *image.size) else image.crop(view.part_px)
        left, top = view.corner
        resized = resize(part, view.resized_HW, self.interpolation)
        square = resized.crop((left, top, left + self.size_px, top + self.size_px))
        return np.asarray(square).transpose(2, 0, 1).copy(), self.cells(view, boxes_px_M4)

    def view(self, size: tuple[int, int], seed: int | None = None) -> View:
        """The view of a picture of `size` (width, height).

        seed  fixes random_resized_crop; the process's own random state is left as it was
        """
        width, height = size
        if self.config.mode == "random_resized_crop":
            part_px = random_part(width, height, self.config.min_scale, seed)
            return View(part_px, (self.size_px, self.size_px), (0, 0))
        if self.config.mode == "squash":
            return View((0, 0, width, height), (self.size_px, self.size_px), (0, 0))
        # All is resized, but of a thread not its ends, which the center crop would cut off anyway.
        longest = MAX_ASPECT * min(size)
        x0, y0 = (max(0, (side - longest) // 2) for side in size)
        part_px = x0, y0, width - x0, height - y0
        sides = width - 2 * x0, height - 2 * y0
        resized_W, resized_H = (int(self.size_px * side / min(sides)) for side in sides)
        # Rounded as CenterCrop does, halves to even.
        corner = round((resized_W - self.size_px) / 2), round((resized_H - self.size_px) / 2)
        return View(part_px, (resized_H, resized_W), corner)

    def cells(self, view: View, boxes_px_M4: np.ndarray) -> np.ndarray:
        """The boxes as the square shows them, in patch cells, float32 (M, 4).

        boxes_px_M4  (x0, y0, x1, y1) in pixels of the picture

        A box is clipped to the square. One whose visible share is below `min_visible` becomes (0, 0, 0, 0), which the
        TSL leaves out. What reaches out by no more than SLACK_PX counts as visible.
        """
        x0, y0, x1, y1 = view.part_px
        resized_H, resized_W = view.resized_HW
        zoom_4 = np.tile([resized_W / (x1 - x0), resized_H / (y1 - y0)], 2)
        boxes_px_M4 = np.asarray(boxes_px_M4, np.float64).reshape(-1, 4)
        moved_M4 = (boxes_px_M4 - np.tile([x0, y0], 2)) * zoom_4 - np.tile(view.corner, 2)
        clipped_M4 = moved_M4.clip(0, self.size_px)
        slack_4 = SLACK_PX * zoom_4
        visible_M = area(moved_M4.clip(-slack_4, self.size_px + slack_4)) / area(moved_M4).clip(
            min=np.finfo(np.float32).tiny
        )
        kept_M4 = np.where((visible_M >= self.config.min_visible)[:, None], clipped_M4, 0.0)
        rows, columns = self.grid_HW
        return (kept_M4 * np.tile([columns, rows], 2) / self.size_px).astype(np.float32)

    def square(self, picture_CHW: Tensor, view: View | None = None, size: tuple[int, int] | None = None) -> Tensor:
        """The square of a uint8 picture on any device, (C, size_px, size_px) uint8, without leaving the device.

        view  what of the picture is seen; by default, as `view` says
        size  (width, height) that the view's pixels are of, where the picture was decoded to fewer: its part is then
              rounded to whole decoded pixels

        Values differ from those of `__call__`, which PIL resizes, by 2 at most where bicubic does not overshoot black
        or white: PIL rounds and clips between its two passes.
        """
        height, width = picture_CHW.shape[1:]
        view = view or self.view((width, height))
        x0, y0, x1, y1 = view.part_px if size is None else scaled_box(view.part_px, size, (width, height))
        left, top = view.corner
        resized = resize(picture_CHW[:, y0:y1, x0:x1], view.resized_HW, self.interpolation)
        return resized[:, top : top + self.size_px, left : left + self.size_px]


def resize(picture: T, size_HW: tuple[int, int], interpolation: str) -> T:
    """A PIL picture or a tensor (C, H, W), resized with antialiasing.

    The values are those of torchvision's `resize`, which readers would need another 2 s and 150 MB to import.
    """
    height, width = size_HW
    if isinstance(picture, Image.Image):
        return (
            picture if picture.size == (width, height) else picture.resize((width, height), PIL_FILTERS[interpolation])
        )
    if tuple(picture.shape[1:]) == (height, width):
        return picture
    # Torch resizes bytes on the CPU alone.
    as_floats = picture.dtype == torch.uint8 and picture.device.type != "cpu"
    source = (picture.float() if as_floats else picture)[None]
    resized = F.interpolate(source, (height, width), mode=interpolation, antialias=True)[0]
    return resized.clamp_(0, 255).round_().to(torch.uint8) if as_floats else resized


def random_part(width: int, height: int, min_scale: float, seed: int | None) -> BoxPx:
    """A random part of a picture, with at least `min_scale` of its area, and 3/4 to 4/3 of its aspect ratio.

    RandomResizedCrop bounds the ratio itself: a picture wider than 4/3 would lose its ends, always the same.
    """
    random = np.random.default_rng(seed)
    share = random.uniform(min_scale, 1)
    widest = math.log(min(4 / 3, 1 / share))  # a part wider than 1 / share would not fit
    ratio = math.exp(random.uniform(-widest, widest))
    # Rounded up, as of small pictures less than the share would be left.
    columns = min(width, math.ceil(width * math.sqrt(share * ratio)))
    rows = min(height, math.ceil(height * math.sqrt(share / ratio)))
    left, top = int(random.integers(width - columns + 1)), int(random.integers(height - rows + 1))
    return left, top, left + columns, top + rows


def area(boxes_M4: np.ndarray) -> np.ndarray:
    """Areas (M,) of (x0, y0, x1, y1) boxes."""
    return (boxes_M4[:, 2] - boxes_M4[:, 0]) * (boxes_M4[:, 3] - boxes_M4[:, 1])


def scaled_box(box_px: BoxPx, size: tuple[int, int], new_size: tuple[int, int]) -> BoxPx:
    """A box on a picture of `size` (W, H), on the same picture of `new_size`: to whole pixels, at least one."""
    edges = [round(edge * new_size[axis % 2] / size[axis % 2]) for axis, edge in enumerate(box_px)]
    x0, y0 = min(edges[0], new_size[0] - 1), min(edges[1], new_size[1] - 1)
    return x0, y0, max(edges[2], x0 + 1), max(edges[3], y0 + 1)


def outer_box(box_px: Sequence[float], size: tuple[int, int]) -> BoxPx:
    """The whole pixels under a box: edges rounded outwards, within the picture of `size` (W, H), at least one pixel."""
    width, height = size
    x0, y0 = min(max(math.floor(box_px[0]), 0), width - 1), min(max(math.floor(box_px[1]), 0), height - 1)
    return x0, y0, max(min(width, math.ceil(box_px[2])), x0 + 1), max(min(height, math.ceil(box_px[3])), y0 + 1)
