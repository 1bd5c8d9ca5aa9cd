"""Boxes and areas of masks that are given as a coarse grid of logits, finer than the grid's cells.

Cell i of an axis reaches from i to i + 1, and its logit is that of its centre; between centres logits are bilinear. A
mask is where they are above 0. Shapes: M or R masks, H × W cells.
"""

import torch
from torch import Tensor


def area_above(logits_MHW: Tensor, threshold: float) -> Tensor:
    """Cells of each mask, (M,), where the logits exceed the threshold: fractions where they cross it between cells.

    A line from logit a to logit b is above 0 on the share (relu(a) + relu(b)) / (|a| + |b|) of its length. The mean of
    what the rows of cells give and what the columns give; the outer half cells are as their cell is.
    """
    above_MHW = logits_MHW - threshold
    size_MHW = above_MHW.abs()

    def along(dim: int) -> Tensor:
        count = above_MHW.shape[dim] - 1
        pair = above_MHW.narrow(dim, 0, count) + above_MHW.narrow(dim, 1, count)
        size = size_MHW.narrow(dim, 0, count) + size_MHW.narrow(dim, 1, count)
        inner_M = (0.5 + 0.5 * pair / size.clamp(min=1e-12)).flatten(1).sum(1)
        ends = [(above_MHW.select(dim, end) > 0).sum(1) for end in (0, -1)]
        return inner_M + 0.5 * (ends[0] + ends[1])

    return 0.5 * (along(1) + along(2))


def pixels_near(cells: int, pixels: int, length: float) -> Tensor:
    """Centres of the pixels nearest to the cells' centres, in cells, (cells,).

    pixels, length  the picture's side in pixels, and in cells

    The pixels of a picture decide what belongs to a mask: a speck that lies between them does not.
    """
    pitch = length / pixels
    number = ((torch.arange(cells) + 0.5) / pitch - 0.5).round().clamp(0, pixels - 1)
    return (number + 0.5) * pitch


def sample_at(logits_MHW: Tensor, at: Tensor, dim: int) -> Tensor:
    """Logits at positions along one axis, in cells; beyond the outer centres they stay as there."""
    last = logits_MHW.shape[dim] - 1
    centre = (at - 0.5).clamp(0, last)
    lower = centre.floor().long()
    shape = [1] * logits_MHW.dim()
    shape[dim] = -1
    below, above = (logits_MHW.index_select(dim, each) for each in (lower, (lower + 1).clamp(max=last)))
    return torch.lerp(below, above, (centre - lower).view(shape))


def mask_boxes(logits_MHW: Tensor, x_W: Tensor, y_H: Tensor, size: tuple[float, float]) -> Tensor:
    """(x0, y0, x1, y1) of each mask, (M, 4), in cells: where the logits cross 0. Each mask must have a logit above 0.

    x_W, y_H  positions of the columns and rows, rising
    size      (H, W) of the picture; a mask that holds the last position reaches its edge

    Along a line of positions logits are linear, and an extreme of the mask lies on one of the lines.
    """
    height, width = size
    flat_MWH = logits_MHW.transpose(1, 2)
    x0 = width - far_edge(logits_MHW.flip(2), width - x_W.flip(0), width)
    y0 = height - far_edge(flat_MWH.flip(2), height - y_H.flip(0), height)
    return torch.stack([x0, y0, far_edge(logits_MHW, x_W, width), far_edge(flat_MWH, y_H, height)], dim=1)


def far_edge(logits_MHW: Tensor, x_W: Tensor, end: float) -> Tensor:
    """The largest x of each mask, (M,)."""
    final = logits_MHW.shape[2] - 1
    last_M = final - (logits_MHW > 0).any(1).flip(1).int().argmax(1)
    next_M = (last_M + 1).clamp(max=final)

    def column(number_M: Tensor) -> Tensor:
        return logits_MHW.gather(2, number_M[:, None, None].expand(-1, logits_MHW.shape[1], 1)).squeeze(2)

    here_MH, beyond_MH = column(last_M), column(next_M)
    # Beyond the last column no logit is above 0, so that the difference is not 0 where one is here.
    share_MH = torch.where(here_MH > 0, here_MH / (here_MH - beyond_MH), 0.0)
    crossing_M = x_W[last_M] + share_MH.amax(1) * (x_W[next_M] - x_W[last_M])
    return torch.where(last_M == final, end, crossing_M)
