"""A folder for transformers: CLIPModel, image processor, tokenizer. Written as plain files; needs no transformers."""

import json
from pathlib import Path
from typing import Any

from open_clip.tokenizer import SimpleTokenizer, get_clean_fn
from safetensors.torch import save_file

from goal_ray.errors import ModelError
from goal_ray.export.hf_tokenizer import tokenizer_files
from goal_ray.hf_config import VOCABULARY, hf_config, hf_preprocess
from goal_ray.hf_weights import hf_weights
from goal_ray.model import LoadedModel, logit_scale


def save_hf(folder: Path, loaded: LoadedModel) -> None:
    """Writes a folder that transformers' CLIPModel, CLIPProcessor and AutoTokenizer load with `from_pretrained`.

    Raises ModelError for a model that they cannot express, before anything is written.
    """
    tokenizer = loaded.tokenizer
    plain = type(tokenizer) is SimpleTokenizer and tokenizer.clean_fn is get_clean_fn("lower")
    if not plain or tokenizer.reduction_fn is not None or tokenizer.vocab_size != VOCABULARY:
        raise ModelError(f"the tokenizer ({type(tokenizer).__name__}) is not CLIP's own; use --format open_clip")
    try:
        files: dict[str, Any] = {
            "config.json": hf_config(loaded.model_cfg, logit_scale(loaded.clip).item()),
            "preprocessor_config.json": hf_preprocess(loaded.preprocess, loaded.size_px),
            **tokenizer_files(tokenizer, loaded.context_length),
        }
        weights = hf_weights(loaded.clip.state_dict())
    except ModelError as error:
        raise ModelError(f"{error}; use --format open_clip") from None
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
