"""The token-similarity loss in Triton, as `torch.library` operators: traceable, and differentiable once.

pooling + LayerNorm | projection (torch, cuBLAS) | cosine and error: each of the outer two is one operator with one
operator for its backward, so that torch.compile sees no graph break, and autocast and checkpointing work as ever.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.tsl.reference import Mode, TslResult, accumulation_dtype, projection_dtype
from kernels.tsl.triton_backward import cosine_error_backward, normalise_backward, pool_backward
from kernels.tsl.triton_forward import cosine_error, pool_normalise


def tsl_triton(
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: tuple[int, int],
    ln_weight_D: Tensor | None,
    ln_bias_D: Tensor | None,
    proj_DE: Tensor | None,
    target_ME: Tensor,
    mode: Mode,
    eps: float,
    first_token: int,
) -> TslResult:
    """Arguments as in `tsl_loss`, which has checked them."""
    boxes_M4 = boxes_M4.to(torch.promote_types(boxes_M4.dtype, accumulation_dtype(tokens_BND)))
    dtype = projection_dtype(tokens_BND) if proj_DE is not None else accumulation_dtype(tokens_BND)
    feature_MD, _, _, is_empty_M = pool_op(
        tokens_BND, boxes_M4, sample_index_M, grid, first_token, ln_weight_D, ln_bias_D, mode == "touch", eps, dtype
    )
    feature_ME = feature_MD if proj_DE is None else feature_MD @ proj_DE.to(dtype)
    return TslResult(*cosine_op(feature_ME, target_ME, is_empty_M))


pool_op = torch.library.custom_op("goal_ray::tsl_pool", pool_normalise, mutates_args=())
cosine_op = torch.library.custom_op("goal_ray::tsl_cosine", cosine_error, mutates_args=())
cosine_backward_op = torch.library.custom_op("goal_ray::tsl_cosine_backward", cosine_error_backward, mutates_args=())


@pool_op.register_fake
def _(tokens_BND, boxes_M4, _index, _grid, _first, _weight, _bias, _touch, _eps, out_dtype):
    regions, dim = boxes_M4.shape[0], tokens_BND.shape[2]
    dtype = accumulation_dtype(tokens_BND)
    return (
        tokens_BND.new_empty(regions, dim, dtype=out_dtype),
        tokens_BND.new_empty(regions, dim, dtype=dtype),
        tokens_BND.new_empty(regions, dtype=dtype),
        tokens_BND.new_empty(regions, dtype=torch.bool),
    )


@torch.library.custom_op("goal_ray::tsl_pool_backward", mutates_args=())
def pool_backward_op(
    feature_grad_MD: Tensor,
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: Sequence[int],
    first_token: int,
    ln_weight_D: Tensor | None,
    touch: bool,
    normal_MD: Tensor,
    rstd_M: Tensor,
    is_empty_M: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens, and of LayerNorm's weight and bias as (2, D). The tokens' values are not read."""
    pooled_grad_MD, parameter_grads_2D = normalise_backward(feature_grad_MD, normal_MD, rstd_M, is_empty_M, ln_weight_D)
    tokens_grad_BND = pool_backward(pooled_grad_MD, boxes_M4, sample_index_M, grid, first_token, touch, tokens_BND)
    return tokens_grad_BND, parameter_grads_2D


@pool_backward_op.register_fake
def _(_grad, tokens_BND, _boxes, _index, _grid, _first, _weight, _touch, normal_MD, _rstd, _empty):
    return torch.empty_like(tokens_BND), normal_MD.new_empty(2, normal_MD.shape[1])


def _keep_pool(ctx, inputs, output):
    tokens, boxes, index, ctx.grid, ctx.first_token, weight, bias, ctx.touch, _, _ = inputs
    _, normal, rstd, is_empty = output
    ctx.mark_non_differentiable(normal, rstd, is_empty)
    ctx.set_materialize_grads(False)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(tokens, boxes, index, weight, normal, rstd, is_empty)


def _pool_backward(ctx, feature_grad_MD, *_):
    if feature_grad_MD is None:
        return (None,) * 10
    tokens, boxes, index, weight, normal, rstd, is_empty = ctx.saved_tensors
    tokens_grad, (weight_grad, bias_grad) = pool_backward_op(
        feature_grad_MD,
        tokens,
        boxes,
        index,
        ctx.grid,
        ctx.first_token,
        weight,
        ctx.touch,
        normal,
        rstd,
        is_empty,
    )
    weight_grad = None if weight is None else weight_grad.to(weight.dtype)
    bias_grad = None if ctx.bias_dtype is None else bias_grad.to(ctx.bias_dtype)
    return tokens_grad, None, None, None, None, weight_grad, bias_grad, None, None, None


pool_op.register_autograd(_pool_backward, setup_context=_keep_pool)


@cosine_op.register_fake
def _(feature_ME, _target, _empty):
    dtype = accumulation_dtype(feature_ME)
    return (
        feature_ME.new_empty((), dtype=dtype),
        feature_ME.new_empty(feature_ME.shape[0], dtype=dtype),
        feature_ME.new_empty((), dtype=torch.int64),
    )


@cosine_backward_op.register_fake
def _(_loss_grad, _cosine_grad, feature_ME, target_ME, _empty, _cosine, _count):
    return feature_ME.new_empty(feature_ME.shape), target_ME.new_empty(target_ME.shape)


def _keep_cosine(ctx, inputs, output):
    _, cosine, count = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(count)
    ctx.save_for_backward(*inputs, cosine, count)


def _cosine_backward(ctx, loss_grad, cosine_grad_M, _count_grad):
    if loss_grad is None and cosine_grad_M is None:
        return None, None, None
    return *cosine_backward_op(loss_grad, cosine_grad_M, *ctx.saved_tensors), None


cosine_op.register_autograd(_cosine_backward, setup_context=_keep_cosine)
