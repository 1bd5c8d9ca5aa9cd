"""Triton backward of the token-similarity loss; the gradients around the projection are cuBLAS's.

    dc = dcosine - 2 (1 - c) / count · dloss      df = dc (t̂ - c f̂) / |f|      dt = dc (f̂ - c t̂) / |t|
    dn = dy · ln_weight    dp = (dn - mean dn - n · mean(dn · n)) / √(var + eps)
    dln_weight = Σ_regions dy · n      dln_bias = Σ_regions dy
    dtoken = Σ_regions of its sample weight · dp

Memory: the token gradient is a gather: each tile of tokens loops over its sample's regions, sums in registers and is
written once, zeros included, so that nothing is cleared first and no atomic is needed. Beside it there is O(M·D).
All sums have an order that depends on the shapes alone: bit-identical from run to run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tsl.reference import TINY_NORM
from kernels.tsl.triton_cells import IS_INTERPRETED, axis_share, load_box
from kernels.tsl.triton_forward import load_unit

MAX_PARTIALS = 512
# A warp spans 256 columns, so that loads and stores are of 16 bytes a thread. The interpreter, slow per program and not
# per element, takes a tile that no GPU would.
TILES = [
    triton.Config({"ROWS": 4, "BLOCK_D": 256, "AT_ONCE": 4}, num_warps=1),
    triton.Config({"ROWS": 8, "BLOCK_D": 256, "AT_ONCE": 2}, num_warps=1),
    triton.Config({"ROWS": 8, "BLOCK_D": 1024, "AT_ONCE": 2}, num_warps=4),
]
INTERPRETED_TILE = triton.Config({"ROWS": 64, "BLOCK_D": 512, "AT_ONCE": 2})


def cosine_error_backward(
    loss_grad: Tensor | None,
    cosine_grad_M: Tensor | None,
    feature_ME: Tensor,
    target_ME: Tensor,
    is_empty_M: Tensor,
    cosine_M: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of feature_ME and target_ME, each in its own dtype; a missing gradient counts as 0."""
    regions, dim = feature_ME.shape
    feature_grad_ME = feature_ME.new_empty(regions, dim)
    target_grad_ME = target_ME.new_empty(regions, dim)
    if regions == 0:
        return feature_grad_ME, target_grad_ME
    with torch.cuda.device_of(feature_ME):
        cosine_backward_kernel[(regions,)](
            loss_grad,
            None if cosine_grad_M is None else cosine_grad_M.contiguous(),
            feature_ME,
            *feature_ME.stride(),
            target_ME,
            *target_ME.stride(),
            is_empty_M,
            cosine_M,
            count,
            feature_grad_ME,
            target_grad_ME,
            dim,
            TINY=TINY_NORM,
            BLOCK_E=triton.next_power_of_2(dim),
            num_warps=4,
        )
    return feature_grad_ME, target_grad_ME


