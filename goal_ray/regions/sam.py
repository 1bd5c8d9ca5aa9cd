"""SAM's automatic mask generation (Kirillov et al. 2023), reduced to what regions need: boxes, areas and scores.

A grid of points prompts the official model; its masks are filtered by predicted IoU and stability and thinned by
non-maximum suppression, as `segment_anything.SamAutomaticMaskGenerator` does. But everything is read off the decoder's
own masks (256 × 256), which are never enlarged to the image: an edge is exact to one cell, 1/256 of the longer side.
"""

import hashlib
import os
import pickle
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torchvision.ops import nms

from goal_ray.config import strict
from goal_ray.errors import ModelError
from goal_ray.regions.protocol import RegionProposer, Regions

WEIGHTS_FOLDER = "GOAL_RAY_WEIGHTS"
DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything"
# sha256 of the official checkpoints.
OFFICIAL = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
MAX_IOU = 0.7  # of two masks' boxes; the official generator's default
STABILITY_OFFSET = 1.0  # of the mask threshold, in logits; the official generator's default


@strict
@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """SAM (Segment Anything) with the official weights, as in the published run.

    name: sam
    checkpoint: weights file, or its name in the folder GOAL_RAY_WEIGHTS; tells by itself which SAM it is (b, l or h)
    sha256: refuse a checkpoint with another checksum; official file names are checked anyway
    points_per_side: prompts are points on a square grid of this side
    points_per_batch: points per pass of the mask decoder; only speed and memory depend on it
    pred_iou_thresh: leave out masks that the model itself rates lower
    stability_score_thresh: leave out masks that change more when the mask threshold does
    """

    name: Literal["sam"] = "sam"
    checkpoint: Path
    sha256: str | None = None
    points_per_side: int = 32
    points_per_batch: int = 128
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95

    def __post_init__(self) -> None:
        for name in ("points_per_side", "points_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")

    def check(self) -> None:
        """Raises ModelError for a missing checkpoint."""
        find_checkpoint(self.checkpoint)

    def build(self, device: str = "cpu") -> RegionProposer:
        """Loads the model. Raises ModelError for a missing, changed or unfitting checkpoint."""
        path = find_checkpoint(self.checkpoint)
        check_sum(path, self.sha256 or OFFICIAL.get(path.name))
        return SamProposer(load_sam(path).to(device), self)


