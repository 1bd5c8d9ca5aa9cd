"""A SAM or MobileSAM from its weights."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from goal_ray.errors import ModelError
from goal_ray.regions.weights import OFFICIAL, read_state

ENCODER = "image_encoder."
TINY_VIT = f"{ENCODER}patch_embed.seq."


def load_sam(path: Path) -> Any:
    """The Sam that a checkpoint (.pth, .pt or .safetensors) holds, in eval mode, on the CPU; executes no code from it.

    Raises ModelError where the file is damaged or no SAM.
    """
    state = read_state(path)
    try:
        if any(name.startswith(TINY_VIT) for name in state):
            state = as_timm(state)
        sam = empty_sam({name: tuple(tensor.shape) for name, tensor in state.items()})
        sam.load_state_dict(state)
    except (AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{path}: not a SAM checkpoint: {error}; one of {', '.join(OFFICIAL)} is") from error
    return sam.float().eval()


def empty_sam(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A Sam whose weights have these shapes; raises KeyError where one is missing that tells the architecture.

    What all official SAMs share (`segment_anything.build_sam`) is written out.
    """
    from segment_anything.modeling import MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    encoder = MobileEncoder() if f"{ENCODER}body.patch_embed.conv1.conv.weight" in shapes else empty_vit(shapes)
    embedding = shapes["mask_decoder.iou_token.weight"][1]
    grid = encoder.img_size // encoder.patch_px
    return Sam(
        image_encoder=encoder,
        prompt_encoder=PromptEncoder(
            embed_dim=embedding,
            image_embedding_size=(grid, grid),
            input_image_size=(encoder.img_size, encoder.img_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=embedding, mlp_dim=2048, num_heads=8),
            transformer_dim=embedding,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )


def empty_vit(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """An image encoder; width, depth, heads, windows and image size are read from its weights' shapes."""
    from segment_anything.modeling import ImageEncoderViT

    patch_px = shapes["image_encoder.patch_embed.proj.weight"][-1]
    _, grid, _, width = shapes["image_encoder.pos_embed"]
    # Relative positions, (2 * side - 1, head width): side is the whole grid in blocks of global attention.
    depth = sum(name.endswith("attn.rel_pos_h") for name in shapes)
    positions = [shapes[f"image_encoder.blocks.{block}.attn.rel_pos_h"] for block in range(depth)]
    sides = [(length + 1) // 2 for length, _ in positions]
    encoder = ImageEncoderViT(
        depth=depth,
        embed_dim=width,
        img_size=grid * patch_px,
        mlp_ratio=4,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=width // positions[0][1],
        patch_size=patch_px,
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=tuple(block for block, side in enumerate(sides) if side == grid),
        window_size=min(sides),
        out_chans=shapes["image_encoder.neck.0.weight"][0],
    )
    encoder.patch_px = patch_px
    for number in (1, 3):
        in_float32(encoder.neck[number])
    return encoder


def in_float32(norm: nn.Module) -> nn.Module:
    """A LayerNorm2d of segment-anything that computes in float32, whatever its weights and inputs are in.

    It squares, and in fp16 the squares of the encoders' last features come near to the largest number.
    """
    norm.register_forward_pre_hook(lambda _, given: (given[0].float(),))
    norm.register_forward_hook(lambda norm, _, result: result.to(norm.weight.dtype))
    return norm


class MobileEncoder(nn.Module):
    """MobileSAM's image encoder: timm's TinyViT of 5 M parameters, whose last stage does not shrink, and SAM's neck.

    Source: Faster Segment Anything (arXiv 2306.14289).
    """

    img_size, patch_px = 1024, 16

    def __init__(self) -> None:
        super().__init__()
        from segment_anything.modeling.common import LayerNorm2d
        from timm.models.tiny_vit import TinyVit

        body: Any = TinyVit(num_classes=0, embed_dims=(64, 128, 160, 320), num_heads=(2, 4, 5, 10), drop_path_rate=0.0)
        body.head = nn.Identity()
        body.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.body = body
        self.neck = nn.Sequential(
            nn.Conv2d(320, 256, 1, bias=False),
            in_float32(LayerNorm2d(256)),
            nn.Conv2d(256, 256, 3, padding=1, bias=False),
            in_float32(LayerNorm2d(256)),
        )

    def forward(self, pixels_I3SS: Tensor) -> Tensor:
        """Features (I, 256, 64, 64) of normalised, padded pictures."""
        return self.neck(self.body.stages(self.body.patch_embed(pixels_I3SS)))


def as_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MobileSAM's weights under the names that MobileEncoder gives them; its unused classifier is left out."""
    named = {}
    for name, tensor in state.items():
        if re.match(rf"{re.escape(ENCODER)}(norm_head|head)\.|.*attention_bias_idxs$", name):
            continue
        if name.startswith(ENCODER) and ".neck." not in name:
            name = name.replace(ENCODER, f"{ENCODER}body.").replace(".c.weight", ".conv.weight")
            name = name.replace("patch_embed.seq.0.", "patch_embed.conv1.").replace(
                "patch_embed.seq.2.", "patch_embed.conv2."
            )
            # timm shrinks where a stage begins, MobileSAM where the one before ends.
            name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) + 1}.downsample", name)
            name = name.replace("layers.", "stages.")
        named[name] = tensor
    return named
