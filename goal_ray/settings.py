"""What can be set about model, pictures, loss and step; reading settings needs no torch."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from goal_ray.config import strict

# The files of a folder that plain open_clip loads as `local-dir:`.
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = "open_clip_model.safetensors"
TERMS = ("global", "local", "tsl_image", "tsl_text")
Weight = float | tuple[tuple[float, float], ...]


@strict
@dataclass(frozen=True)
class ModelConfig:
    """Which CLIP, and from which weights.

    name: an open_clip architecture (ViT-B-16), a .json file with one, or a folder that goal_ray, open_clip or
        transformers (CLIPModel) saved; a folder's weights are then the start
    weights: an open_clip pretrained tag, or a weights file in the layout of open_clip, of Hugging Face's CLIPModel or
        of OpenAI; empty starts from random weights. A file in open_clip's layout, or in Hugging Face's without its
        config.json beside it, does not tell its activation: name the architecture that has it (ViT-B-16-quickgelu for
        OpenAI's weights)
    context_length: text positions after Long-CLIP's stretch (248 for OpenAI's 77); empty leaves the model's own
    """

    name: str
    weights: str | None = None
    context_length: int | None = None


@strict
@dataclass(frozen=True)
class ResizeConfig:
    """How a picture becomes the square that the model reads.

    mode: shortest resizes the short side and center-crops (CLIP's own), squash ignores the aspect ratio,
        random_resized_crop draws a crop per sample and epoch (training only)
    min_scale: random_resized_crop keeps at least this share of the picture's area
    min_visible: a region of which the crop leaves less than this share of its area is dropped from the TSL
    """

    mode: Literal["shortest", "squash", "random_resized_crop"] = "shortest"
    min_scale: float = 0.9
    min_visible: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale must be in (0, 1], not {self.min_scale}")
        if not 0 <= self.min_visible <= 1:
            raise ValueError(f"min_visible must be in [0, 1], not {self.min_visible}")


@strict
@dataclass(frozen=True)
class LossConfig:
    """The weights of the loss's terms and their kind.

    A weight is a number, or a schedule: points [share of the run, weight], linear between them, such as
    [[0, 0], [0.1, 1]] for a warmup over the first tenth.

    weight_local: weight of the contrastive loss over (region crop, sentence)
    weight_tsl_image: weight of the token-similarity loss between a region's patches and its crop
    weight_tsl_text: weight of the token-similarity loss between a sentence's tokens and the sentence alone
    contrastive: clip is the symmetric InfoNCE, siglip the pairwise sigmoid (the model needs a logit bias)
    pooling: touch takes every patch that the box touches as a whole (the paper), coverage weighs it by its overlap
    tsl_backend: auto takes the fastest that runs here; reference is the slow definition
    """

    weight_local: Weight = 0.5
    weight_tsl_image: Weight = 1.0
    weight_tsl_text: Weight = 1.0
    contrastive: Literal["clip", "siglip"] = "clip"
    pooling: Literal["touch", "coverage"] = "touch"
    tsl_backend: Literal["auto", "reference", "eager", "triton"] = "auto"

    def __post_init__(self) -> None:
        for name in ("weight_local", "weight_tsl_image", "weight_tsl_text"):
            points = points_of(getattr(self, name))
            shares = [share for share, _ in points]
            if not points or any(not 0 <= weight < math.inf for _, weight in points):
                raise ValueError(f"{name} must be a finite number >= 0, or points of such, not {getattr(self, name)}")
            if sorted(set(shares)) != shares or not 0 <= shares[0] <= shares[-1] <= 1:
                raise ValueError(f"{name}: the shares of its points must rise from 0 to 1, not {shares}")

    @property
    def configured(self) -> tuple[Weight, ...]:
        """The weights or schedules, in the order of TERMS."""
        return (1.0, self.weight_local, self.weight_tsl_image, self.weight_tsl_text)

    def weights(self, progress: float) -> tuple[float, ...]:
        """Weights in the order of TERMS once the share `progress`, 0 to 1, of the run is done."""
        return tuple(weight_at(weight, progress) for weight in self.configured)

    @property
    def needs_pairs(self) -> bool:
        """Whether any term reads local pairs; without, crops and sentences are never encoded."""
        return any(weight for each in self.configured[1:] for _, weight in points_of(each))


def points_of(weight: Weight) -> list[tuple[float, float]]:
    """A schedule's points (share of the run, weight); a number is one point."""
    return list(weight) if isinstance(weight, tuple) else [(0.0, weight)]


def weight_at(weight: Weight, progress: float) -> float:
    """A schedule's value: linear between its points, constant before the first and after the last."""
    points = points_of(weight)
    for (left, low), (right, high) in pairwise(points):
        if left <= progress < right:
            return low + (high - low) * (progress - left) / (right - left)
    return points[-1][1] if progress >= points[-1][0] else points[0][1]


@strict
@dataclass(frozen=True)
class StepConfig:
    """How a step computes; none of this changes what it computes.

    sdpa: attention by one projection and PyTorch's fused kernel, told that texts are causal; else open_clip's own
    compile: torch.compile of the transformer blocks; minutes at the start, needs a C++ compiler; not with zero_stage=3
    checkpoint_activations: recompute the blocks in the backward pass: a third more arithmetic for far less memory
    channels_last: pictures in NHWC for the patch convolution
    text_multiple: texts are padded to a multiple of so many tokens: few shapes to compile, aligned for tensor cores
    fused_adamw: the optimizer's update in one kernel over all parameters
    """

    sdpa: bool = True
    compile: bool = False
    checkpoint_activations: bool = False
    channels_last: bool = False
    text_multiple: int = 8
    fused_adamw: bool = True

    def __post_init__(self) -> None:
        if self.text_multiple < 1:
            raise ValueError("text_multiple must be at least 1")
