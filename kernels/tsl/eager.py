"""The token-similarity loss in vectorised PyTorch: no host synchronisation, traceable as one graph.

The pooling is where memory goes. Of its formulations
  gather  tokens[sample_index] and a bmm: an M×N×D copy, and another in backward;
  dense   one (M, B·N) matrix of weights times the tokens: no copy, but B times the arithmetic;
  padded  a bmm per sample: needs the largest number of boxes on a sample, which only a host synchronisation tells;
  bag     `embedding_bag` over the tokens as a table of B·N rows, a bag of N weighted rows for each box;
the bag is the one whose memory is linear in M, at M×N indices and weights, and whose arithmetic does not grow with B.
(On CUDA its backward sorts the indices and may hold partial sums, about M×N×D where boxes are few; Triton's does not.)
Its table is in the accumulation dtype: bf16 tokens cost a float32 copy, B×N×D, in place of weights rounded to 8 bits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tsl.reference import TINY_NORM, Mode, TslResult, accumulation_dtype, projection_dtype


def tsl_eager(
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
    """Arguments as in `tsl_loss`, which has checked them. Cells outside a box are read at weight 0: NaN spreads."""
    dtype = accumulation_dtype(tokens_BND)
    boxes_M4 = boxes_M4.detach().to(torch.promote_types(boxes_M4.dtype, dtype))
    weights_MN, is_empty_M = cell_weights(boxes_M4, grid, mode)
    pooled_MD = pool_boxes(tokens_BND.to(dtype), weights_MN.to(dtype), sample_index_M, first_token)
    return compare(pooled_MD, is_empty_M, ln_weight_D, ln_bias_D, proj_DE, target_ME, eps, projection_dtype(tokens_BND))


def cell_weights(boxes_M4: Tensor, grid: tuple[int, int], mode: Mode) -> tuple[Tensor, Tensor]:
    """Each cell's share of its box, (M, H·W), rows summing to 1 or all 0; and whether the box is empty, bool (M,).

    The overlap is separable, and so is its normalisation: a per-axis share neither over- nor underflows for any box.
    A NaN box, which only a device can hide from `tsl_loss`, is not empty: it must show as a NaN loss.
    """
    height, width = grid
    x0_M, y0_M, x1_M, y1_M = boxes_M4.to(torch.promote_types(boxes_M4.dtype, torch.float32)).unbind(1)
    across_MW = axis_overlap(x0_M, x1_M, width)
    down_MH = axis_overlap(y0_M, y1_M, height)
    if mode == "touch":  # sign() would take NaN for 0
        across_MW, down_MH = (torch.where(each > 0, 1, each) for each in (across_MW, down_MH))
    across_M1, down_M1 = across_MW.sum(1, keepdim=True), down_MH.sum(1, keepdim=True)
    is_empty_M1 = torch.minimum(across_M1, down_M1) <= 0  # a minimum with NaN is NaN
    across_MW = across_MW / torch.where(is_empty_M1, 1, across_M1)
    down_MH = down_MH / torch.where(is_empty_M1, 1, down_M1)
    return (down_MH[:, :, None] * across_MW[:, None, :]).flatten(1), is_empty_M1.squeeze(1)


def axis_overlap(low_M: Tensor, high_M: Tensor, cells: int) -> Tensor:
    """Length that [low, high] and each unit cell of an axis have in common, (M, cells)."""
    edge = torch.arange(cells, device=low_M.device, dtype=low_M.dtype)
    return (torch.minimum(high_M[:, None], edge + 1) - torch.maximum(low_M[:, None], edge)).clamp(min=0)


def pool_boxes(tokens_BND: Tensor, weights_MN: Tensor, sample_index_M: Tensor, first_token: int) -> Tensor:
    """Weighted sum (M, D) of the tokens of each box's sample, without copying the tokens once per box."""
    rows = tokens_BND.shape[1]
    index_MN = sample_index_M.long()[:, None] * rows + torch.arange(first_token, rows, device=sample_index_M.device)
    return F.embedding_bag(index_MN, tokens_BND.flatten(0, 1), per_sample_weights=weights_MN, mode="sum")


def compare(
    pooled_MD: Tensor,
    is_empty_M: Tensor,
    ln_weight_D: Tensor | None,
    ln_bias_D: Tensor | None,
    proj_DE: Tensor | None,
    target_ME: Tensor,
    eps: float,
    projection: torch.dtype,
) -> TslResult:
    """LayerNorm, projection, cosine and squared error of pooled tokens, in their dtype; empty boxes do not count.

    projection  the dtype in which the projection multiplies
    """
    dtype = pooled_MD.dtype
    weight_D, bias_D = (None if each is None else each.to(dtype) for each in (ln_weight_D, ln_bias_D))
    feature = F.layer_norm(pooled_MD, pooled_MD.shape[1:], weight_D, bias_D, eps)
    if proj_DE is not None:
        feature = (feature.to(projection) @ proj_DE.to(projection)).to(dtype)
    feature_ME = F.normalize(feature, dim=1, eps=TINY_NORM)
    cosine_M = (feature_ME * F.normalize(target_ME.to(dtype), dim=1, eps=TINY_NORM)).sum(1)
    cosine_M = torch.where(is_empty_M, 0, cosine_M)
    count = (~is_empty_M).sum()
    loss = torch.where(is_empty_M, 0, (1 - cosine_M) ** 2).sum() / count.clamp(min=1)
    return TslResult(loss, cosine_M, count)
