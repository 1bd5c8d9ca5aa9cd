"""The published style of GOAL step, after the description in the paper and of its code: what goal_ray is compared with.

Each tower runs for the embedding of the whole, again for its tokens, and for the part. Captions and sentences come as
strings and are tokenised inside the step, to the full context. A loop over the batch reads the boxes with `.item()`,
finds a sentence's tokens by tokenising the text before it, and pools, normalises and projects one sample at a time.
Attention runs as open_clip wrote it. Anomaly detection and the unfused optimizer belong to the style too; they are
switched on where the step is put together.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from goal_ray.model import image_tower, text_tower
from goal_ray.train.benchmark.work import CONTEXT, Work

WEIGHT_LOCAL = 0.5


def published_loss(clip: Any, tokenizer: Callable[..., Tensor], work: Work) -> Tensor:
    """The GOAL loss of a batch, (): equal to goal_ray's where a square picture leaves the boxes as they are."""
    device = work.pictures_N3SS.device
    images_B3SS, crops_M3SS = work.pictures_N3SS.split(len(work.captions))
    ids_BL = tokenizer(work.captions, context_length=CONTEXT).to(device)
    sentence_ids_ML = tokenizer(work.sentences, context_length=CONTEXT).to(device)

    image_BE, text_BE = clip.encode_image(images_B3SS), clip.encode_text(ids_BL)
    crop_ME, sentence_ME = clip.encode_image(crops_M3SS), clip.encode_text(sentence_ids_ML)
    loss_global = contrast(clip, image_BE, text_BE)
    loss_local = contrast(clip, crop_ME, sentence_ME)

    visual, text = image_tower(clip), text_tower(clip)
    patches_BND = visual.transformer(visual._embeds(images_B3SS))[:, 1:]
    embedded_BLD = text.token_embedding(ids_BL) + text.positional_embedding
    tokens_BLD = text.transformer(embedded_BLD, attn_mask=text.attn_mask)
    columns = visual.grid_size[1]
    patch = visual.image_size[1] // columns
    image_losses, text_losses = [], []
    for i in range(len(work.captions)):
        x0, y0, x1, y1 = (work.boxes_px_M4[i, side].item() for side in range(4))
        inside = [
            row * columns + column
            for row in range(y0 // patch, -(-y1 // patch))
            for column in range(x0 // patch, -(-x1 // patch))
        ]
        pooled_D = patches_BND[i, inside].mean(dim=0)
        image_losses.append(miss(visual.ln_post, pooled_D, visual.proj, crop_ME[i]))

        caption, sentence = work.captions[i], work.sentences[i]
        before = tokens_of(tokenizer, caption[: caption.index(sentence)])
        start = 1 + before  # behind the start token
        pooled_D = tokens_BLD[i, start : start + tokens_of(tokenizer, sentence)].mean(dim=0)
        text_losses.append(miss(text.ln_final, pooled_D, text.projection_DE, sentence_ME[i]))
    loss_tsl = torch.stack(image_losses).mean() + torch.stack(text_losses).mean()
    return loss_global + WEIGHT_LOCAL * loss_local + loss_tsl


def contrast(clip: Any, left_BE: Tensor, right_BE: Tensor) -> Tensor:
    """Symmetric InfoNCE."""
    return ClipLoss()(F.normalize(left_BE, dim=-1), F.normalize(right_BE, dim=-1), clip.logit_scale.exp())


def miss(norm: nn.LayerNorm, pooled_D: Tensor, projection_DE: Any, target_E: Tensor) -> Tensor:
    """(1 - cosine)² of pooled tokens, embedded, and the embedding of the part alone."""
    feature_E = norm(pooled_D) @ projection_DE
    return (1 - F.cosine_similarity(feature_E, target_E, dim=0)) ** 2


def tokens_of(tokenizer: Any, text: str) -> int:
    """How many tokens a text has, without start and end."""
    return len(tokenizer.encode(text))
