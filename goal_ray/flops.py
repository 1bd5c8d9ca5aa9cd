"""Floating-point operations of CLIP's towers and of a training step, from the shapes of a model's own weights.

Two for each multiply-add of matrix products and convolutions; LayerNorms, activations and the optimizer, below 1 % of a
tower, are left out, and so are the contrastive logits and the TSL. Attention counts every pair of tokens, also those
that a causal mask hides. Useful work alone is counted: forwards that activation checkpointing repeats, and what fused
attention kernels compute again in the backward pass, are not.
"""

import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from goal_ray.model import image_tower, text_tower


class Product(NamedTuple):
    """A matrix product, or an attention's two, in the order of the forward pass.

    flops    in a forward pass
    weight   gets a gradient from this product: one more of these in the backward pass
    input    passes a gradient on to what lies before it: one more
    """

    flops: int
    weight: bool
    input: bool

    @property
    def step_flops(self) -> int:
        """In a forward and a backward pass."""
        return self.flops * (1 + self.weight + self.input)


def step_flops(clip: nn.Module, images: int, text_lengths: Sequence[int]) -> int:
    """Of the towers' forward and backward passes in one training step.

    images        pictures and crops
    text_lengths  tokens of every caption and sentence, as padded in its batch

    Each product costs its forward, once more for the gradient of a weight that is trained, and once more for the
    gradient of an input that something trained lies before: three times the forward where all is trained (but for the
    patches' convolution, before which nothing lies), the forward alone in a frozen tower. Call it before the parameters
    are sharded: a shard does not show their shapes.
    """
    per_image = sum(product.step_flops for product in image_products(clip))
    of_length = {
        length: sum(product.step_flops for product in text_products(clip, length)) for length in set(text_lengths)
    }
    return images * per_image + sum(of_length[length] for length in text_lengths)


def image_products(clip: nn.Module) -> Iterator[Product]:
    """Those of one picture. Raises ModelError for towers that GOAL cannot read."""
    visual = image_tower(clip)
    patches = visual.grid_size[0] * visual.grid_size[1]
    kernel = visual.conv1.weight
    yield Product(2 * patches * kernel.numel(), kernel.requires_grad, False)
    before = [*visual.conv1.parameters(), visual.class_embedding, visual.positional_embedding]
    moves = trained(before) or trained(visual.ln_pre.parameters())
    yield from block_products(visual.transformer.resblocks, patches + 1, moves)
    moves = moves or trained(visual.transformer.parameters()) or trained(visual.ln_post.parameters())
    yield from projection_products(visual.proj, moves)


def text_products(clip: nn.Module, length: int) -> Iterator[Product]:
    """Those of one text of `length` tokens, padding included; a tower that is not causal reads its whole context."""
    tower = text_tower(clip)
    tokens = length if tower.causal else tower.positional_embedding.shape[0]
    moves = trained([*tower.token_embedding.parameters(), tower.positional_embedding])
    yield from block_products(tower.transformer.resblocks, tokens, moves)
    moves = moves or trained(tower.transformer.parameters()) or trained(tower.ln_final.parameters())
    yield from projection_products(tower.projection_DE, moves)


def block_products(blocks: Iterable[Any], tokens: int, moves: bool) -> Iterator[Product]:
    """Those of transformer blocks on `tokens` tokens; `moves` says whether a gradient goes on to what lies before."""
    for block in blocks:
        parameters = list(block.parameters())  # in the order in which the forward pass meets them
        for parameter in parameters:
            if parameter.ndim == 2:
                yield Product(2 * tokens * parameter.numel(), parameter.requires_grad, moves)
            moves = moves or parameter.requires_grad
        # The scores' and the values' product; each has two inputs, so a gradient for all costs twice the forward.
        yield Product(4 * tokens * tokens * block.attn.out_proj.in_features, moves, moves)


def projection_products(projection_DE: Tensor | None, moves: bool) -> Iterator[Product]:
    """The pooled token's projection."""
    if projection_DE is not None:
        yield Product(2 * projection_DE.numel(), projection_DE.requires_grad, moves)


