"""Settings: open_clip's architecture and preprocessing to and from the JSON files of transformers' CLIPModel.

Needs no transformers. What one side cannot express is refused, never dropped, but for `attention_dropout`: it changes
no embedding.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from goal_ray.errors import ModelError

VOCABULARY, START_ID, END_ID = 49408, 49406, 49407
_RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL.Image.Resampling

# Hugging Face's defaults, which its config.json may leave out.
_HF_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": END_ID,
}
_HF_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
# What a section of open_clip's config may say: what the layout carries, and what changes no embedding.
_CARRIED = {"width", "layers", "mlp_ratio", "norm_kwargs", "act_kwargs"}
_CARRIED_VISION = {*_CARRIED, "head_width", "patch_size", "image_size"}
_CARRIED_TEXT = {*_CARRIED, "heads", "context_length", "vocab_size"}
_INDIFFERENT_VISION = {"pos_embed_type", "final_ln_after_pool", "output_tokens", "timm_model_pretrained"}
_INDIFFERENT_TEXT = {"pad_id", "eos_id", "final_ln_after_pool", "output_tokens", "hf_model_pretrained"}
_TOP = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "nonscalar_logit_scale"}


def hf_config(model_cfg: Mapping[str, Any], logit_scale: float) -> dict[str, Any]:
    """CLIPModel's config.json for an open_clip architecture; `logit_scale` is the parameter's value, a logarithm.

    Raises ModelError naming the first setting that CLIPModel cannot express.
    """
    for name in sorted(model_cfg.keys() - _TOP):
        if model_cfg[name] is not None:
            raise ModelError(f"Hugging Face's CLIPModel cannot express {name}={model_cfg[name]!r}")
    vision, text = CLIPVisionCfg(**model_cfg["vision_cfg"]), CLIPTextCfg(**model_cfg["text_cfg"])
    _refuse_others("vision_cfg", vision, _CARRIED_VISION | _INDIFFERENT_VISION)
    by_end = text.pool_type == "eos" and text.eos_id == END_ID
    _refuse_others("text_cfg", text, _CARRIED_TEXT | _INDIFFERENT_TEXT | ({"pool_type"} if by_end else set()))
    quick = bool(model_cfg.get("quick_gelu"))
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model_cfg["embed_dim"],
        "logit_scale_init_value": logit_scale,
        "text_config": {
            "model_type": "clip_text_model",
            **_hf_tower("text_cfg", text, quick),
            "num_attention_heads": text.heads,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            "projection_dim": model_cfg["embed_dim"],
            "bos_token_id": START_ID,
            "eos_token_id": END_ID,
            "pad_token_id": END_ID,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            **_hf_tower("vision_cfg", vision, quick),
            "num_attention_heads": vision.width // vision.head_width,
            "image_size": _square("vision_cfg.image_size", vision.image_size),
            "patch_size": _square("vision_cfg.patch_size", vision.patch_size),
            "projection_dim": model_cfg["embed_dim"],
        },
    }


def _refuse_others(section: str, config: Any, allowed: set[str]) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain = (field.default, None, "default") if field.name == "block_type" else (field.default,)
        if field.name not in allowed and value not in plain:
            raise ModelError(f"Hugging Face's CLIPModel cannot express {section}.{field.name}={value!r}")


def _hf_tower(section: str, config: Any, quick_gelu: bool) -> dict[str, Any]:
    activation, norm = config.act_kwargs or {}, config.norm_kwargs or {}
    tanh = activation == {"approximate": "tanh"} and not quick_gelu
    if (activation and not tanh) or norm.keys() - {"eps"}:
        raise ModelError(f"Hugging Face's CLIPModel cannot express {section}'s {activation or norm}")
    return {
        "hidden_size": config.width,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_hidden_layers": config.layers,
        "hidden_act": "quick_gelu" if quick_gelu else "gelu_pytorch_tanh" if tanh else "gelu",
        "layer_norm_eps": norm.get("eps", 1e-5),
    }


def _square(name: str, size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ModelError(f"{name}={size!r}: only squares are supported")
    return int(sides.pop())


def open_clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's architecture (`model_cfg`) for a config.json of CLIPModel. Raises ModelError where there is none."""
    text, vision = _hf_section(config, "text_config", _HF_TEXT), _hf_section(config, "vision_config", _HF_VISION)
    if text["hidden_act"] != vision["hidden_act"]:
        raise ModelError(f"hidden_act differs between the towers ({text['hidden_act']}, {vision['hidden_act']})")
    if text["vocab_size"] != VOCABULARY or text["eos_token_id"] not in (2, END_ID):
        raise ModelError(
            f"vocab_size={text['vocab_size']} and eos_token_id={text['eos_token_id']}: not CLIP's own vocabulary of "
            f"{VOCABULARY} tokens, the one supported here"
        )
    if vision["num_channels"] != 3:
        raise ModelError(f"num_channels={vision['num_channels']}; only RGB pictures are supported")
    heads = vision["num_attention_heads"]
    return {
        "embed_dim": config.get("projection_dim", 512),
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            **_open_clip_tower(vision),
            "head_width": vision["hidden_size"] // heads,
            "image_size": _square("image_size", vision["image_size"]),
            "patch_size": _square("patch_size", vision["patch_size"]),
        },
        "text_cfg": {
            **_open_clip_tower(text),
            "heads": text["num_attention_heads"],
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
        },
    }


