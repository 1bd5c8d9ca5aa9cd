"""The GOAL loss: L_global + w_local·L_local + w_image·L_TSL_image + w_text·L_TSL_text.

Source: GOAL (arXiv 2503.17782). The loss lives inside the module, so that ZeRO-3 gathers the parameters that the TSL
reaches directly (final LayerNorm, projection).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from goal_ray.config import strict
from goal_ray.errors import ModelError
from goal_ray.model import TowerOutput, encode_image, encode_text, image_tower, text_tower
from kernels.tsl import tsl_loss

MAX_LOGIT_SCALE = math.log(100.0)
TERMS = ("global", "local", "tsl_image", "tsl_text")


@strict
@dataclass(frozen=True)
class LossConfig:
    """The weights of the loss's terms and their kind.

    weight_local: weight of the contrastive loss over (region crop, sentence)
    weight_tsl_image: weight of the token-similarity loss between a region's patches and its crop
    weight_tsl_text: weight of the token-similarity loss between a sentence's tokens and the sentence alone
    contrastive: clip is the symmetric InfoNCE, siglip the pairwise sigmoid (the model needs a logit bias)
    pooling: touch takes every patch that the box touches as a whole (the paper), coverage weighs it by its overlap
    tsl_backend: auto takes the fastest that runs here; reference is the slow definition
    """

    weight_local: float = 0.5
    weight_tsl_image: float = 1.0
    weight_tsl_text: float = 1.0
    contrastive: Literal["clip", "siglip"] = "clip"
    pooling: Literal["touch", "coverage"] = "touch"
    tsl_backend: Literal["auto", "reference", "eager", "triton"] = "auto"

    def __post_init__(self) -> None:
        for name in ("weight_local", "weight_tsl_image", "weight_tsl_text"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number >= 0, not {getattr(self, name)}")

    @property
    def weights(self) -> tuple[float, float, float, float]:
        """Weights in the order of TERMS."""
        return (1.0, self.weight_local, self.weight_tsl_image, self.weight_tsl_text)

    @property
    def needs_pairs(self) -> bool:
        """Whether any term reads local pairs; without, crops and sentences are never encoded."""
        return any(self.weights[1:])


class GoalBatch(NamedTuple):
    """One rank's batch; M local pairs, ragged over B pictures.

    images_B3SS     uint8 pictures, already resized and cropped
    text_BL         int64 caption ids, padded with 0 to the batch's longest
    crops_M3SS      uint8 region crops
    sentences_ML    int64 sentence ids, padded likewise
    boxes_M4        float32 (x0, y0, x1, y1) in patch cells; zero area = left out of the image TSL
    spans_M2        int64 half-open token spans within text_BL; (-1, -1) = left out of the text TSL
    sample_index_M  int64 row of images_B3SS that each pair belongs to, non-decreasing
    """

    images_B3SS: Tensor
    text_BL: Tensor
    crops_M3SS: Tensor
    sentences_ML: Tensor
    boxes_M4: Tensor
    spans_M2: Tensor
    sample_index_M: Tensor


class GoalModel(nn.Module):
    """An open_clip model with the GOAL loss around it.

    clip       open_clip model with native towers
    config     weights and kinds of the terms
    mean, std  the model's pixel normalisation, per channel, on the 0..1 scale
    bf16       towers and TSL under bfloat16 autocast over float32 weights; contrastive logits stay float32
    """

    mean_311: Tensor
    std_311: Tensor

    def __init__(
        self, clip: nn.Module, config: LossConfig, mean: Sequence[float], std: Sequence[float], bf16: bool = False
    ):
        super().__init__()
        image_tower(clip), text_tower(clip)  # refuses towers the loss cannot read
        if config.contrastive == "siglip" and clip.logit_bias is None:
            raise ModelError("loss.contrastive=siglip needs a model with a logit bias; use clip, or a SigLIP model")
        self.clip: Any = clip
        self.config = config
        self.bf16 = bf16
        self.contrastive = ClipLoss() if config.contrastive == "clip" else SigLipLoss()
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, batch: GoalBatch) -> Tensor:
        """The loss's terms, unweighted, float32 (4,), in the order of TERMS.

        Averaging their gradients over ranks (as every data-parallel engine does) gives the gradient of the loss of the
        whole batch: contrastive terms see the features of all ranks, and TSL terms are scaled so that every region
        counts the same wherever it lies. Terms of weight 0 that cost a forward are not computed and are 0.
        """
        with torch.autocast(batch.images_B3SS.device.type, torch.bfloat16, enabled=self.bf16):
            return self._losses(batch) if self.config.needs_pairs else self._global_only(batch)

    def _global_only(self, batch: GoalBatch) -> Tensor:
        image = self._encode_images(batch.images_B3SS)
        text = encode_text(self.clip, batch.text_BL)
        counts_R = gather_counts(torch.tensor([len(batch.images_B3SS)], device=image.pooled_BE.device))[:, 0]
        loss = self._contrast(image.pooled_BE, text.pooled_BE, counts_R.tolist())
        return torch.stack([loss, *(loss.new_zeros(()) for _ in TERMS[1:])])

    def _losses(self, batch: GoalBatch) -> Tensor:
        images = len(batch.images_B3SS)
        both = self._encode_images(torch.cat([batch.images_B3SS, batch.crops_M3SS]))
        text = encode_text(self.clip, batch.text_BL)
        sentence = encode_text(self.clip, batch.sentences_ML)
        crop_ME = both.pooled_BE[images:]

        image_tsl = self._tsl_image(both, crop_ME, batch)
        text_tsl = self._tsl_text(text, sentence.pooled_BE, batch)
        counts_R4 = gather_counts(
            torch.stack(
                [
                    torch.tensor(images, device=crop_ME.device),
                    torch.tensor(len(crop_ME), device=crop_ME.device),
                    image_tsl.count,
                    text_tsl.count,
                ]
            )
        )
        counts = counts_R4.tolist()
        return torch.stack(
            [
                self._contrast(both.pooled_BE[:images], text.pooled_BE, [row[0] for row in counts]),
                self._contrast(crop_ME, sentence.pooled_BE, [row[1] for row in counts]),
                image_tsl.loss.float() * global_mean_scale(counts_R4[:, 2]),
                text_tsl.loss.float() * global_mean_scale(counts_R4[:, 3]),
            ]
        )

    def _encode_images(self, pixels_B3SS: Tensor) -> TowerOutput:
        scaled = (pixels_B3SS.float() / 255 - self.mean_311) / self.std_311
        return encode_image(self.clip, scaled)

    def _contrast(self, left_BE: Tensor, right_BE: Tensor, counts: Sequence[int]) -> Tensor:
        left_NE = gather_rows(F.normalize(left_BE.float(), dim=-1), counts)
        right_NE = gather_rows(F.normalize(right_BE.float(), dim=-1), counts)
        if len(left_NE) == 0:
            return left_NE.sum()
        scale = self.clip.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        with torch.autocast(left_NE.device.type, enabled=False):
            return self.contrastive(left_NE, right_NE, scale, self.clip.logit_bias)

    def _tsl_image(self, both: TowerOutput, crop_ME: Tensor, batch: GoalBatch):
        visual = image_tower(self.clip)
        return tsl_loss(
            both.tokens_BND,  # uncut, crops and CLS included: a slice would cost its gradient another copy
            batch.boxes_M4,
            batch.sample_index_M,
            visual.grid_size,
            visual.ln_post.weight,
            visual.ln_post.bias,
            visual.proj,
            crop_ME,
            mode=self.config.pooling,
            eps=visual.ln_post.eps,
            first_token=both.first_token,
            backend=self.config.tsl_backend,
        )

    def _tsl_text(self, text: TowerOutput, sentence_ME: Tensor, batch: GoalBatch):
        tower = text_tower(self.clip)
        start_M, end_M = batch.spans_M2.unbind(1)
        rows = torch.stack([start_M, torch.zeros_like(start_M), end_M, (end_M > start_M).long()], dim=1)
        return tsl_loss(
            text.tokens_BND,
            rows.float(),
            batch.sample_index_M,
            (1, text.tokens_BND.shape[1]),
            tower.ln_final.weight,
            tower.ln_final.bias,
            tower.projection_DE,
            sentence_ME,
            mode=self.config.pooling,
            eps=tower.ln_final.eps,
            backend=self.config.tsl_backend,
        )


def world_size() -> int:
    """Ranks in the process group; 1 outside of one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_counts(counts_C: Tensor) -> Tensor:
    """Every rank's integer counts, (ranks, C)."""
    counts_C = counts_C.long()
    if world_size() == 1:
        return counts_C[None]
    rows = [torch.empty_like(counts_C) for _ in range(world_size())]
    dist.all_gather(rows, counts_C)
    return torch.stack(rows)


def global_mean_scale(counts_R: Tensor) -> Tensor:
    """Factor that turns this rank's mean into its share of the mean over all ranks, under averaged gradients."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return counts_R[rank] * len(counts_R) / counts_R.sum().clamp(min=1)


class _GatherRows(torch.autograd.Function):
    """All ranks' rows. Backward needs no communication: every rank computes the same loss from the same rows, so its
    own slice of the gradient is exact; times the number of ranks, because the engine averages gradients afterwards."""

    @staticmethod
    def forward(ctx, rows_ME: Tensor, counts: Sequence[int]) -> Tensor:
        rank = dist.get_rank()
        ctx.start, ctx.count, ctx.ranks = sum(counts[:rank]), counts[rank], len(counts)
        padded = F.pad(rows_ME, (0, 0, 0, max(counts) - len(rows_ME)))
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.contiguous())
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient_NE: Tensor):
        return gradient_NE[ctx.start : ctx.start + ctx.count] * ctx.ranks, None


def gather_rows(rows_ME: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, (sum of counts, E), differentiable; ranks may hold different numbers of rows.

    counts  rows on every rank, in rank order
    """
    return rows_ME if len(counts) == 1 else _GatherRows.apply(rows_ME, counts)
