"""Which CLIP; choosing one needs no torch."""

from dataclasses import dataclass

from goal_ray.config import strict


@strict
@dataclass(frozen=True)
class ModelConfig:
    """Which CLIP, and from which weights.

    name: an open_clip architecture (ViT-B-16), a .json file with one, or a folder that goal_ray, open_clip or
        transformers (CLIPModel) saved; a folder's weights are then the start
    weights: an open_clip pretrained tag, or a weights file in the layout of open_clip, of Hugging Face's CLIPModel or
        of OpenAI; empty starts from random weights
    context_length: text positions after Long-CLIP's stretch (248 for OpenAI's 77); empty leaves the model's own
    """

    name: str
    weights: str | None = None
    context_length: int | None = None