# One program = one region. The norms are computed again: reading the two rows twice costs less than storing anything.
@triton.jit
def cosine_backward_kernel(
    loss_grad_ptr,
    cosine_grad_ptr,
    feature_ptr,
    feature_stride_m,
    feature_stride_e,
    target_ptr,
    target_stride_m,
    target_stride_e,
    empty_ptr,
    cosine_ptr,
    count_ptr,
    feature_grad_ptr,
    target_grad_ptr,
    dim,
    TINY: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    region = tl.program_id(0).to(tl.int64)
    accumulate: tl.constexpr = cosine_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK_E)
    feature, feature_norm, feature_is_long = load_unit(
        feature_ptr + region * feature_stride_m, feature_stride_e, dim, accumulate, TINY, BLOCK_E
    )
    target, target_norm, target_is_long = load_unit(
        target_ptr + region * target_stride_m, target_stride_e, dim, accumulate, TINY, BLOCK_E
    )
    cosine = tl.load(cosine_ptr + region)
    slope = tl.zeros_like(cosine)
    if loss_grad_ptr is not None:
        count = tl.maximum(tl.load(count_ptr), 1).to(accumulate)
        slope += -2.0 * (1.0 - cosine) / count * tl.load(loss_grad_ptr)
    if cosine_grad_ptr is not None:
        slope += tl.load(cosine_grad_ptr + region)
    # Below TINY the norm is a constant, so that the length has no part in the gradient.
    feature_grad = slope * (target - tl.where(feature_is_long, cosine, 0.0) * feature) / feature_norm
    target_grad = slope * (feature - tl.where(target_is_long, cosine, 0.0) * target) / target_norm
    is_empty = tl.load(empty_ptr + region)
    at = region * dim + column
    feature_grad = tl.where(is_empty, 0.0, feature_grad).to(feature_grad_ptr.dtype.element_ty)
    target_grad = tl.where(is_empty, 0.0, target_grad).to(target_grad_ptr.dtype.element_ty)
    tl.store(feature_grad_ptr + at, feature_grad, mask=column < dim)
    tl.store(target_grad_ptr + at, target_grad, mask=column < dim)


