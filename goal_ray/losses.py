"""The GOAL loss: L_global + w_local·L_local + w_image·L_TSL_image + w_text·L_TSL_text.

Source: GOAL (arXiv 2503.17782). The loss lives inside the module, so that ZeRO-3 gathers the parameters that the TSL
reaches directly (final LayerNorm, projection).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from goal_ray.errors import ModelError
from goal_ray.goal_batch import GoalBatch, count_batch
from goal_ray.model import TowerOutput, encode_image, encode_text, image_tower, text_tower
from goal_ray.precision import Precision, autocast
from goal_ray.settings import LossConfig
from kernels.tsl import TslResult, tsl_loss

MAX_LOGIT_SCALE = math.log(100.0)


class Features(NamedTuple):
    """What the contrastive losses read: float32, L2-normalised rows of this rank, and the model's scale and bias.

    image_BE, text_BE    pictures and captions
    crop_ME, sentence_ME local pairs; None where the loss is global only
    logit_scale, logit_bias   the model's parameters, (1,) or (); the bias is None where it has none
    """

    image_BE: Tensor
    text_BE: Tensor
    crop_ME: Tensor | None
    sentence_ME: Tensor | None
    logit_scale: Tensor
    logit_bias: Tensor | None


def contrastive_terms(features: Features, counts_R4: Tensor, kind: str) -> Tensor:
    """This rank's share of the global and local contrastive loss over all ranks' rows, float32 (2,), times the ranks.

    The mean over ranks is the loss. Local is 0 where there are no pairs.

    counts_R4  what `count_batch` finds on every rank, on the CPU
    kind       "clip" or "siglip"
    """
    images, pairs = counts_R4[:, 0].tolist(), counts_R4[:, 1].tolist()
    scale = _AtMost.apply(features.logit_scale, MAX_LOGIT_SCALE, len(counts_R4)).exp()

    def contrast(left_BE: Tensor, right_BE: Tensor, counts: Sequence[int]) -> Tensor:
        if sum(counts) == 0:
            return left_BE.sum() + right_BE.sum()  # 0, and no gradient is missing
        loss = clip_share if kind == "clip" else siglip_share
        return loss(left_BE, right_BE, scale, features.logit_bias, counts) * len(counts) / sum(counts)

    with torch.autocast(features.image_BE.device.type, enabled=False):
        whole = contrast(features.image_BE, features.text_BE, images)
        if features.crop_ME is None or features.sentence_ME is None:
            return torch.stack([whole, whole.new_zeros(())])
        return torch.stack([whole, contrast(features.crop_ME, features.sentence_ME, pairs)])


def clip_share(left_BE: Tensor, right_BE: Tensor, scale: Tensor, bias: Tensor | None, counts: Sequence[int]) -> Tensor:
    """Cross-entropy of this rank's rows against all ranks' of the other kind, both directions' mean, summed over rows.

    No rank makes the (N, N) logits. Source: CLIP (arXiv 2103.00020), figure 3.
    """
    target_B = own_places(counts, left_BE.device)

    def entropy(own_BE: Tensor, others_NE: Tensor) -> Tensor:
        return F.cross_entropy(pair_logits(own_BE, others_NE, scale, bias), target_B, reduction="sum")

    return (entropy(left_BE, gather_rows(right_BE, counts)) + entropy(right_BE, gather_rows(left_BE, counts))) / 2


def siglip_share(
    left_BE: Tensor, right_BE: Tensor, scale: Tensor, bias: Tensor | None, counts: Sequence[int]
) -> Tensor:
    """Sigmoid loss of this rank's left rows with all ranks' right rows, summed. Source: SigLIP (arXiv 2303.15343)."""
    logits_BN = pair_logits(left_BE, gather_rows(right_BE, counts), scale, bias)
    pairs_B1 = logits_BN.gather(1, own_places(counts, left_BE.device)[:, None])
    return F.softplus(logits_BN).sum() - pairs_B1.sum()  # softplus(-x) = softplus(x) - x, with no matrix of labels


def pair_logits(own_BE: Tensor, others_NE: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """(B, N). The rows are scaled, not the logits, of which the backward pass would then keep a copy."""
    logits_BN = (scale * own_BE) @ others_NE.T
    return logits_BN if bias is None else logits_BN + bias


def own_places(counts: Sequence[int], device: torch.device) -> Tensor:
    """(B,) where this rank's rows stand among all ranks'."""
    rank = dist.get_rank() if len(counts) > 1 else 0
    first = sum(counts[:rank])
    return torch.arange(first, first + counts[rank], device=device)


class CachedGradients(NamedTuple):
    """Stands for the contrastive losses of a batch in the backward pass of one chunk of it (see `goal_ray.gradcache`).

    terms_2   this chunk's share of the losses' values
    features  gradients of the losses with respect to this chunk's features, as many rows; None where there is none
    """

    terms_2: Tensor
    features: tuple[Tensor | None, ...]

    def stand_in(self, features: Features) -> Tensor:
        """(2,) tensor with the losses' values and, through `features`, their gradients."""
        zero = self.terms_2.new_zeros(())
        products = [
            zero if gradient is None or value is None else (value * gradient).sum()
            for value, gradient in zip(features, self.features, strict=True)
        ]
        image, text, crop, sentence, scale, bias = products
        # Scale and bias belong to both losses; their weighted gradient comes with the global term.
        linear_2 = torch.stack([image + text + scale + bias, crop + sentence])
        return linear_2 - linear_2.detach() + self.terms_2


