"""What the Triton kernels share: how much of the grid's cells a box covers."""

import triton
import triton.language as tl

IS_INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels were made for Triton's interpreter, which runs them on the CPU; decided at import."""


@triton.jit
def load_box(boxes_ptr, region, exists, height, width):
    """One box, clipped to the grid: (x0, y0, x1, y1, is_empty, is_nan). One that does not exist is read as empty.

    A NaN box is not empty: it must show.
    """
    box = boxes_ptr + region * 4
    x0, y0 = tl.load(box, mask=exists, other=0.0), tl.load(box + 1, mask=exists, other=0.0)
    x1, y1 = tl.load(box + 2, mask=exists, other=0.0), tl.load(box + 3, mask=exists, other=0.0)
    is_nan = (x0 != x0) | (y0 != y0) | (x1 != x1) | (y1 != y1)
    x0, y0 = tl.maximum(x0, 0.0), tl.maximum(y0, 0.0)
    x1, y1 = tl.minimum(x1, width), tl.minimum(y1, height)
    return x0, y0, x1, y1, ((x1 <= x0) | (y1 <= y0)) & (is_nan == 0), is_nan


@triton.jit
def axis_share(low, high, cell, TOUCH: tl.constexpr):
    """The share of [low, high] that falls on each cell of an axis, 0 if low >= high; for TOUCH, touched cells alike.

    A cell's weight is its share across times its share down: per axis, nothing under- or overflows for any box.
    """
    edge = cell.to(low.dtype)
    overlap = tl.maximum(tl.minimum(high, edge + 1.0) - tl.maximum(low, edge), 0.0)
    if TOUCH:
        overlap = tl.where(overlap > 0.0, 1.0, 0.0)
        whole = tl.maximum(tl.ceil(high) - tl.floor(low), 1.0)
    else:
        whole = tl.where(high > low, high - low, 1.0)
    return overlap * (1.0 / whole)
