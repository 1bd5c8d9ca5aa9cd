"""What the Triton kernels are compared with: the published style, and PyTorch as fast as it gets."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.tsl.eager import cell_weights, compare, pool_boxes
from kernels.tsl.reference import Mode, TslResult, accumulation_dtype, projection_dtype


def loop(
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: tuple[int, int],
    ln_weight_D: Tensor,
    ln_bias_D: Tensor,
    proj_DE: Tensor,
    target_ME: Tensor,
    mode: Mode,
    eps: float,
    first_token: int,
) -> TslResult:
    """Region by region in Python, the box read with `.item()`, as the published code does it; `touch` alone."""
    if mode != "touch":
        raise ValueError("the published style knows whole cells alone: touch")
    height, width = grid
    dtype = projection_dtype(tokens_BND)
    cosines = []
    for region in range(len(boxes_M4)):
        x0, y0, x1, y1 = (boxes_M4[region, side].item() for side in range(4))
        cells = [
            first_token + y * width + x
            for y in range(max(0, int(y0)), min(height, -int(-y1 // 1)))
            for x in range(max(0, int(x0)), min(width, -int(-x1 // 1)))
        ]
        index = torch.tensor(cells, device=tokens_BND.device)
        pooled_D = tokens_BND[int(sample_index_M[region].item())][index].float().mean(0)
        feature_D = F.layer_norm(pooled_D, pooled_D.shape, ln_weight_D, ln_bias_D, eps)
        feature_E = (feature_D.to(dtype) @ proj_DE.to(dtype)).float()
        cosines.append(F.cosine_similarity(feature_E, target_ME[region], dim=0))
    cosine_M = torch.stack(cosines)
    return TslResult(((1 - cosine_M) ** 2).mean(), cosine_M, torch.tensor(len(cosines)))


class Regions(NamedTuple):
    """What a pooling may read: arguments of `tsl_loss`, and weights_MN, the cells' weights in each box."""

    boxes_M4: Tensor
    weights_MN: Tensor
    sample_index_M: Tensor
    grid: tuple[int, int]
    first_token: int
    mode: Mode


Pool = Callable[[Tensor, Regions], Tensor]
"""(tokens_BND, regions) -> pooled (M, D) in the accumulation dtype."""


def bag(tokens_BND: Tensor, regions: Regions) -> Tensor:
    """The product's eager pooling: weighted `embedding_bag` over all tokens."""
    dtype = accumulation_dtype(tokens_BND)
    return pool_boxes(tokens_BND.to(dtype), regions.weights_MN.to(dtype), regions.sample_index_M, regions.first_token)


def gather(tokens_BND: Tensor, regions: Regions) -> Tensor:
    """A copy of every region's sample, and a bmm."""
    cells_MND = tokens_BND[:, regions.first_token :].index_select(0, regions.sample_index_M)
    pooled_M1D = torch.bmm(regions.weights_MN[:, None].to(cells_MND), cells_MND)
    return pooled_M1D.squeeze(1).to(accumulation_dtype(tokens_BND))


def padded(tokens_BND: Tensor, regions: Regions) -> Tensor:
    """A bmm per sample. Only where all samples have equally many boxes, in order; others would need a host sync."""
    cells_BND = tokens_BND[:, regions.first_token :]
    weights_BRN = regions.weights_MN.unflatten(0, (len(tokens_BND), -1)).to(cells_BND)
    return torch.bmm(weights_BRN, cells_BND).flatten(0, 1).to(accumulation_dtype(tokens_BND))


def prefix_sums(tokens_BND: Tensor, regions: Regions) -> Tensor:
    """A summed-area table in float32; a box is four reads of it. Whole cells alone: `touch`."""
    if regions.mode != "touch":
        raise ValueError("prefix sums are written for touch, which reads the table at whole cells")
    dtype = accumulation_dtype(tokens_BND)
    cells_BHWD = tokens_BND[:, regions.first_token :].unflatten(1, regions.grid)
    table_BHWD = F.pad(cells_BHWD.cumsum(1, dtype=dtype).cumsum(2), (0, 0, 1, 0, 1, 0))
    x0, y0, x1, y1 = regions.boxes_M4.unbind(1)
    left, right = (each.long().clamp(0, regions.grid[1]) for each in (x0.floor(), x1.ceil()))
    top, bottom = (each.long().clamp(0, regions.grid[0]) for each in (y0.floor(), y1.ceil()))

    def at(y_M: Tensor, x_M: Tensor) -> Tensor:
        return table_BHWD[regions.sample_index_M, y_M, x_M]

    sums_MD = at(bottom, right) - at(bottom, left) - at(top, right) + at(top, left)
    return sums_MD / ((right - left) * (bottom - top)).clamp(min=1)[:, None]


POOLS: dict[str, Pool] = {"bag": bag, "gather": gather, "padded": padded, "prefix sums": prefix_sums}


RAGGED = tuple(name for name in POOLS if name != "padded")
"""The poolings that meet the contract: any number of boxes on any sample."""


def eager_with(pool: Pool) -> Callable[..., TslResult]:
    """The eager loss around another pooling; arguments and result as in `tsl_eager`."""

    def loss(
        tokens_BND, boxes_M4, sample_index_M, grid, ln_weight_D, ln_bias_D, proj_DE, target_ME, mode, eps, first_token
    ):
        weights_MN, is_empty_M = cell_weights(boxes_M4, grid, mode)
        pooled_MD = pool(tokens_BND, Regions(boxes_M4, weights_MN, sample_index_M, grid, first_token, mode))
        return compare(
            pooled_MD, is_empty_M, ln_weight_D, ln_bias_D, proj_DE, target_ME, eps, projection_dtype(tokens_BND)
        )

    return loss