class SamProposer:
    """Regions of a loaded `segment_anything` Sam, on the device where the model is; scores are predicted IoUs."""

    def __init__(self, sam: Any, config: SamConfig):
        from segment_anything import SamPredictor
        from segment_anything.utils.amg import build_point_grid

        self.sam = sam
        self.config = config
        self.predictor = SamPredictor(sam)
        self.unit_points_P2 = build_point_grid(config.points_per_side)

    @torch.inference_mode()
    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """The regions of each image, one image at a time."""
        return [self.segment(image) for image in images]

    def segment(self, image_HW3: np.ndarray) -> Regions:
        """The regions of one image."""
        height, width = image_HW3.shape[:2]
        self.predictor.set_image(image_HW3)
        # The model sees the image resized to input_size in the corner of a padded square.
        input_height, input_width = self.predictor.input_size
        points_P2 = torch.as_tensor(self.unit_points_P2 * [input_width, input_height], dtype=torch.float32)
        batches = points_P2.to(self.sam.device).split(self.config.points_per_batch)
        boxes, areas, scores = (torch.cat(parts) for parts in zip(*map(self.decode, batches), strict=True))
        kept = nms(boxes, scores, MAX_IOU)
        scale = np.array([width / input_width, height / input_height], np.float32)
        boxes_R4 = boxes[kept].cpu().numpy() * np.tile(scale, 2)
        # The last cell may reach into the padding.
        boxes_R4 = np.minimum(boxes_R4, np.array([width, height, width, height], np.float32))
        return Regions(boxes_R4, scores[kept].cpu().numpy(), areas[kept].cpu().numpy() * scale.prod(), "sam")

    def decode(self, points_P2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes (Q, 4), areas (Q,) and predicted IoUs (Q,) of the good masks at some points.

        Points, boxes and areas count pixels of the model's input.
        """
        from segment_anything.utils.amg import batched_mask_to_box, calculate_stability_score

        sam = self.sam
        ones = torch.ones(len(points_P2), 1, dtype=torch.int, device=points_P2.device)
        sparse, dense = sam.prompt_encoder(points=(points_P2[:, None], ones), boxes=None, masks=None)
        logits, scores = sam.mask_decoder(
            image_embeddings=self.predictor.features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        cell_px = sam.image_encoder.img_size // logits.shape[-1]
        rows, columns = (-(-side // cell_px) for side in self.predictor.input_size)
        logits, scores = logits.flatten(0, 1)[:, :rows, :columns], scores.flatten()
        good = scores > self.config.pred_iou_thresh
        logits, scores = logits[good], scores[good]
        stability = calculate_stability_score(logits, sam.mask_threshold, STABILITY_OFFSET)
        masks = logits > sam.mask_threshold
        areas = masks.flatten(1).sum(1)
        good = (stability >= self.config.stability_score_thresh) & (areas > 0)
        boxes = batched_mask_to_box(masks[good]).float()
        boxes[:, 2:] += 1  # its x1 and y1 are the last row and column inside
        return boxes * cell_px, areas[good].float() * cell_px**2, scores[good]


def find_checkpoint(checkpoint: Path) -> Path:
    """The file itself, or the one of that name in GOAL_RAY_WEIGHTS. Raises ModelError where neither is there."""
    folder = os.environ.get(WEIGHTS_FOLDER)
    places = [checkpoint] if folder is None else [checkpoint, Path(folder) / checkpoint]
    for place in places:
        if place.is_file():
            return place
    urls = ", ".join(f"{DOWNLOADS}/{name}" for name in OFFICIAL)
    raise ModelError(
        f"no SAM checkpoint at {' or '.join(map(str, places))}; download one of {urls} and set checkpoint to its path, "
        f"or put it into a folder that the environment variable {WEIGHTS_FOLDER} names"
    )


def check_sum(path: Path, sha256: str | None) -> None:
    """Raises ModelError where a checksum is wanted and the file has another."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256.lower():
        raise ModelError(f"{path}: sha256 is {found}, not {sha256.lower()}; download it again")


def load_sam(path: Path) -> Any:
    """The Sam that a checkpoint (.pth, or .safetensors) holds, in eval mode, on the CPU; executes no code from it.

    Raises ModelError where the file is damaged or no SAM.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        sam = empty_sam({name: tuple(tensor.shape) for name, tensor in state.items()})
        sam.load_state_dict(state)
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError) as error:
        reason = textwrap.shorten(str(error), 200)  # torch explains at length
        raise ModelError(f"{path}: damaged, or not a weights file: {reason}; download it again") from error
    except (AttributeError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(f"{path}: not a SAM checkpoint: {error}; one of {', '.join(OFFICIAL)} is") from error
    return sam.eval()


def empty_sam(shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """A Sam whose weights have these shapes; raises KeyError where one is missing that tells the architecture.

    Width, depth, heads, windows and image size are read from the image encoder's shapes; what all official SAMs share
    (`segment_anything.build_sam`) is written out.
    """
    from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

    patch_px = shapes["image_encoder.patch_embed.proj.weight"][-1]
    _, grid, _, width = shapes["image_encoder.pos_embed"]
    embedding = shapes["image_encoder.neck.0.weight"][0]
    # Relative positions, (2 * side - 1, head width): side is the whole grid in blocks of global attention.
    depth = sum(name.endswith("attn.rel_pos_h") for name in shapes)
    positions = [shapes[f"image_encoder.blocks.{block}.attn.rel_pos_h"] for block in range(depth)]
    sides = [(length + 1) // 2 for length, _ in positions]
    image_px = grid * patch_px
    return Sam(
        image_encoder=ImageEncoderViT(
            depth=depth,
            embed_dim=width,
            img_size=image_px,
            mlp_ratio=4,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            num_heads=width // positions[0][1],
            patch_size=patch_px,
            qkv_bias=True,
            use_rel_pos=True,
            global_attn_indexes=tuple(block for block, side in enumerate(sides) if side == grid),
            window_size=min(sides),
            out_chans=embedding,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=embedding,
            image_embedding_size=(grid, grid),
            input_image_size=(image_px, image_px),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            num_multimask_outputs=3,
            transformer=TwoWayTransformer(depth=2, embedding_dim=embedding, mlp_dim=2048, num_heads=8),
            transformer_dim=embedding,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=[123.675, 116.28, 103.53],
        pixel_std=[58.395, 57.12, 57.375],
    )
