"""The settings of a LISM run; the class docstrings are the documentation that --help prints."""

from dataclasses import dataclass, field
from typing import Literal

from goal_ray.config import check_custom_resources, strict
from goal_ray.precision import Precision
from goal_ray.regions import FelzenszwalbConfig, ProposerConfig
from goal_ray.regions.config import ON_CPU
from goal_ray.settings import ModelConfig


@strict
@dataclass(frozen=True)
class MatcherConfig:
    """The frozen CLIP that compares region crops with sentences.

    model: the CLIP (the published run used ViT-L-14-336 with weights openai)
    crop_mode: how crops become the model's square
    batch: crops, or sentences, per forward pass
    precision: of the forward passes; similarities are computed in fp32
    regions_per_sentence: the most similar regions that each sentence is paired with (the paper: 1); training uses
        the best of them
    min_similarity: pairs below this cosine are left out, and a sentence may stay without a region
    mutual_best: keep a pair only where, of the caption's sentences, its own is the most similar to the region
    """

    model: ModelConfig = field(default_factory=lambda: ModelConfig("ViT-L-14-336", "openai"))
    crop_mode: Literal["shortest", "squash"] = "shortest"
    batch: int = 256
    precision: Precision = "fp32"
    regions_per_sentence: int = 1
    min_similarity: float = -1.0
    mutual_best: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "regions_per_sentence"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not -1 <= self.min_similarity <= 1:
            raise ValueError("min_similarity is a cosine, between -1 and 1")


@strict
@dataclass(frozen=True)
class LismConfig:
    """A LISM run.

    proposer: where regions come from
    matcher: the CLIP that matches them with sentences
    language: language code of the captions, for sentence splitting
    min_area: regions smaller than this share of the picture are left out (the paper: 1 %)
    max_area: regions larger than this share are left out (the paper: 80 %)
    max_side_px: the segmenter and the crops see a copy of the picture shrunk to this longer side
    max_pixels: larger pictures are quarantined unread
    max_seconds_per_image: a picture that takes longer to decode, to segment or to match is quarantined
    images_per_batch: pictures per call of a proposer or matcher actor, fewer where they are large; another number may
        change the last digits of similarities
    readers: most tars read at a time, each by one CPU; null for as many as there are CPUs. The driver holds a tar's
        pairs until it is whole, some kB a picture
    proposer_actors: least and most proposer actors
    matcher_actors: least and most matcher actors
    fused: both models in every actor, which then hands no picture on; proposer_actors counts them
    device: auto takes GPUs where the cluster has them now; say cuda where it first has to start nodes with them
    gpus_per_actor: share of a GPU, and of its memory, that each actor holds; proposers that compute on CPUs hold none
    actor_resources: custom Ray resources that each actor holds besides, such as {lism: 1}: it goes to nodes that have
        them, and an autoscaler starts those
    max_bad_share: the run fails when more than this share of the samples is quarantined
    """

    proposer: ProposerConfig = field(default_factory=FelzenszwalbConfig)
    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    language: str = "en"
    min_area: float = 0.01
    max_area: float = 0.80
    max_side_px: int = 2048
    max_pixels: int = 150_000_000
    max_seconds_per_image: float = 300.0
    images_per_batch: int = 16
    readers: int | None = None
    proposer_actors: tuple[int, int] = (1, 1)
    matcher_actors: tuple[int, int] = (1, 1)
    fused: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus_per_actor: float = 0.5
    actor_resources: dict[str, float] = field(default_factory=dict)
    max_bad_share: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.min_area < self.max_area <= 1:
            raise ValueError("areas must satisfy 0 <= min_area < max_area <= 1")
        for name in ("proposer_actors", "matcher_actors"):
            least, most = getattr(self, name)
            if not 1 <= least <= most:
                raise ValueError(f"{name} must be [least, most] with 1 <= least <= most")
        for name in ("max_side_px", "max_pixels", "images_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.readers is not None and self.readers < 1:
            raise ValueError("readers must be at least 1, or null")
        if self.max_seconds_per_image <= 0:
            raise ValueError("max_seconds_per_image must be more than 0")
        if not 0 < self.gpus_per_actor <= 1:
            raise ValueError("gpus_per_actor must be more than 0 and at most 1; to use no GPU, set device=cpu")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError("max_bad_share must be between 0 and 1")
        check_custom_resources("actor_resources", self.actor_resources)

    @property
    def least_actors(self) -> int:
        """How many actors the run cannot do without."""
        return self.proposer_actors[0] + (0 if self.fused else self.matcher_actors[0])

    @property
    def proposes_on_cpu(self) -> bool:
        """Whether proposer actors have no use for a GPU; fused ones also match."""
        return isinstance(self.proposer, ON_CPU) and not self.fused

    @property
    def least_gpu_actors(self) -> int:
        """How many of `least_actors` compute on GPUs, in a run on GPUs."""
        return self.matcher_actors[0] if self.proposes_on_cpu else self.least_actors
