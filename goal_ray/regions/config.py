"""The settings of every region proposer; reading them needs no torch. The class docstrings are --help's text."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from goal_ray.config import strict
from goal_ray.precision import Precision
from goal_ray.regions.weights import DETECTOR_ADVICE, SAM_ADVICE, find_checkpoint


@strict
@dataclass(frozen=True)
class FelzenszwalbConfig:
    """Classical segmentation on the CPU; needs no weights (Felzenszwalb 2004, selective search 2013).

    name: felzenszwalb
    scale: the larger, the larger and fewer the superpixels
    sigma: width in pixels of the blur before segmentation
    min_size: superpixels of fewer pixels join a neighbour
    side_px: segmentation sees a copy shrunk to this longer side; the settings above count its pixels
    """

    name: Literal["felzenszwalb"] = "felzenszwalb"
    scale: float = 100.0
    sigma: float = 1.0
    min_size: int = 20
    side_px: int = 256

    def __post_init__(self) -> None:
        if self.scale <= 0 or self.sigma < 0:
            raise ValueError("scale must be positive and sigma not negative")
        for name in ("min_size", "side_px"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    def check(self) -> None:
        """Nothing is needed."""


@strict
@dataclass(frozen=True)
class GridConfig:
    """A regular division of the image; needs no weights (FAST-GOAL, arXiv 2605.26615).

    name: grid
    levels: cells per side; [2, 3] gives 2×2 and 3×3 cells
    overlap: share of a cell's side that it has in common with the next cell
    """

    name: Literal["grid"] = "grid"
    levels: tuple[int, ...] = (2, 3)
    overlap: float = 0.0

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 2:
            raise ValueError("levels must be one or more numbers of at least 2; the whole image is matched anyway")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap must be in [0, 1), not {self.overlap}")

    def check(self) -> None:
        """Nothing is needed."""


@strict
@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """SAM (Segment Anything) with the official weights, as in the published run, or MobileSAM with its own.

    name: sam
    checkpoint: weights file, or its name in the folder GOAL_RAY_WEIGHTS; tells by itself which SAM it is (b, l, h or
        MobileSAM)
    sha256: refuse a checkpoint with another checksum; official file names are checked anyway
    points_per_side: prompts are points on a square grid of this side
    points_per_batch: points per pass of the mask decoder; only speed and memory depend on it. Empty: 64 on a GPU, and
        16 on a CPU, whose caches hold no more
    images_per_batch: pictures per pass of the image encoder; only speed and memory depend on it
    pred_iou_thresh: leave out masks that the model itself rates lower
    stability_score_thresh: leave out masks that change more when the mask threshold does
    stability_score_offset: how much the threshold is changed for that, in logits
    box_nms_thresh: of two masks whose boxes overlap more, the one that the model rates higher stays
    crop_n_layers: layer i also looks at 4^i overlapping crops of the picture, for smaller things
    crop_nms_thresh: box_nms_thresh between crops; masks from smaller crops stay
    crop_overlap_ratio: how much crops overlap, as a share of the picture
    crop_n_points_downscale_factor: layer i has points_per_side divided by the i-th power of this
    min_mask_region_area: fill holes, and remove islands, of fewer pixels of the picture than this
    precision: of the encoder and the decoder, but for its rating of the masks
    compile: torch.compile the encoder and the decoder's transformer: minutes at the start, faster afterwards
    """

    name: Literal["sam"] = "sam"
    checkpoint: Path
    sha256: str | None = None
    points_per_side: int = 32
    points_per_batch: int | None = None
    images_per_batch: int = 4
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    box_nms_thresh: float = 0.7
    crop_n_layers: int = 0
    crop_nms_thresh: float = 0.7
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: int = 1
    min_mask_region_area: int = 0
    precision: Precision = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch", "images_per_batch", "crop_n_points_downscale_factor"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.min_mask_region_area < 0:
            raise ValueError("min_mask_region_area must not be negative")
        if not 0 <= self.crop_n_layers <= 4:
            raise ValueError("crop_n_layers must be between 0 and 4")
        if self.points_per_side < self.crop_n_points_downscale_factor**self.crop_n_layers:
            raise ValueError("crop_n_points_downscale_factor leaves the last layer of crops without a point")

    def check(self) -> None:
        """Raises ModelError for a missing checkpoint."""
        find_checkpoint(self.checkpoint, SAM_ADVICE)


@strict
@dataclass(frozen=True, kw_only=True)
class DetectorConfig:
    """An object detector and a regular division of the image: FAST-GOAL's FLISM (arXiv 2605.26615).

    name: detector
    model: one of torchvision's detection models, such as fasterrcnn_resnet50_fpn_v2
    checkpoint: its weights, or their file name in the folder GOAL_RAY_WEIGHTS
    sha256: refuse a checkpoint with another checksum; files named as torchvision names them are checked anyway
    classes: that the weights know, with the background (COCO: 91, people's keypoints: 2)
    score_thresh: leave out detections that the model is less sure of; it has a lower threshold of its own
    box_nms_thresh: of two detections, of whatever class, that overlap more, the surer one stays
    max_detections: the surest ones
    levels: cells per side of the regular division, as in grid, with score 0; [] gives detections alone
    images_per_batch: pictures per forward pass
    precision: of the backbone, most of the arithmetic; boxes are computed in fp32
    """

    name: Literal["detector"] = "detector"
    model: str
    checkpoint: Path
    sha256: str | None = None
    classes: int = 91
    score_thresh: float = 0.3
    box_nms_thresh: float = 0.7
    max_detections: int = 100
    levels: tuple[int, ...] = (2, 3)
    images_per_batch: int = 8
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        from torchvision.models import detection, list_models

        if self.model not in (detectors := list_models(module=detection)):
            raise ValueError(f"model must be one of torchvision's detectors: {', '.join(detectors)}")
        for name, least in {"classes": 2, "max_detections": 1, "images_per_batch": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        if self.levels:
            GridConfig(levels=self.levels)  # refuses impossible ones

    def check(self) -> None:
        """Raises ModelError for a missing checkpoint."""
        find_checkpoint(self.checkpoint, DETECTOR_ADVICE)


ON_CPU = FelzenszwalbConfig | GridConfig  # they compute there whatever the device
ProposerConfig = Annotated[FelzenszwalbConfig | GridConfig | SamConfig | DetectorConfig, Field(discriminator="name")]
