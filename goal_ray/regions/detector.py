"""Regions from an object detector, with a regular division of the image beside it: FAST-GOAL's FLISM."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d, nms

from goal_ray.errors import ModelError
from goal_ray.precision import Precision, autocast
from goal_ray.regions.config import DetectorConfig, GridConfig
from goal_ray.regions.grid import GridProposer
from goal_ray.regions.protocol import Regions, all_from
from goal_ray.regions.weights import read_state

# torchvision runs these, and only these, without the epsilon of batch normalisation.
WITHOUT_EPSILON = (
    "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth",
    "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
    "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    "retinanet_resnet50_fpn_coco-eeacb38b.pth",
)


class Backbone(nn.Module):
    """A detector's backbone in `precision`, its features in float32.

    What follows computes boxes: bfloat16 counts pixels beyond 1024 in steps of 8, and float16 overflows in some heads.
    """

    def __init__(self, backbone: nn.Module, precision: Precision):
        super().__init__()
        self.backbone = backbone
        self.precision = precision

    def forward(self, pixels_B3HW: Tensor) -> dict[str, Tensor]:
        """The feature maps, by their names."""
        with autocast(pixels_B3HW.device, self.precision):
            features = self.backbone(pixels_B3HW)
        return {name: feature.float() for name, feature in features.items()}


class DetectorProposer:
    """Regions of a loaded torchvision detector, on the device where it is; scores are the detector's.

    at_once  pictures a pass
    """

    def __init__(self, model: Any, config: DetectorConfig):
        model.backbone = Backbone(model.backbone, config.precision)
        self.model = model
        self.config = config
        self.at_once: tuple[int, ...] = (config.images_per_batch,)
        self.grid = GridProposer(GridConfig(levels=config.levels)) if config.levels else None

    @torch.inference_mode()
    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The detections on each image, surest first, then the cells of the grid."""
        found: list[Regions] = []
        (together,) = self.at_once
        for start in range(0, len(images), together):
            found += self.detect(images[start : start + together])
        if self.grid is None:
            return found
        return [beside(mine, cells) for mine, cells in zip(found, self.grid.propose(images), strict=True)]

    def detect(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The detections on a batch of images, of any sizes."""
        device = next(self.model.parameters()).device
        # A copy, since torch takes no read-only array, and what came through Ray is one.
        pixels = [torch.from_numpy(image.copy()).to(device).permute(2, 0, 1).float() / 255 for image in images]
        return [self.thin(output["boxes"], output["scores"]) for output in self.model(pixels)]

    def thin(self, boxes_R4: Tensor, scores_R: Tensor) -> Regions:
        """The detections worth keeping."""
        sure = scores_R >= self.config.score_thresh
        boxes_R4, scores_R = boxes_R4[sure], scores_R[sure]
        kept = nms(boxes_R4, scores_R, self.config.box_nms_thresh)[: self.config.max_detections]
        boxes_R4, scores_R = boxes_R4[kept], scores_R[kept]
        areas_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).prod(1)
        boxes_px, scores, areas_px = (each.cpu().numpy() for each in (boxes_R4, scores_R, areas_R))
        return Regions(boxes_px, scores, areas_px, all_from("detector", len(kept)))


def beside(found: Regions, cells: Regions) -> Regions:
    """Detections, and cells with a score below any of theirs."""
    return Regions(
        np.concatenate([found.boxes_px, cells.boxes_px]),
        np.concatenate([found.scores, np.zeros_like(cells.scores)]),
        np.concatenate([found.areas_px, cells.areas_px]),
        np.concatenate([found.sources, cells.sources]),
    )


def load_detector(name: str, classes: int, path: Path) -> nn.Module:
    """A torchvision detector with the weights of a state dict, in eval mode, on the CPU; finds boxes only.

    Raises ModelError where the file is damaged, or its weights are of another model.
    """
    state = read_state(path)
    model: Any = get_model(name, weights=None, weights_backbone=None, num_classes=classes)
    # A counter of training steps, which frozen normalisation does not store and detecting does not read.
    counters = {key for key in model.state_dict() if key.endswith("num_batches_tracked")}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise ModelError(f"{path}: not weights of {name} with classes={classes}: {error}") from error
    strangers = sorted((set(missing) - counters) | set(unexpected))
    if strangers:
        raise ModelError(f"{path}: not weights of {name}: {len(strangers)} tensors differ, such as {strangers[0]}")
    if path.name in WITHOUT_EPSILON:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
                module.eps = 0.0
    heads = getattr(model, "roi_heads", None)
    if heads is not None:  # masks and keypoints would be computed for nothing
        heads.mask_roi_pool = heads.keypoint_roi_pool = None
    return model.eval()
