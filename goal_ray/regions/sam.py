"""SAM's automatic mask generation (Kirillov et al. 2023), reduced to what regions need: boxes, areas and scores.

A grid of points prompts the official model; its masks are filtered by predicted IoU and stability and thinned by
non-maximum suppression, as `segment_anything.SamAutomaticMaskGenerator` does with the same settings. But the decoder is
`sam_decoder`'s, images are encoded in batches, and boxes and areas are read off the decoder's own masks (256 × 256), by
`mask_geometry`; only masks whose stability is in doubt are enlarged to the image.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from goal_ray.precision import dtype
from goal_ray.regions.config import SamConfig
from goal_ray.regions.mask_cleaning import clean
from goal_ray.regions.mask_geometry import area_above, mask_boxes, pixels_near, sample_at
from goal_ray.regions.protocol import Regions, all_from
from goal_ray.regions.sam_decoder import decode_points, two_way
from goal_ray.timing import timed

CROP_EDGE_PX = 20.0  # a mask so near the edge of a crop is thought cut off; the official generator's tolerance
# How far a stability read off the decoder's mask was seen to be from the official one, for large masks, and times the
# number of cells for small ones.
STABILITY_ERROR, SMALL_MASK_ERROR = 0.01, 5.0


@dataclass(frozen=True)
class View:
    """What the model looks at: image number `image`, or a crop of it.

    box_px    x0, y0, x1, y1 of the crop in the image
    layer     of crops; 0 is the whole image
    image_px  (W, H) of the image
    """

    image: int
    pixels_HW3: np.ndarray
    box_px: tuple[int, int, int, int]
    layer: int
    image_px: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """Masks on one view: boxes (R, 4) and areas (R,) in pixels of the image, predicted IoUs (R,); on the device.

    cleaned  boxes (R, 4), areas (R,) and whether they differ (R,), without small holes and islands, where asked for
    """

    view: View
    boxes_R4: Tensor
    scores_R: Tensor
    areas_R: Tensor
    cleaned: tuple[Tensor, Tensor, Tensor] | None = None


class SamProposer:
    """Regions of a loaded `segment_anything` Sam, on the device where the model is; scores are predicted IoUs.

    at_once  pictures a pass of the encoder, and points a pass of the decoder
    """

    def __init__(self, sam: Any, config: SamConfig):
        from segment_anything.utils.amg import build_all_layer_point_grids
        from segment_anything.utils.transforms import ResizeLongestSide

        self.sam = sam
        self.config = config
        self.dtype = dtype(config.precision)
        points = config.points_per_batch or (16 if sam.device.type == "cpu" else 64)
        self.at_once: tuple[int, ...] = (config.images_per_batch, points)
        sam.image_encoder.to(self.dtype, memory_format=torch.channels_last)
        sam.mask_decoder.to(self.dtype).iou_prediction_head.float()
        self.encode = torch.compile(sam.image_encoder) if config.compile else sam.image_encoder
        self.transform_tokens = torch.compile(two_way) if config.compile else two_way
        with torch.inference_mode():
            self.pe_NC = sam.prompt_encoder.get_dense_pe()[0].flatten(1).T.to(self.dtype)
        self.transform = ResizeLongestSide(sam.image_encoder.img_size)
        self.unit_points = build_all_layer_point_grids(
            config.points_per_side, config.crop_n_layers, config.crop_n_points_downscale_factor
        )

    @torch.inference_mode()
    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The regions of each image; images and points go through the model in batches."""
        layers: dict[int, list[View]] = defaultdict(list)
        for number, image_HW3 in enumerate(images):
            for view in self.views(number, image_HW3):
                layers[view.layer].append(view)
        found: dict[int, list[Found]] = defaultdict(list)
        together, _ = self.at_once
        for views in layers.values():
            for start in range(0, len(views), together):
                for each in self.segment(views[start : start + together]):
                    found[each.view.image].append(each)
        return [self.merge(found[number]) for number in range(len(images))]

    def views(self, number: int, image_HW3: np.ndarray) -> Iterator[View]:
        """The image and its crops."""
        from segment_anything.utils.amg import generate_crop_boxes

        boxes, layers = generate_crop_boxes(
            image_HW3.shape[:2], self.config.crop_n_layers, self.config.crop_overlap_ratio
        )
        for (x0, y0, x1, y1), layer in zip(boxes, layers, strict=True):
            yield View(number, image_HW3[y0:y1, x0:x1], (x0, y0, x1, y1), layer, image_HW3.shape[1::-1])

    def segment(self, views: Sequence[View]) -> list[Found]:
        """The masks on views of one layer, thinned within each view."""
        sam, config = self.sam, self.config
        resized = [self.transform.apply_image(view.pixels_HW3) for view in views]
        sizes = [image.shape[:2] for image in resized]
        # apply_image may give back the caller's array, which torch will not take where it is read-only.
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).to(sam.device) for image in resized]
        with timed("encode"):
            inputs_I3SS = torch.stack([sam.preprocess(each) for each in pixels])
            features_ICHW = self.encode(inputs_I3SS.to(self.dtype, memory_format=torch.channels_last))
        step_px = sam.image_encoder.img_size // features_ICHW.shape[-1]
        valid = tuple(-(-max(sides) // step_px) for sides in zip(*sizes, strict=True))
        unit_P2 = torch.as_tensor(self.unit_points[views[0].layer], dtype=torch.float32, device=sam.device)
        scale_I12 = torch.tensor([[size[::-1]] for size in sizes], dtype=torch.float32, device=sam.device)
        parts: list[list[tuple[Tensor, ...]]] = [[] for _ in views]
        _, points = self.at_once
        together = max(1, points // len(unit_P2))  # images whose points make one pass
        for start in range(0, len(views), together):
            some = slice(start, start + together)
            for points_P2 in unit_P2.split(points):
                logits_MHW, scores_M, image_M = decode_points(
                    sam,
                    features_ICHW[some],
                    self.pe_NC,
                    points_P2 * scale_I12[some],
                    valid,
                    config.pred_iou_thresh,
                    self.transform_tokens,
                )
                for number, (view, size) in enumerate(zip(views[some], sizes[some], strict=True), start):
                    mine = image_M == number - start
                    found = self.measure(logits_MHW[mine], scores_M[mine], size, view.pixels_HW3.shape[:2])
                    parts[number].append(found)
        return [
            self.thin(view, size, *(torch.cat(each) for each in zip(*part, strict=True)))
            for view, part, size in zip(views, parts, sizes, strict=True)
        ]

    def measure(
        self, logits_MHW: Tensor, scores_M: Tensor, size_px: tuple[int, int], view_px: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Boxes (R, 4), areas (R,), scores (R,) and logits of the stable masks, in pixels of the model's input.

        The logits are (R, H, W) where min_mask_region_area needs them, else (R, 0, 0).

        size_px  (H, W) of the picture within the model's input; the rest is padding
        view_px  (H, W) of the picture itself
        """
        from segment_anything.utils.amg import calculate_stability_score

        cell_px = self.cell_px
        rows, columns = (-(-side // cell_px) for side in size_px)
        logits_MHW = logits_MHW - self.sam.mask_threshold
        shown_MHW = logits_MHW[:, :rows, :columns]
        stability_M = self.stability(shown_MHW)
        # Of masks near the threshold, the stability as the official generator reads it, off the enlarged mask.
        error_M = STABILITY_ERROR + SMALL_MASK_ERROR / (shown_MHW > 0).flatten(1).sum(1).clamp(min=1)
        unsure_U = ((stability_M - self.config.stability_score_thresh).abs() < error_M).nonzero().squeeze(1)
        for some_U in unsure_U.split(16):
            enlarged = F.interpolate(logits_MHW[some_U, None], scale_factor=cell_px, mode="bilinear")
            shown = F.interpolate(enlarged[..., : size_px[0], : size_px[1]], view_px, mode="bilinear").squeeze(1)
            stability_M[some_U] = calculate_stability_score(shown, 0.0, self.config.stability_score_offset)
        good_M = stability_M >= self.config.stability_score_thresh

        shown_RHW, scores_R = shown_MHW[good_M], scores_M[good_M]
        boxes_R4, areas_R, seen_R = self.extent(shown_RHW, size_px, view_px)
        kept_RHW = shown_RHW if self.config.min_mask_region_area else shown_RHW[:, :0, :0]
        return boxes_R4[seen_R], areas_R[seen_R], scores_R[seen_R], kept_RHW[seen_R]

    @property
    def cell_px(self) -> int:
        """Side of a cell of the decoder's masks, in pixels of the model's input."""
        return self.sam.image_encoder.img_size // (4 * self.sam.prompt_encoder.image_embedding_size[0])

    def extent(
        self, logits_RHW: Tensor, size_px: tuple[int, int], view_px: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (R, 4) and areas (R,) in pixels of the model's input, and whether any pixel shows the mask (R,)."""
        cells = logits_RHW.shape[1:]
        size_cells = (size_px[0] / self.cell_px, size_px[1] / self.cell_px)
        y_H, x_W = (pixels_near(*each).to(logits_RHW) for each in zip(cells, view_px, size_cells, strict=True))
        sampled_RHW = sample_at(sample_at(logits_RHW, y_H, 1), x_W, 2)
        boxes_R4 = mask_boxes(sampled_RHW, x_W, y_H, size_cells) * self.cell_px
        return boxes_R4, area_above(logits_RHW, 0.0) * self.cell_px**2, (sampled_RHW > 0).flatten(1).any(1)

    def stability(self, logits_MHW: Tensor) -> Tensor:
        """Area of each mask at a raised threshold, as a share of that at a lowered one, (M,); 0 where both are 0."""
        offset = self.config.stability_score_offset
        return area_above(logits_MHW, offset) / area_above(logits_MHW, -offset).clamp(min=1e-6)

    def thin(
        self,
        view: View,
        size_px: tuple[int, int],
        boxes_R4: Tensor,
        areas_R: Tensor,
        scores_R: Tensor,
        logits_RHW: Tensor,
    ) -> Found:
        """The masks that their crop does not cut off and that are no duplicates, now in pixels of the image.

        size_px  (H, W) of the view within the model's input
        """
        crop_4, image_4 = boxes_R4.new_tensor(view.box_px), boxes_R4.new_tensor([0, 0, *view.image_px])
        corner_2, end_2 = crop_4.split(2)
        scale_2 = (end_2 - corner_2) / boxes_R4.new_tensor(size_px[::-1])

        def placed(boxes_R4: Tensor) -> Tensor:
            return boxes_R4 * scale_2.repeat(2) + corner_2.repeat(2)

        boxes_R4 = placed(boxes_R4)
        at_crop = (boxes_R4 - crop_4).abs() <= CROP_EDGE_PX
        at_image = (boxes_R4 - image_4).abs() <= CROP_EDGE_PX
        whole = (~(at_crop & ~at_image).any(1)).nonzero().squeeze(1)
        kept = whole[nms(boxes_R4[whole], scores_R[whole], self.config.box_nms_thresh)]
        cleaned = None
        if self.config.min_mask_region_area:
            pixels_per_cell = self.cell_px**2 * scale_2.prod().item()
            clean_RHW, changed_R = clean(logits_RHW[kept], self.config.min_mask_region_area / pixels_per_cell)
            clean_R4, clean_R, _ = self.extent(clean_RHW, size_px, view.pixels_HW3.shape[:2])
            cleaned = placed(clean_R4), clean_R * scale_2.prod(), changed_R
        return Found(view, boxes_R4[kept], scores_R[kept], areas_R[kept] * scale_2.prod(), cleaned)

    def merge(self, found: Sequence[Found]) -> Regions:
        """One image's regions: of two crops' masks that overlap much, the one from the smaller crop stays.

        Then, where masks are cleaned, of two that became alike the one that was not changed.
        """
        config = self.config
        boxes_R4, scores_R, areas_R = (
            torch.cat([getattr(each, name) for each in found]) for name in ("boxes_R4", "scores_R", "areas_R")
        )
        kept = torch.arange(len(scores_R), device=scores_R.device)
        if len(found) > 1:
            smallness_R = [torch.full_like(each.scores_R, 1 / each.view.pixels_HW3[..., 0].size) for each in found]
            kept = nms(boxes_R4, torch.cat(smallness_R), config.crop_nms_thresh)
        if config.min_mask_region_area:
            parts = zip(*(each.cleaned for each in found if each.cleaned is not None), strict=True)
            boxes_R4, areas_R, changed_R = (torch.cat(part) for part in parts)
            again = nms(boxes_R4[kept], (~changed_R[kept]).float(), max(config.box_nms_thresh, config.crop_nms_thresh))
            kept = kept[again]
        boxes, scores, areas = (each[kept].cpu().numpy() for each in (boxes_R4, scores_R, areas_R))
        return Regions(boxes, scores, areas, all_from("sam", len(kept)))
