"""How a training step computes: switches that change its speed and memory, and its result by rounding alone.

`python -m goal_ray.train.benchmark --switches` measures the worth of each.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU, ResidualAttentionBlock
from torch import Tensor, nn

from goal_ray.errors import ModelError
from goal_ray.model import image_tower, text_tower
from goal_ray.settings import StepConfig

# All blocks share one piece of code, and with it what Dynamo counts: two towers, with and without gradients, of a first
# shape, of any shape and of a batch of 1. Past its limit, 8 by default, it computes uncompiled.
RECOMPILE_LIMIT = 32


class FusedAttention(nn.MultiheadAttention):
    """Self-attention with nn.MultiheadAttention's parameters, without its layout copies and, if causal, its mask.

    causal  a token sees itself and those before it; the mask that the caller gives is then not read
    """

    causal: bool

    def forward(  # type: ignore[override]
        self, x_BLD: Tensor, *_: Tensor, attn_mask: Tensor | None = None, **__: bool
    ) -> tuple[Tensor, None]:
        """Returns (B, L, D) and None, as nn.MultiheadAttention does without weights."""
        batch, length, width = x_BLD.shape
        qkv = F.linear(x_BLD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mask = None if self.causal else attn_mask
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, length, width)), None


class SiluGELU(nn.Module):
    """QuickGELU, x · sigmoid(1.702 x), by the one operator whose backward pass keeps its input and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns what QuickGELU does, to rounding."""
        return F.silu(1.702 * x) / 1.702


def prepare_step(clip: nn.Module, config: StepConfig) -> None:
    """Sets a CLIP up to compute as configured, in place; its parameters keep their names and values.

    Raises ModelError for checkpoint_activations of blocks that open_clip cannot recompute.
    """
    visual, text = image_tower(clip), text_tower(clip)
    if config.checkpoint_activations:
        blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
        # open_clip hands every block the arguments of this kind.
        if other := next((block for block in blocks if not isinstance(block, ResidualAttentionBlock)), None):
            raise ModelError(
                f"step.checkpoint_activations: open_clip cannot recompute a {type(other).__name__} (custom blocks); "
                "set it to false, or choose a model of plain blocks"
            )
    if config.compile:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    for transformer, mask in ((visual.transformer, None), (text.transformer, text.attn_mask)):
        transformer.grad_checkpointing = config.checkpoint_activations
        for block in transformer.resblocks:
            if config.sdpa and is_plain(block):
                block.attn.__class__ = FusedAttention
                block.attn.causal = mask is not None and is_causal(mask)
            if isinstance(getattr(block.mlp, "gelu", None), QuickGELU):
                block.mlp.gelu = SiluGELU()
            if config.compile:
                block.compile()
    if config.channels_last:
        # The pictures alone: cuDNN then reads the small weight as it likes, and DeepSpeed sends no weight but in NCHW.
        visual.conv1.register_forward_pre_hook(
            lambda _, pixels: tuple(each.contiguous(memory_format=torch.channels_last) for each in pixels)
        )


def is_plain(block: Any) -> bool:
    """Whether a block attends by a plain nn.MultiheadAttention of equal widths."""
    attn = getattr(block, "attn", None)
    return (
        type(block) is ResidualAttentionBlock
        and type(attn) is nn.MultiheadAttention
        and attn.batch_first
        and attn.dropout == 0
        and attn.in_proj_weight is not None
        and attn.bias_k is None
    )


def is_causal(mask_LL: Tensor) -> bool:
    """Whether an additive mask hides exactly what lies ahead."""
    ahead = torch.full_like(mask_LL, -torch.inf).triu(1)
    return bool(torch.equal(mask_LL, ahead))