def normalise_backward(
    y_grad_MD: Tensor, normal_MD: Tensor, rstd_M: Tensor, is_empty_M: Tensor, ln_weight_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """dp_MD, and the gradients of LayerNorm's weight and bias as (2, D); both in the accumulation dtype."""
    regions, dim = normal_MD.shape
    pooled_grad_MD = torch.empty_like(normal_MD)
    programs = min(regions, MAX_PARTIALS)
    partial_2PD = normal_MD.new_empty(2, programs, dim)
    if regions:
        with torch.cuda.device_of(normal_MD):
            normalise_backward_kernel[(programs,)](
                y_grad_MD.contiguous(),
                normal_MD,
                rstd_M,
                is_empty_M,
                ln_weight_D if ln_weight_D is None else ln_weight_D.contiguous(),
                pooled_grad_MD,
                *partial_2PD,
                regions,
                dim,
                BLOCK_D=triton.next_power_of_2(dim),
                num_warps=8,
            )
    return pooled_grad_MD, partial_2PD.sum(1)


# One program = every P-th region × all of D; its sums for LayerNorm's weight and bias are one row each of P.
@triton.jit(do_not_specialize=["regions"])
def normalise_backward_kernel(
    y_grad_ptr,
    normal_ptr,
    rstd_ptr,
    empty_ptr,
    weight_ptr,
    pooled_grad_ptr,
    weight_grad_ptr,
    bias_grad_ptr,
    regions,
    dim,
    BLOCK_D: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_D)
    in_dim = column < dim
    accumulate = normal_ptr.dtype.element_ty
    weight_grad = tl.zeros([BLOCK_D], dtype=accumulate)
    bias_grad = tl.zeros([BLOCK_D], dtype=accumulate)
    for region in range(program, regions, programs):
        at = tl.full([], region, tl.int64) * dim + column
        is_empty = tl.load(empty_ptr + region)
        wanted = in_dim & (is_empty == 0)
        normal = tl.load(normal_ptr + at, mask=wanted, other=0.0)
        grad = tl.load(y_grad_ptr + at, mask=wanted, other=0.0).to(accumulate)
        weight_grad += grad * normal
        bias_grad += grad
        if weight_ptr is not None:
            grad = grad * tl.load(weight_ptr + column, mask=in_dim, other=0.0).to(accumulate)
        mean = tl.sum(grad, axis=0) / dim
        mean_along = tl.sum(grad * normal, axis=0) / dim
        pooled_grad = (grad - mean - normal * mean_along) * tl.load(rstd_ptr + region)
        tl.store(pooled_grad_ptr + at, tl.where(is_empty, 0.0, pooled_grad), mask=in_dim)
    tl.store(weight_grad_ptr + program * dim + column, weight_grad, mask=in_dim)
    tl.store(bias_grad_ptr + program * dim + column, bias_grad, mask=in_dim)


def pool_backward(
    pooled_grad_MD: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: Sequence[int],
    first_token: int,
    touch: bool,
    tokens_BND: Tensor,
) -> Tensor:
    """The gradient of tokens_BND, in its dtype and, where they are dense, its strides; rows outside the grid get 0."""
    samples, rows, dim = tokens_BND.shape
    grad_BND = torch.empty_like(tokens_BND)
    if grad_BND.numel() == 0:
        return grad_BND
    sorted_M, order_M = torch.sort(sample_index_M, stable=True)
    start_B1 = torch.searchsorted(sorted_M, torch.arange(samples + 1, device=sorted_M.device, dtype=sorted_M.dtype))
    with torch.cuda.device_of(tokens_BND):
        pool_backward_kernel[
            lambda meta: (samples * triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(dim, meta["BLOCK_D"]),)
        ](
            pooled_grad_MD,
            boxes_M4.contiguous(),
            order_M,
            start_B1,
            grad_BND,
            *grad_BND.stride(),
            *grid,
            first_token,
            rows,
            dim,
            triton.next_power_of_2(samples * rows),
            TOUCH=touch,
        )
    return grad_BND


# One program = one tile of tokens of one sample × one tile of D. The regions' dp, M×D, stays in the L2 cache.
# Tuning is free here: whatever the tile, each element adds up its regions in the same order. `magnitude` keeps the tile
# that suits a few tokens, and a GPU half empty, from being taken for many.
@triton.autotune(configs=[INTERPRETED_TILE] if IS_INTERPRETED else TILES, key=["dim", "magnitude"], cache_results=True)
@triton.jit(do_not_specialize=["height", "width", "first_token", "rows", "magnitude"])
def pool_backward_kernel(
    pooled_grad_ptr,
    boxes_ptr,
    order_ptr,
    start_ptr,
    grad_ptr,
    stride_b,
    stride_n,
    stride_d,
    height,
    width,
    first_token,
    rows,
    dim,
    magnitude,  # noqa: ARG001 (read by the autotuner)
    TOUCH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_d, tiles_n = tl.cdiv(dim, BLOCK_D), tl.cdiv(rows, ROWS)
    column = tile % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    row = tile // tiles_d % tiles_n * ROWS + tl.arange(0, ROWS)
    sample = (tile // (tiles_d * tiles_n)).to(tl.int64)
    cell = row - first_token
    in_grid = (cell >= 0) & (cell < height * width)
    x, y = cell % width, cell // width

    sums = tl.zeros([ROWS, BLOCK_D], dtype=pooled_grad_ptr.dtype.element_ty)
    first, last = tl.load(start_ptr + sample), tl.load(start_ptr + sample + 1)
    for begin in range(first, last, AT_ONCE):
        # Unrolled, the loads of several boxes are under way together; one by one, each would wait for the one before.
        for offset in tl.static_range(AT_ONCE):
            exists = begin + offset < last
            region = tl.load(order_ptr + begin + offset, mask=exists, other=0)
            pooled_grad = tl.load(pooled_grad_ptr + region * dim + column, mask=exists & (column < dim), other=0.0)
            x0, y0, x1, y1, is_empty, is_nan = load_box(boxes_ptr, region, exists, height, width)
            weight = axis_share(x0, x1, x, TOUCH) * axis_share(y0, y1, y, TOUCH)
            weight = tl.where(is_nan, float("nan"), weight)
            weight = tl.where(in_grid & (is_empty == 0), weight, 0.0)
            sums += weight.to(sums.dtype)[:, None] * pooled_grad[None, :]
    at = sample * stride_b + row.to(tl.int64)[:, None] * stride_n + column.to(tl.int64)[None, :] * stride_d
    kept = (row < rows)[:, None] & (column < dim)[None, :]
    tl.store(grad_ptr + at, sums.to(grad_ptr.dtype.element_ty), mask=kept)
