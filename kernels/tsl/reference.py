"""The definition of the token-similarity loss: one region and one cell at a time. Slow; every backend must agree."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Mode = Literal["coverage", "touch"]
TINY_NORM = 1e-12


class TslResult(NamedTuple):
    """What `tsl_loss` gives; differentiable but for the count.

    loss      () mean of (1 - cosine)² over the boxes that cover anything, 0 where none does
    cosine_M  similarity of pooled tokens and target, 0 for an empty box; float64 for float64 tokens, else float32
    count     () int64, boxes that cover anything; averaging the loss over ranks needs it
    """

    loss: Tensor
    cosine_M: Tensor
    count: Tensor  # type: ignore[assignment]  # tuple.count is of no use here


def accumulation_dtype(tokens_BND: Tensor) -> torch.dtype:
    """float64 for float64 tokens, else float32: what every backend accumulates and answers in."""
    return torch.float64 if tokens_BND.dtype == torch.float64 else torch.float32


def projection_dtype(tokens_BND: Tensor) -> torch.dtype:
    """What the projection multiplies in: bfloat16 for bfloat16 tokens, as autocast would, for the GPU's tensor cores.

    float16 is left at float32: the gradients of a mean over many boxes would underflow.
    """
    return torch.bfloat16 if tokens_BND.dtype == torch.bfloat16 else accumulation_dtype(tokens_BND)


def tsl_reference(
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
    """Arguments as in `tsl_loss`, which has checked them. Source: GOAL (arXiv 2503.17782), token similarity loss."""
    dtype = accumulation_dtype(tokens_BND)
    tokens, target = tokens_BND.to(dtype), target_ME.to(dtype)
    ln_weight, ln_bias, proj = (None if each is None else each.to(dtype) for each in (ln_weight_D, ln_bias_D, proj_DE))
    # A sum over no rows: ties the loss to every input, so that backward gives zeros also where all boxes are empty.
    inputs = (tokens, target, ln_weight, ln_bias, proj)
    total = torch.stack([each[:0].sum() for each in inputs if each is not None]).sum()
    cosines: list[Tensor] = []
    count = 0
    for box, sample, target_E in zip(boxes_M4.tolist(), sample_index_M.tolist(), target, strict=True):
        pooled_D = pool_cells(tokens[sample, first_token:], box, grid, mode)
        if pooled_D is None:
            cosines.append(total.new_zeros(()))
            continue
        centred_D = pooled_D - pooled_D.mean()
        feature = centred_D / torch.sqrt(centred_D.square().mean() + eps)
        if ln_weight is not None:
            feature = feature * ln_weight
        if ln_bias is not None:
            feature = feature + ln_bias
        if proj is not None:
            feature = feature @ proj
        cosine = unit(feature) @ unit(target_E)
        cosines.append(cosine)
        total = total + (1 - cosine) ** 2
        count += 1
    cosine_M = torch.stack(cosines) if cosines else total.new_zeros(0)
    return TslResult(total / max(count, 1), cosine_M, torch.tensor(count, device=tokens_BND.device))


def pool_cells(
    tokens_ND: Tensor, box: tuple[float, float, float, float], grid: tuple[int, int], mode: Mode
) -> Tensor | None:
    """Weighted mean (D,) of the cells that the box (x0, y0, x1, y1) overlaps; None where it overlaps none.

    NaN for a NaN box.
    """
    height, width = grid
    x0, y0, x1, y1 = box
    if any(map(math.isnan, box)):
        return tokens_ND.sum(0) * math.nan
    sum_D = tokens_ND.new_zeros(tokens_ND.shape[1])
    sum_of_weights = 0.0
    for y in range(height):
        for x in range(width):
            overlap_x = min(x1, x + 1) - max(x0, x)
            overlap_y = min(y1, y + 1) - max(y0, y)
            if overlap_x <= 0 or overlap_y <= 0:
                continue
            weight = overlap_x * overlap_y if mode == "coverage" else 1.0
            sum_D = sum_D + weight * tokens_ND[y * width + x]
            sum_of_weights += weight
    return sum_D / sum_of_weights if sum_of_weights > 0 else None


def unit(vector_E: Tensor) -> Tensor:
    """The vector at length 1; a zero vector stays zero, so that its cosine is 0."""
    return vector_E / vector_E.norm().clamp(min=TINY_NORM)
