"""CLIP weights from files and folders of other origin: open_clip's, Hugging Face's and OpenAI's layouts.

No code from a file is run: safetensors, pickles with weights_only, and TorchScript archives read as data.
"""

import difflib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import load_state_dict
from open_clip.model import (
    CLIPTextCfg,
    CLIPVisionCfg,
    convert_to_custom_text_state_dict,
    resize_pos_embed,
    set_model_preprocess_cfg,
)
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from goal_ray.errors import ModelError
from goal_ray.hf_config import open_clip_config, open_clip_preprocess
from goal_ray.hf_weights import is_hf_layout, open_clip_weights
from goal_ray.settings import ModelConfig
from goal_ray.torchscript import is_torchscript, read_torchscript

HF_CONFIG_FILE = "config.json"
HF_WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")
# Where transformers keeps the settings of pictures: the second since version 5.
HF_PREPROCESS_FILES = ("preprocessor_config.json", "processor_config.json")
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
MASK = "attn_mask"  # open_clip makes it anew; an archive does not tell it from the weights


def check_model(config: ModelConfig, key: str) -> None:
    """Raises ModelError, by the config's `key`, for a model or weights that are nowhere; builds and reads nothing."""
    name, weights = config.name, config.weights
    if Path(name).is_dir():
        return
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ModelError(f"{key}.name: {name}: no such model config file")
    elif open_clip.get_model_config(name) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see open_clip.list_models()"
        raise ModelError(f"{key}.name: {name!r} is no folder, no .json file and no architecture of open_clip; {hint}")
    if weights and not Path(weights).is_file() and not open_clip.get_pretrained_cfg(name, weights):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(
            f"{key}.weights: {weights!r} is no file here and no tag of {name} in open_clip (its tags: {tags})"
        )


def empty_model(name: str) -> nn.Module:
    """open_clip's model of that name, to be filled with weights."""
    logging.disable(logging.WARNING)  # open_clip would warn of random weights, which give way at once
    try:
        return open_clip.create_model(name, load_weights=False)
    finally:
        logging.disable(logging.NOTSET)


def read_architecture(name: str) -> dict[str, Any]:
    """open_clip's architecture of that name, or that in a .json file. Raises ModelError for a file that holds none.

    open_clip itself does not get to know the file's: its list of names is the whole process's.
    """
    if not name.endswith(".json"):
        found: dict[str, Any] = open_clip.get_model_config(name)
        return found
    return checked_architecture(read_json(Path(name)), Path(name))


def checked_architecture(tree: Any, file: Path) -> dict[str, Any]:
    """What a file holds for an architecture. Raises ModelError unless it is one."""
    sections = [tree.get(name) for name in ("vision_cfg", "text_cfg")] if isinstance(tree, dict) else [None]
    if not all(isinstance(section, dict) for section in sections) or "embed_dim" not in tree:
        raise ModelError(f"{file}: no architecture of open_clip: embed_dim, and the objects vision_cfg and text_cfg")
    return tree


def build(model_cfg: dict[str, Any]) -> nn.Module:
    """open_clip's model of an architecture, with random weights and the preprocessing of CLIP."""
    if "multimodal_cfg" in model_cfg:
        raise ModelError("CoCa models are not supported")
    settings = {**model_cfg}
    custom_text = settings.pop("custom_text", False) or "hf_model_name" in settings["text_cfg"]
    clip: Any = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**settings)
    set_model_preprocess_cfg(clip, {**asdict(PreprocessCfg()), "size": clip.visual.image_size})
    return clip


def create_model(name: str, model_cfg: dict[str, Any], weights: str | None) -> nn.Module:
    """An architecture with the weights of a tag or a file, and the activation that these were trained with.

    open_clip itself only warns of the wrong one.
    """
    tag = open_clip.get_pretrained_cfg(name, weights) if weights else {}
    if weights and not tag and Path(weights).is_file():
        return model_from_file(model_cfg, Path(weights))
    if name.endswith(".json"):
        return build(model_cfg)
    quick = bool(tag.get("quick_gelu")) if tag else None
    if quick is False and name.endswith("-quickgelu"):
        raise ModelError(
            f"weights {weights!r} were trained without QuickGELU; use model {name.removesuffix('-quickgelu')}"
        )
    return open_clip.create_model(name, pretrained=weights, force_quick_gelu=bool(quick))