class GoalModel(nn.Module):
    """An open_clip model with the GOAL loss around it.

    clip       open_clip model with native towers
    config     weights and kinds of the terms
    mean, std  the model's pixel normalisation, per channel, on the 0..1 scale
    precision  of the towers' and the TSL's matrix products, over float32 weights; contrastive logits stay float32
    """

    mean_311: Tensor
    std_311: Tensor

    def __init__(
        self,
        clip: nn.Module,
        config: LossConfig,
        mean: Sequence[float],
        std: Sequence[float],
        precision: Precision = "fp32",
    ):
        super().__init__()
        image_tower(clip), text_tower(clip)  # refuses towers the loss cannot read
        if config.contrastive == "siglip" and clip.logit_bias is None:
            raise ModelError("loss.contrastive=siglip needs a model with a logit bias; use clip, or a SigLIP model")
        self.clip: Any = clip
        self.config = config
        self.precision: Precision = precision
        self.register_buffer("mean_311", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std_311", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self, batch: GoalBatch, cached: CachedGradients | None = None, features_only: bool = False
    ) -> Tensor | Features:
        """The loss's terms, unweighted, float32 (4,), in the order of TERMS.

        cached         stands in for the contrastive losses; `batch` is then a chunk of the batch they are of
        features_only  returns the Features instead

        Averaging their gradients over ranks (as every data-parallel engine does) gives the gradient of the loss of the
        whole batch, and averaging the terms gives its terms: contrastive ones see the features of all ranks, and TSL
        ones are scaled so that every region counts the same wherever it lies. Terms of weight 0 that cost a forward are
        not computed and are 0.
        """
        with autocast(batch.images_B3SS.device, self.precision):
            images = len(batch.images_B3SS)
            text = encode_text(self.clip, batch.text_BL)
            if not self.config.needs_pairs:
                both, sentence = self._encode_images(batch.images_B3SS), None
            else:
                both = self._encode_images(torch.cat([batch.images_B3SS, batch.crops_M3SS]))
                sentence = encode_text(self.clip, batch.sentences_ML)
            features = Features(
                unit(both.pooled_BE[:images]),
                unit(text.pooled_BE),
                None if sentence is None else unit(both.pooled_BE[images:]),
                None if sentence is None else unit(sentence.pooled_BE),
                self.clip.logit_scale,
                self.clip.logit_bias,
            )
            if features_only:
                # Copies: ZeRO-3 takes the parameters themselves away when the forward ends.
                bias = None if features.logit_bias is None else features.logit_bias.clone()
                return features._replace(logit_scale=features.logit_scale.clone(), logit_bias=bias)
            counts_R4 = gather_counts(count_batch(batch)) if batch.counts_R4 is None else batch.counts_R4
            if cached is None:
                terms_2 = contrastive_terms(features, counts_R4.cpu(), self.config.contrastive)
            else:
                terms_2 = cached.stand_in(features)
            if sentence is None:
                return torch.cat([terms_2, terms_2.new_zeros(2)])
            image_tsl = self._tsl_image(both, both.pooled_BE[images:], batch)
            text_tsl = self._tsl_text(text, sentence.pooled_BE, batch)
            totals = counts_R4.sum(dim=0).clamp(min=1)
            scales_2 = len(counts_R4) / totals[2:]
            tsl_2 = torch.stack([share(image_tsl, scales_2[0]), share(text_tsl, scales_2[1])])
            return torch.cat([terms_2, tsl_2])

    def _encode_images(self, pixels_B3SS: Tensor) -> TowerOutput:
        scaled = (pixels_B3SS.float() / 255 - self.mean_311) / self.std_311
        return encode_image(self.clip, scaled)

    def _tsl_image(self, both: TowerOutput, crop_ME: Tensor, batch: GoalBatch) -> TslResult:
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

    def _tsl_text(self, text: TowerOutput, sentence_ME: Tensor, batch: GoalBatch) -> TslResult:
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


def unit(rows_ME: Tensor) -> Tensor:
    """Rows as float32 of length 1."""
    return F.normalize(rows_ME.float(), dim=-1)


def share(result: TslResult, scale: Tensor) -> Tensor:
    """This rank's mean as its share of the mean over all ranks: times its count, times ranks over the total count."""
    return result.loss.float() * result.count * scale


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


class _AtMost(torch.autograd.Function):
    """A value limited from above, whose gradient may still lower it: under a plain clamp a parameter that an optimizer
    carried past the limit has none, and stays there. Which way the gradient points, only the mean over ranks tells."""

    @staticmethod
    def forward(ctx, value: Tensor, limit: float, ranks: int) -> Tensor:
        ctx.ranks = ranks
        ctx.save_for_backward(value > limit)
        return value.clamp(max=limit)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (beyond,) = ctx.saved_tensors
        if ctx.ranks > 1:
            gradient = gradient / ctx.ranks
            dist.all_reduce(gradient)
        return gradient.masked_fill(beyond & (gradient < 0), 0.0), None, None


class _GatherRows(torch.autograd.Function):
    """All ranks' rows. Backward adds up what every rank's share of the loss has to say of this rank's rows."""

    @staticmethod
    def forward(ctx, rows_ME: Tensor, counts: Sequence[int]) -> Tensor:
        rank = dist.get_rank()
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        padded = F.pad(rows_ME, (0, 0, 0, max(counts) - len(rows_ME)))
        gathered = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(gathered, padded.contiguous())
        return torch.cat([rows[:count] for rows, count in zip(gathered, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient_NE: Tensor):
        summed_NE = gradient_NE.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed_NE)
        return summed_NE[ctx.start : ctx.start + ctx.count], None


def gather_rows(rows_ME: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, (sum of counts, E), differentiable; ranks may hold different numbers of rows.

    counts  rows on every rank, in rank order
    """
    return rows_ME if len(counts) == 1 else _GatherRows.apply(rows_ME, counts)
