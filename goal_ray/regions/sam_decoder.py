"""SAM's mask decoder for many points of an image: the same weights and the same function, at a third of the arithmetic.

What `segment_anything.modeling.MaskDecoder` does per point, and what is done here instead:

  image tokens copied for every point        shared, until the first layer's end makes them differ
  projections of 4,096 image tokens, six     of shared tokens once per image; of a point's own tokens not at all: with 7
  times per point                            prompt tokens in 8 heads, it is cheaper to project these 56 rows instead,
                                             (W k)·q = k·(Wᵀ q), and Σ a (W v) = W Σ a v
  attention over copies of the image         scaled_dot_product_attention of all points' tokens over one image
  masks of every point upscaled              the predicted IoU comes first: what it rejects is never upscaled, nor is
                                             the padding beside the picture

Shapes: I images · P points each · T prompt tokens a point · N image tokens (h·w) · C channels · Q = I·P points in all ·
M masks that are kept.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_points(
    sam: Any,
    features_ICHW: Tensor,
    pe_NC: Tensor,
    points_IP2: Tensor,
    valid: tuple[int, int],
    min_iou: float,
    transform: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask logits (M, 4·rows, 4·columns), predicted IoUs (M,) and images (M,) of all masks rated above `min_iou`.

    features_ICHW  of the image encoder
    pe_NC          the prompt encoder's dense positional encoding, in the features' dtype
    points_IP2     (x, y) in pixels of the model's input
    valid          (rows, columns) of the feature grid that are not padding
    transform      `two_way`, or the same compiled

    Three masks a point, as the official decoder gives with multimask_output.
    """
    decoder = sam.mask_decoder
    points = points_IP2.shape[1]
    prompts_QTC = prompt_tokens(sam, points_IP2.flatten(0, 1), features_ICHW.dtype)
    no_mask_C = sam.prompt_encoder.no_mask_embed.weight[0].to(features_ICHW)
    image_INC = features_ICHW.flatten(2).transpose(1, 2) + no_mask_C
    tokens_QTC, image_QNC = transform(decoder.transformer, prompts_QTC, image_INC, pe_NC)
    # The head may be in float32 though the rest is not: bfloat16 has so few ratings that thresholds and order see ties.
    rater = decoder.iou_prediction_head
    iou_QK = rater(tokens_QTC[:, 0].to(rater.layers[0].weight.dtype))[:, 1:].float()
    point_M, kind_M = (iou_QK > min_iou).nonzero(as_tuple=True)
    hyper_QKE = torch.stack(
        [head(tokens_QTC[:, 1 + kind]) for kind, head in enumerate(decoder.output_hypernetworks_mlps)][1:], dim=1
    )
    used_U, row_M = point_M.unique(return_inverse=True)
    grid_QHWC = image_QNC.unflatten(1, features_ICHW.shape[2:])[:, : valid[0], : valid[1]]
    masks_UKHW = mask_logits(decoder.output_upscaling, grid_QHWC[used_U], hyper_QKE[used_U])
    return masks_UKHW[row_M, kind_M].float(), iou_QK[point_M, kind_M], point_M // points


def prompt_tokens(sam: Any, points_Q2: Tensor, dtype: torch.dtype) -> Tensor:
    """The tokens that the decoder starts from, (Q, T, C): IoU token, mask tokens, the point, the padding point.

    Positions are computed in float32: a bfloat16 cannot tell neighbouring pixels apart.
    """
    decoder = sam.mask_decoder
    ones_Q1 = torch.ones(len(points_Q2), 1, dtype=torch.int, device=points_Q2.device)
    point_Q2C, _ = sam.prompt_encoder(points=(points_Q2[:, None], ones_Q1), boxes=None, masks=None)
    own_C = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    return torch.cat([own_C.expand(len(points_Q2), -1, -1), point_Q2C.to(dtype)], dim=1)


