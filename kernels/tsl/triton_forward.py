"""Triton forward of the token-similarity loss: pooling + LayerNorm, and the cosine's error. The projection is cuBLAS.

    p = Σ_cells weight · token          over the cells under the box, weights adding up to 1
    n = (p - mean p) / √(var p + eps)   y = n · ln_weight + ln_bias
    f = y @ proj                        c = f·t / (|f| |t|)        loss = mean over boxes that are not empty of (1 - c)²

Memory: of the tokens, the rows under the boxes are read, once per box, straight from their strides; M×D of n (for the
backward) and of y are written, and M×E of f is written and read. Nothing of size B×N×D or M×N is made.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tsl.reference import TINY_NORM, accumulation_dtype
from kernels.tsl.triton_cells import axis_share, load_box

# Elements of a tile: at 70 to 90 registers a thread two or three programs share an H100's multiprocessor, and one loads
# while another adds. Not tuned per device: another tile adds in another order.
TILE = 8192
WARPS = 8


def pool_normalise(
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: Sequence[int],
    first_token: int,
    ln_weight_D: Tensor | None,
    ln_bias_D: Tensor | None,
    touch: bool,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y_MD in out_dtype, n_MD and 1/√(var + eps) as rstd_M in the accumulation dtype, is_empty_M bool).

    grid  (H, W); a Sequence, which is how an operator's schema knows tuples of any length
    """
    regions, dim = len(boxes_M4), tokens_BND.shape[2]
    accumulate = accumulation_dtype(tokens_BND)
    y_MD = tokens_BND.new_empty(regions, dim, dtype=out_dtype)
    normal_MD = tokens_BND.new_empty(regions, dim, dtype=accumulate)
    rstd_M = tokens_BND.new_empty(regions, dtype=accumulate)
    is_empty_M = tokens_BND.new_empty(regions, dtype=torch.bool)
    if regions == 0:
        return y_MD, normal_MD, rstd_M, is_empty_M
    block = triton.next_power_of_2(dim)
    with torch.cuda.device_of(tokens_BND):
        pool_normalise_kernel[(regions,)](
            tokens_BND,
            *tokens_BND.stride(),
            boxes_M4.contiguous(),
            sample_index_M.contiguous(),
            ln_weight_D if ln_weight_D is None else ln_weight_D.contiguous(),
            ln_bias_D if ln_bias_D is None else ln_bias_D.contiguous(),
            y_MD,
            normal_MD,
            rstd_M,
            is_empty_M,
            len(tokens_BND),
            *grid,
            first_token,
            dim,
            eps,
            TOUCH=touch,
            ROWS=max(1, TILE // block),
            BLOCK_D=block,
            num_warps=WARPS,
        )
    return y_MD, normal_MD, rstd_M, is_empty_M


# One program = one region × all of D. It walks the cells of the box alone, ROWS at a time, with a (ROWS, D) accumulator
# in registers that is summed over its rows once, at the end: the order of additions depends on the shapes alone.
@triton.jit(do_not_specialize=["samples", "height", "width", "first_token"])
def pool_normalise_kernel(
    tokens_ptr,
    stride_b,
    stride_n,
    stride_d,
    boxes_ptr,
    sample_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    normal_ptr,
    rstd_ptr,
    empty_ptr,
    samples,
    height,
    width,
    first_token,
    dim,
    eps,
    TOUCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    region = tl.program_id(0).to(tl.int64)
    x0, y0, x1, y1, is_empty, is_nan = load_box(boxes_ptr, region, True, height, width)
    sample = tl.load(sample_ptr + region).to(tl.int64)
    is_bad = is_nan | (sample < 0) | (sample >= samples)

    left, top = tl.floor(x0).to(tl.int32), tl.floor(y0).to(tl.int32)
    across, down = tl.ceil(x1).to(tl.int32) - left, tl.ceil(y1).to(tl.int32) - top
    cells = tl.where(is_empty | is_bad, 0, across * down)

    column = tl.arange(0, BLOCK_D)
    in_dim = column < dim
    source = tokens_ptr + sample * stride_b + column.to(tl.int64)[None, :] * stride_d
    accumulate = normal_ptr.dtype.element_ty
    sums = tl.zeros([ROWS, BLOCK_D], dtype=accumulate)
    for start in range(0, cells, ROWS):
        cell = start + tl.arange(0, ROWS)
        x, y = left + cell % across, top + cell // across
        weight = axis_share(x0, x1, x, TOUCH) * axis_share(y0, y1, y, TOUCH)
        row = (first_token + y * width + x).to(tl.int64)
        inside = (cell < cells)[:, None] & in_dim[None, :]
        values = tl.load(source + row[:, None] * stride_n, mask=inside, other=0.0).to(accumulate)
        sums += tl.where(cell < cells, weight, 0.0).to(accumulate)[:, None] * values

    pooled = tl.sum(sums, axis=0)
    pooled = tl.where(is_bad, float("nan"), pooled)
    mean = tl.sum(pooled, axis=0) / dim
    centred = tl.where(in_dim, pooled - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    normal = centred * rstd
    scaled = normal
    if weight_ptr is not None:
        scaled = scaled * tl.load(weight_ptr + column, mask=in_dim, other=0.0).to(accumulate)
    if bias_ptr is not None:
        scaled = scaled + tl.load(bias_ptr + column, mask=in_dim, other=0.0).to(accumulate)
    tl.store(y_ptr + region * dim + column, scaled.to(y_ptr.dtype.element_ty), mask=in_dim)
    tl.store(normal_ptr + region * dim + column, normal, mask=in_dim)
    tl.store(rstd_ptr + region, rstd)
    tl.store(empty_ptr + region, is_empty & (is_bad == 0))


def cosine_error(feature_ME: Tensor, target_ME: Tensor, is_empty_M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, cosine_M, count) as in TslResult; cosine and loss in float32, or float64 for float64 features."""
    regions, dim = feature_ME.shape
    accumulate = accumulation_dtype(feature_ME)
    cosine_M = feature_ME.new_empty(regions, dtype=accumulate)
    loss = feature_ME.new_empty((), dtype=accumulate)
    count = feature_ME.new_empty((), dtype=torch.int64)
    with torch.cuda.device_of(feature_ME):
        if regions:
            cosine_kernel[(regions,)](
                feature_ME,
                *feature_ME.stride(),
                target_ME,
                *target_ME.stride(),
                is_empty_M,
                cosine_M,
                dim,
                TINY=TINY_NORM,
                BLOCK_E=triton.next_power_of_2(dim),
                num_warps=4,
            )
        mean_error_kernel[(1,)](cosine_M, is_empty_M, loss, count, regions, BLOCK_M=1024, num_warps=4)
    return loss, cosine_M, count


# The cosine of one region's feature and target; `backward` needs the same norms again.
@triton.jit
def load_unit(row_ptr, stride_e, dim, accumulate: tl.constexpr, TINY: tl.constexpr, BLOCK_E: tl.constexpr):
    """A row at length 1, its norm (at least TINY), and whether the row is longer than that; as F.normalize."""
    column = tl.arange(0, BLOCK_E)
    row = tl.load(row_ptr + column.to(tl.int64) * stride_e, mask=column < dim, other=0.0).to(accumulate)
    length = tl.sqrt(tl.sum(row * row, axis=0))
    norm = tl.where(length < TINY, TINY, length)
    return row / norm, norm, (length < TINY) == 0


# One program = one region.
@triton.jit
def cosine_kernel(
    feature_ptr,
    feature_stride_m,
    feature_stride_e,
    target_ptr,
    target_stride_m,
    target_stride_e,
    empty_ptr,
    cosine_ptr,
    dim,
    TINY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    region = tl.program_id(0).to(tl.int64)
    accumulate: tl.constexpr = cosine_ptr.dtype.element_ty
    feature, _, _ = load_unit(feature_ptr + region * feature_stride_m, feature_stride_e, dim, accumulate, TINY, BLOCK_E)
    target, _, _ = load_unit(target_ptr + region * target_stride_m, target_stride_e, dim, accumulate, TINY, BLOCK_E)
    cosine = tl.sum(feature * target, axis=0)
    tl.store(cosine_ptr + region, tl.where(tl.load(empty_ptr + region), 0.0, cosine))


# One program for all regions: a sum in a fixed order, without atomics, of M numbers that lie in the cache.
@triton.jit(do_not_specialize=["regions"])
def mean_error_kernel(cosine_ptr, empty_ptr, loss_ptr, count_ptr, regions, BLOCK_M: tl.constexpr):
    errors = tl.zeros([BLOCK_M], dtype=cosine_ptr.dtype.element_ty)
    counts = tl.zeros([BLOCK_M], dtype=tl.int64)
    for start in range(0, regions, BLOCK_M):
        region = start + tl.arange(0, BLOCK_M)
        counted = (region < regions) & (tl.load(empty_ptr + region, mask=region < regions, other=1) == 0)
        distance = 1.0 - tl.load(cosine_ptr + region, mask=counted, other=1.0)
        errors += distance * distance
        counts += counted.to(tl.int64)
    count = tl.sum(counts, axis=0)
    tl.store(loss_ptr, tl.sum(errors, axis=0) / tl.maximum(count, 1).to(errors.dtype))
    tl.store(count_ptr, count)