def _hf_section(config: Mapping[str, Any], name: str, defaults: dict[str, Any]) -> dict[str, Any]:
    """A section with its defaults; `text_config_dict`, which the first files had beside it, goes before it."""
    older = config.get(f"{name}_dict")
    return {**defaults, **(config.get(name) or {}), **({**defaults, **older} if older else {})}


def _open_clip_tower(section: Mapping[str, Any]) -> dict[str, Any]:
    width, inner, eps = section["hidden_size"], section["intermediate_size"], section["layer_norm_eps"]
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip multiplies, and rounds down
        ratio = (inner + 0.5) / width
    activations = {"quick_gelu": {}, "gelu": {}, "gelu_pytorch_tanh": {"act_kwargs": {"approximate": "tanh"}}}
    if section["hidden_act"] not in activations:
        raise ModelError(f"hidden_act={section['hidden_act']!r} is not one of {', '.join(activations)}")
    return {
        "width": width,
        "layers": section["num_hidden_layers"],
        "mlp_ratio": ratio,
        **activations[section["hidden_act"]],
        **({} if eps == 1e-5 else {"norm_kwargs": {"eps": eps}}),
    }


def hf_preprocess(preprocess: Mapping[str, Any], size_px: int) -> dict[str, Any]:
    """CLIPImageProcessor's settings for open_clip's preprocessing. Raises ModelError for what it cannot express."""
    mode, interpolation = preprocess["resize_mode"], preprocess["interpolation"]
    if mode not in ("shortest", "squash") or interpolation not in _RESAMPLING:
        raise ModelError(f"Hugging Face's CLIPImageProcessor cannot resize by {mode!r} with {interpolation!r}")
    square = {"height": size_px, "width": size_px}
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size_px} if mode == "shortest" else square,
        "resample": _RESAMPLING[interpolation],
        "do_center_crop": mode == "shortest",
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def open_clip_preprocess(processor: Mapping[str, Any], size_px: int) -> dict[str, Any]:
    """open_clip's preprocessing for the settings of a CLIPImageProcessor; what they leave out is CLIP's own.

    Raises ModelError for pictures of another size than the model's `size_px`, and other things that do not fit.
    """
    size, crop = processor.get("size", size_px), processor.get("crop_size", size_px)
    height_width = {"height": size_px, "width": size_px}
    if size in (size_px, {"shortest_edge": size_px}) and crop in (size_px, height_width):
        mode = "shortest"
    elif size == height_width:
        mode = "squash"
    else:
        raise ModelError(f"pictures are resized to {size} and cropped to {crop}, but the model reads {size_px} pixels")
    names = {number: name for name, number in _RESAMPLING.items()}
    resample = processor.get("resample", _RESAMPLING["bicubic"])
    if resample not in names or not all(
        processor.get(f"do_{step}", True) for step in ("resize", "rescale", "normalize")
    ):
        raise ModelError("pictures must be resized (bilinear or bicubic), rescaled and normalised")
    if not math.isclose(processor.get("rescale_factor", 1 / 255), 1 / 255, rel_tol=1e-4):
        raise ModelError(f"pictures are rescaled by {processor['rescale_factor']}, not by 1/255")
    if mode == "shortest" and not processor.get("do_center_crop", True):
        raise ModelError("pictures are not cropped to a square, as the model reads them")
    return {
        "mean": tuple(processor.get("image_mean", OPENAI_DATASET_MEAN)),
        "std": tuple(processor.get("image_std", OPENAI_DATASET_STD)),
        "interpolation": names[resample],
        "resize_mode": mode,
    }