def two_way(transformer: Any, prompts_QTC: Tensor, image_INC: Tensor, pe_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Prompt tokens (Q, T, C) and image tokens (Q, N, C) after the two-way transformer."""
    first, *others = transformer.layers
    queries = first.norm1(first.self_attn(q=prompts_QTC, k=prompts_QTC, v=prompts_QTC))
    seen = attend_shared(first.cross_attn_token_to_image, queries + prompts_QTC, image_INC, pe_NC)
    queries = first.norm2(queries + seen)
    queries = first.norm3(queries + first.mlp(queries))
    placed = queries + prompts_QTC
    points = len(queries) // len(image_INC)
    shared = image_INC.repeat_interleave(points, dim=0)
    placed_shared = (image_INC + pe_NC)[:, None].expand(-1, points, -1, -1).flatten(0, 1)
    keys = first.norm4(look_back(first.cross_attn_image_to_token, shared, placed_shared, placed, queries))
    for layer in others:
        queries = layer.norm1(queries + layer.self_attn(q=placed, k=placed, v=queries))
        placed_keys = keys + pe_NC
        seen = attend(layer.cross_attn_token_to_image, queries + prompts_QTC, keys, placed_keys)
        queries = layer.norm2(queries + seen)
        queries = layer.norm3(queries + layer.mlp(queries))
        placed = queries + prompts_QTC
        keys = layer.norm4(look_back(layer.cross_attn_image_to_token, keys, placed_keys, placed, queries))
    seen = attend(transformer.final_attn_token_to_image, placed, keys, keys + pe_NC)
    return transformer.norm_final_attn(queries + seen), keys


def heads(attention: Any, rows: Tensor) -> Tensor:
    """(…, R, A) as (…, heads, R, A / heads)."""
    return rows.unflatten(-1, (attention.num_heads, -1)).transpose(-2, -3)


def head_weights(attention: Any, projection: Any) -> Tensor:
    """A projection's weight (A, C) as (heads, A / heads, C)."""
    return projection.weight.unflatten(0, (attention.num_heads, -1))


def scale(attention: Any) -> float:
    """What the official attention multiplies its logits by."""
    return 1 / math.sqrt(attention.internal_dim // attention.num_heads)


def attend_shared(attention: Any, queries_QTC: Tensor, image_INC: Tensor, pe_NC: Tensor) -> Tensor:
    """Attention (Q, T, C) of prompt tokens over the tokens of their image, which all its points share."""
    images, tokens = len(image_INC), queries_QTC.shape[1]
    queries_IRC = queries_QTC.unflatten(0, (images, -1)).flatten(1, 2)
    out = F.scaled_dot_product_attention(
        heads(attention, attention.q_proj(queries_IRC)),
        heads(attention, attention.k_proj(image_INC + pe_NC)),
        heads(attention, attention.v_proj(image_INC)),
    )
    out_IRC = attention.out_proj(out.transpose(1, 2).flatten(2))
    return out_IRC.unflatten(1, (-1, tokens)).flatten(0, 1)


def attend(attention: Any, queries_QTC: Tensor, keys_QNC: Tensor, placed_QNC: Tensor) -> Tensor:
    """Attention (Q, T, C) of prompt tokens over their point's own image tokens.

    The bias of the keys' projection moves all logits of a row alike, and has no part in the softmax.
    """
    query_QHTA = heads(attention, attention.q_proj(queries_QTC)) * scale(attention)
    probe_QRC = (query_QHTA @ head_weights(attention, attention.k_proj)).flatten(1, 2)
    weights_QRN = (probe_QRC @ placed_QNC.transpose(1, 2)).softmax(-1)
    seen_QHTC = (weights_QRN @ keys_QNC).unflatten(1, (attention.num_heads, -1))
    out_QHTA = seen_QHTC @ head_weights(attention, attention.v_proj).transpose(1, 2)
    return attention.out_proj(out_QHTA.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def look_back(attention: Any, keys_QNC: Tensor, placed_QNC: Tensor, placed_QTC: Tensor, queries_QTC: Tensor) -> Tensor:
    """Image tokens (Q, N, C) plus their attention over their point's prompt tokens, written over keys_QNC.

    Rows are sorted by prompt token, then head: the softmax then runs across whole vectors of heads. Each head's weights
    add up to 1, and so can carry its part of the output projection's bias.
    """
    count = attention.num_heads
    key_QHTA = heads(attention, attention.k_proj(placed_QTC)) * scale(attention)
    probe_QRC = (key_QHTA @ head_weights(attention, attention.q_proj)).transpose(1, 2).flatten(1, 2)
    bias_QHT1 = key_QHTA @ attention.q_proj.bias.unflatten(0, (count, -1, 1))
    bias_QR = bias_QHT1.squeeze(3).transpose(1, 2).flatten(1)
    logits_QNR = torch.baddbmm(bias_QR[:, None], placed_QNC, probe_QRC.transpose(1, 2))
    weights_QNR = logits_QNR.unflatten(2, (-1, count)).softmax(2).flatten(2)
    out_HAC = attention.out_proj.weight.T.unflatten(0, (count, -1))
    value_QHTC = heads(attention, attention.v_proj(queries_QTC)) @ out_HAC + attention.out_proj.bias / count
    return keys_QNC.baddbmm_(weights_QNR, value_QHTC.transpose(1, 2).flatten(1, 2))


def mask_logits(upscaling: Any, grid_UHWC: Tensor, hyper_UKE: Tensor) -> Tensor:
    """Logits (U, K, 4H, 4W) of K masks for each of U points.

    Both transposed convolutions have kernel and stride 2: each pixel becomes four on its own, by a matrix product. The
    pixels are put in their places last, when there are K channels of them and not C.
    """
    widen, norm, act, widen_again, act_again = upscaling
    x = enlarge(widen, grid_UHWC)
    x = act(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
    x = act_again(enlarge(widen_again, x))
    _, rows, columns = grid_UHWC.shape[:3]
    logits = x.flatten(1, -2) @ hyper_UKE.transpose(1, 2)
    logits = logits.unflatten(1, (rows, columns, 2, 2, 2, 2))  # row, column, their first halves, their second
    return logits.permute(0, 7, 1, 3, 5, 2, 4, 6).flatten(5, 7).flatten(2, 4)


def enlarge(convolution: Any, x: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2 on (…, C): (…, 2, 2, C')."""
    channels = convolution.weight.shape[0]
    weight = convolution.weight.permute(0, 2, 3, 1).reshape(channels, -1)
    rows = torch.addmm(convolution.bias.repeat(4), x.reshape(-1, channels), weight)
    return rows.view(*x.shape[:-1], 2, 2, -1)
