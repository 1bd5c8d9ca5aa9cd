"""What is measured: shapes of real towers, random input for them, and the bytes that no implementation can avoid."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.tsl.eager import cell_weights

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    """A tower's grid (H, W), the tokens before its first cell, its width D, its embedding's width E."""

    grid: tuple[int, int]
    first_token: int
    dim: int
    embed: int


SHAPES = {
    "B/16": Shape((14, 14), 1, 768, 512),
    "L/14": Shape((16, 16), 1, 1024, 768),
    "L/14@336": Shape((24, 24), 1, 1024, 768),
    "text 248": Shape((1, 248), 0, 768, 768),
}


@dataclass(frozen=True)
class Case:
    """One point of the benchmark: a name in SHAPES, B samples with `regions` boxes each, a name in DTYPES."""

    shape: str
    batch: int
    regions: int
    dtype: str

    def inputs(self, device: str, seed: int = 0) -> dict[str, Any]:
        """Arguments of `tsl_loss`, random: tokens in the case's dtype, parameters in float32, as under autocast.

        A box's sides are 20 % to 90 % of the grid's, a sentence 5 % to 25 % of the text, each placed anywhere within.
        """
        shape = SHAPES[self.shape]
        random = torch.Generator(device).manual_seed(seed)
        height, width = shape.grid
        rows = shape.first_token + height * width
        regions = self.batch * self.regions

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=random, device=device)

        is_text = height == 1
        low, high = (0.05, 0.25) if is_text else (0.2, 0.9)
        side_M2 = low + (high - low) * torch.rand(regions, 2, generator=random, device=device)
        corner_M2 = torch.rand(regions, 2, generator=random, device=device) * (1 - side_M2)
        if is_text:
            side_M2[:, 1], corner_M2[:, 1] = 1, 0
        scale_2 = torch.tensor([width, height], device=device)
        return {
            "tokens_BND": normal(self.batch, rows, shape.dim).to(DTYPES[self.dtype]),
            "boxes_M4": torch.cat([corner_M2, corner_M2 + side_M2], dim=1) * scale_2.repeat(2),
            "sample_index_M": torch.arange(self.batch, device=device).repeat_interleave(self.regions),
            "grid": shape.grid,
            "ln_weight_D": 1 + 0.1 * normal(shape.dim),
            "ln_bias_D": 0.1 * normal(shape.dim),
            "proj_DE": normal(shape.dim, shape.embed) * shape.dim**-0.5,
            "target_ME": normal(regions, shape.embed),
            "first_token": shape.first_token,
        }


def necessary_bytes(inputs: dict[str, Any]) -> tuple[int, int]:
    """Bytes that forward and backward must move at least, everything else being in caches.

    forward: read each token that lies under any box once, the projection and the targets; backward: write the gradient
    of all tokens, read targets and projection again, and write their gradients.
    """
    tokens_BND, target_ME, proj_DE = inputs["tokens_BND"], inputs["target_ME"], inputs["proj_DE"]
    weights_MN, _ = cell_weights(inputs["boxes_M4"], inputs["grid"], "touch")
    covered_BN = weights_MN.new_zeros(len(tokens_BND), weights_MN.shape[1])
    cells = int(covered_BN.index_add_(0, inputs["sample_index_M"], weights_MN).count_nonzero())
    forward = cells * tokens_BND.shape[2] * tokens_BND.element_size() + proj_DE.nbytes + target_ME.nbytes
    return forward, tokens_BND.nbytes + 2 * proj_DE.nbytes + 2 * target_ME.nbytes
