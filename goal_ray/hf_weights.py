"""Names of tensors: open_clip's state dict to and from that of transformers' CLIPModel. Needs no transformers.

open_clip keeps one tensor for queries, keys and values, and projections as (in, out); CLIPModel keeps three, and
(out, in). Nothing is computed: a round trip gives the same bits.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from goal_ray.errors import ModelError

_TOWERS = {
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "transformer.resblocks": "text_model.encoder.layers",
}
_LAYER_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_MODULES = {
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "ln_final": "text_model.final_layer_norm",
}
_TENSORS = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_TRANSPOSED = ("visual.proj", "text_projection")
_ATTENTION = ("q", "k", "v")


def is_hf_layout(weights: Mapping[str, Any]) -> bool:
    """Whether a state dict is that of transformers' CLIPModel."""
    return "text_model.embeddings.token_embedding.weight" in weights


def hf_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """CLIPModel's state dict from that of open_clip's `CLIP` or `CustomTextCLIP`. ModelError for unknown names."""
    renamed: dict[str, Tensor] = {}
    for given, tensor in weights.items():
        name = given.removeprefix("text.")
        joined = re.fullmatch(r"(.+\.\d+)\.attn\.in_proj_(weight|bias)", name)
        if joined is not None:
            layer = _renamed(joined[1] + ".ln_1", _TO_HF).removesuffix(".layer_norm1")
            for letter, part in zip(_ATTENTION, tensor.chunk(3), strict=True):
                renamed[f"{layer}.self_attn.{letter}_proj.{joined[2]}"] = part.clone()
            continue
        if name == "logit_scale":
            tensor = tensor.reshape(())
        renamed[_renamed(name, _TO_HF)] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return renamed


def open_clip_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of open_clip's `CLIP` from CLIPModel's. Raises ModelError for unknown names."""
    renamed: dict[str, Tensor] = {}
    for given, tensor in weights.items():
        split = re.fullmatch(r"(.+\.\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", given)
        if split is not None:
            if split[2] == "q":
                layer = _renamed(split[1] + ".layer_norm1", _FROM_HF).removesuffix(".ln_1")
                names = [f"{split[1]}.self_attn.{letter}_proj.{split[3]}" for letter in _ATTENTION]
                missing = [name for name in names if name not in weights]
                if missing:
                    raise ModelError(f"the weights lack {missing[0]}")
                renamed[f"{layer}.attn.in_proj_{split[3]}"] = torch.cat([weights[name] for name in names])
        elif not given.endswith(".position_ids"):  # a buffer that older files hold
            name = _renamed(given, _FROM_HF)
            renamed[name] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
    return renamed


def _table(inverse: bool) -> list[tuple[re.Pattern[str], str]]:
    """(pattern of a whole name, its replacement) one way or the other."""

    def pairs(table: dict[str, str]) -> list[tuple[str, str]]:
        return [(there, here) if inverse else (here, there) for here, there in table.items()]

    rules = [(re.escape(old), new) for old, new in pairs(_TENSORS)]
    rules += [(re.escape(old) + r"\.(weight|bias)", new + r".\1") for old, new in pairs(_MODULES)]
    rules += [
        (rf"{re.escape(old)}\.(\d+)\.{re.escape(part)}(\.weight|\.bias|)", rf"{new}.\1.{new_part}\2")
        for old, new in pairs(_TOWERS)
        for part, new_part in pairs(_LAYER_PARTS)
    ]
    return [(re.compile(pattern), new) for pattern, new in rules]


_TO_HF, _FROM_HF = _table(inverse=False), _table(inverse=True)


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        if found := pattern.fullmatch(name):
            return found.expand(replacement)
    raise ModelError(f"the tensor {name} has no place in the other of the layouts of open_clip and Hugging Face's CLIP")
