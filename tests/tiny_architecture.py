"""An open_clip architecture that runs in milliseconds, variants of it, and weights like trained ones."""

import json
from pathlib import Path

import torch
from torch import nn

TINY_CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def write_architecture(folder: Path, name="variant", vision=None, text=None, **extra) -> str:
    """Writes a variant of TINY_CLIP as NAME.json; returns its path."""
    config = {**json.loads(json.dumps(TINY_CLIP)), **extra}
    config["vision_cfg"].update(vision or {})
    config["text_cfg"].update(text or {})
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return str(path)


def shake(clip: nn.Module, seed: int = 0) -> None:
    """Moves every parameter, so that biases, gains and the logit scale are not what a new model has too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