def model_from_file(model_cfg: dict[str, Any], path: Path) -> nn.Module:
    """An architecture with the weights of a file, which may have any of the three layouts.

    The text context is as long as the file's position table, and the activation that of the weights where the file
    tells it: OpenAI's layout does, and Hugging Face's with its config.json beside it.
    """
    weights, told = read_weights(path)
    if told.get("quick_gelu") is False and model_cfg.get("quick_gelu"):
        raise ModelError(f"{path} was trained without QuickGELU, which the model has; choose the model without it")
    if "text_cfg" in told:
        theirs, ours = without_shape(told), without_shape(model_cfg)
        if differ := [f"{name}={theirs[name]}, not {ours[name]}" for name in ours if theirs[name] != ours[name]]:
            raise ModelError(f"{path} was trained with {'; '.join(differ)} as the model has; choose one that fits")
    text_cfg = {**model_cfg["text_cfg"]}
    table_LD = weights.get("positional_embedding", weights.get("text.positional_embedding"))
    if table_LD is not None:
        text_cfg["context_length"] = len(table_LD)
    quick_gelu = bool(told.get("quick_gelu") or model_cfg.get("quick_gelu"))
    clip = build({**model_cfg, "text_cfg": text_cfg, "quick_gelu": quick_gelu})
    fill(clip, weights)
    return clip


def without_shape(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """What an architecture computes with and the shape of no weight tells, but for QuickGELU."""
    vision, text = CLIPVisionCfg(**model_cfg["vision_cfg"]), CLIPTextCfg(**model_cfg["text_cfg"])
    found: dict[str, Any] = {}
    for tower, config, heads in (("vision", vision, vision.width // vision.head_width), ("text", text, text.heads)):
        found[f"{tower} heads"] = heads
        found[f"{tower} LayerNorm eps"] = (config.norm_kwargs or {}).get("eps", 1e-5)
        found[f"{tower} act_kwargs"] = config.act_kwargs or {}
    return found


def fill(clip: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads a state dict in open_clip's layout; picture positions are resized as open_clip does."""
    if not hasattr(clip, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    own = clip.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in weights and name in own:
            weights[name] = weights[name].reshape(own[name].shape)
    if (table_ND := weights.get("visual.positional_embedding")) is not None:
        weights["visual.positional_embedding"] = table_ND.float()  # half precision cannot be resized on a CPU
    resize_pos_embed(weights, clip)
    clip.load_state_dict(weights)


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of a file by open_clip's names, and as much of open_clip's architecture as is told with them.

    Beside Hugging Face's config.json that is all of it, in OpenAI's layout `quick_gelu`, else nothing. Raises
    ModelError for a file that holds something else.
    """
    try:
        weights = read_torchscript(path) if is_torchscript(path) else load_state_dict(str(path))
    except (AttributeError, IndexError, StopIteration):
        raise ModelError(f"{path}: no weights, which are tensors by name, alone or as `state_dict`") from None
    if is_hf_layout(weights):
        config = path.parent / HF_CONFIG_FILE
        told = hf_architecture(config) if config.is_file() else {}
        with naming(path):
            return open_clip_weights(weights), told
    weights = {name: tensor for name, tensor in weights.items() if name.split(".")[-1] != MASK}
    numbers = [weights.pop(name, None) for name in OPENAI_NUMBERS]
    return weights, {"quick_gelu": True} if any(number is not None for number in numbers) else {}


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a CLIPModel as transformers saves it."""
    config = folder / HF_CONFIG_FILE
    return config.is_file() and read_json(config).get("model_type") == "clip"


def load_hf_folder(folder: Path) -> tuple[open_clip.CLIP, dict[str, Any]]:
    """The model in a folder that transformers' CLIPModel.save_pretrained made, and its open_clip architecture."""
    model_cfg = hf_architecture(folder / HF_CONFIG_FILE)
    files = [folder / name for name in HF_WEIGHTS_FILES if (folder / name).is_file()]
    if not files:
        raise ModelError(f"{folder}: no {' or '.join(HF_WEIGHTS_FILES)}; weights in several files are not supported")
    clip = open_clip.CLIP(**model_cfg)
    fill(clip, read_weights(files[0])[0])
    preprocess = {**asdict(PreprocessCfg()), "size": clip.visual.image_size}
    stored = next((folder / name for name in HF_PREPROCESS_FILES if (folder / name).is_file()), None)
    if stored is not None:
        settings = read_json(stored)
        with naming(stored):
            preprocess |= open_clip_preprocess(settings.get("image_processor", settings), clip.visual.image_size[0])
    set_model_preprocess_cfg(clip, preprocess)
    return clip, model_cfg


def hf_architecture(config: Path) -> dict[str, Any]:
    """The open_clip architecture of a config.json. Raises ModelError for one that open_clip cannot express."""
    tree = read_json(config)
    with naming(config):
        return open_clip_config(tree)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of a ModelError."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError for anything else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path}: not a JSON object")
    return tree