def trained(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of the parameters is."""
    return any(parameter.requires_grad for parameter in parameters)


class Peak(NamedTuple):
    """FLOP/s of dense matrix products, accumulated in float32, by the vendor's data sheet; None where it has none."""

    bf16: float | None
    tf32: float | None
    fp32: float


# By a part of the name that torch.cuda.get_device_name gives; the first that fits counts.
PEAKS = {
    "B200": Peak(2250e12, 1125e12, 75e12),
    "H200 NVL": Peak(835.5e12, 417.5e12, 60e12),
    "H200": Peak(989.4e12, 494.7e12, 66.9e12),
    "GH200": Peak(989.4e12, 494.7e12, 66.9e12),
    "H100 NVL": Peak(835.5e12, 417.5e12, 60e12),
    "H100 PCIe": Peak(756e12, 378e12, 51.2e12),
    "H100": Peak(989.4e12, 494.7e12, 66.9e12),
    "A100": Peak(312e12, 156e12, 19.5e12),
    "A40": Peak(149.7e12, 74.8e12, 37.4e12),
    "A30": Peak(165e12, 82e12, 10.3e12),
    "A10G": Peak(70e12, 35e12, 31.5e12),
    "A10": Peak(125e12, 62.5e12, 31.2e12),
    "RTX A6000": Peak(154.8e12, 77.4e12, 38.7e12),
    "L40S": Peak(362e12, 183e12, 91.6e12),
    "L40": Peak(181e12, 90.5e12, 90.5e12),
    "L4": Peak(121e12, 60e12, 30.3e12),
    "RTX 4090": Peak(165.2e12, 82.6e12, 82.6e12),
    "RTX 3090": Peak(71e12, 35.6e12, 35.6e12),
    "V100": Peak(None, None, 15.7e12),
    "T4": Peak(None, None, 8.1e12),
}

# What follows the name in that of another card: RTX 4090 Laptop GPU, RTX 4090 D, RTX 3090 Ti.
OTHER_CARDS = ("laptop ", "d ", "ti ")

PEAK_TRIAL_S = 1.0


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s that the device can reach at most in matrix products of bfloat16 or float32; None where it is unknown.

    On a GPU the data sheet's. float32 is TF32's where PyTorch may use TF32 (`torch.set_float32_matmul_precision`). On
    a CPU, where clocks and vector units vary, what a large matrix product reaches: measured, some seconds, once.
    """
    if device.type == "cpu":
        return measured_peak(dtype)
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = peak_of(name)
    if peak is None or dtype not in (torch.bfloat16, torch.float32):
        return None
    if dtype == torch.bfloat16:
        return peak.bf16
    may_use_tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak.tf32 if may_use_tf32 and peak.tf32 is not None else peak.fp32


def peak_of(name: str) -> Peak | None:
    """A GPU's peaks by its full name, None for one that is not in the table, and for a MIG slice of one."""
    words = f" {name} ".replace("-", " ").lower()
    if " mig " in words:
        return None
    for part, peak in PEAKS.items():
        _, found, behind = words.partition(f" {part.lower()} ")
        if found:
            return None if behind.startswith(OTHER_CARDS) else peak
    return None


@functools.cache
def measured_peak(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of many products of two square matrices on this CPU, with PyTorch's threads.

    The matrices grow to 4096² unless that would take long, as bfloat16 does on CPUs without instructions for it. Each
    size is tried for PEAK_TRIAL_S, so that a moment in which something else runs does not count.
    """
    best = 0.0
    for side in (256, 512, 1024, 2048, 4096):
        left, right = torch.randn(2, side, side).to(dtype)
        torch.mm(left, right)  # wakes the threads
        seconds: list[float] = []
        while sum(seconds) < PEAK_TRIAL_S:
            began = time.perf_counter()
            torch.mm(left, right)
            seconds.append(time.perf_counter() - began)
        best = max(best, 2 * side**3 / min(seconds))
        if min(seconds) > PEAK_TRIAL_S / 8:
            return best
    return best
