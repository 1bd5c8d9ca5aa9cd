"""Retrieval metrics: recall at K, mAP and median rank between pictures and captions. Core: torch only."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from goal_ray.errors import ModelError
from goal_ray.metric_names import RECALL_AT


@torch.no_grad()
def ranks(query_NE: Tensor, target_NE: Tensor, chunk: int | None = None, target_index: Tensor | None = None) -> Tensor:
    """Rank (1 = best) of every query's right target among all targets by cosine similarity, int64 (queries,).

    query_NE, target_NE  embeddings of any float dtype on one device; rows need not be normalised
    chunk                queries compared at a time; memory is chunk × targets floats, by default at most 1 GiB
    target_index         int64 (queries,), the right target's row for each query (several captions of one picture);
                         default: row i belongs to row i

    Rank = number of targets at least as similar as the right one, itself included: a tie counts against the model,
    so embeddings that tell nothing apart rank last, not first. Similarities are float32, and the same two vectors can
    differ by rounding from one place in a matrix product to another; whatever lies within that rounding is a tie.

    Raises ModelError on NaN or infinite embeddings, ValueError on shapes or indices that do not fit together.
    """
    if query_NE.dim() != 2 or target_NE.dim() != 2 or query_NE.shape[1] != target_NE.shape[1]:
        raise ValueError(f"embeddings must be (N, E) of one E, not {tuple(query_NE.shape)}, {tuple(target_NE.shape)}")
    if target_index is None:
        if len(query_NE) != len(target_NE):
            raise ValueError(f"{len(query_NE)} queries for {len(target_NE)} targets need a target_index")
        target_index = torch.arange(len(query_NE), device=query_NE.device)
    elif target_index.shape != (len(query_NE),):
        raise ValueError(f"target_index must have shape ({len(query_NE)},), not {tuple(target_index.shape)}")
    elif ((target_index < 0) | (target_index >= len(target_NE))).any():
        raise ValueError(f"target_index must lie in 0..{len(target_NE) - 1}")
    query_NE, target_NE = unit_rows(query_NE, "query"), unit_rows(target_NE, "target")

    chunk = chunk or max(1, min(1024, 2**28 // max(1, len(target_NE))))
    # The rounding error of a dot product of unit vectors grows like √E on average.
    rounding = torch.finfo(torch.float32).eps * math.sqrt(query_NE.shape[1])
    found = [target_index.new_zeros(0, dtype=torch.int64)]
    for rows, right in zip(query_NE.split(chunk), target_index.long().split(chunk), strict=True):
        similarity = rows @ target_NE.T
        found.append((similarity >= similarity.gather(1, right[:, None]) - rounding).sum(1))
    return torch.cat(found)


def unit_rows(embedding_NE: Tensor, name: str) -> Tensor:
    """Rows at length 1, float32. Raises ModelError on a NaN or infinite row, which no ranking could be trusted with."""
    embedding_NE = embedding_NE.float()
    bad_N = ~embedding_NE.isfinite().all(1)
    if bad_N.any():
        raise ModelError(
            f"{int(bad_N.sum())} of {len(bad_N)} {name} embeddings are NaN or infinite (first: row "
            f"{int(bad_N.nonzero()[0, 0])}); the model has diverged: evaluate an earlier checkpoint, or lower the "
            "learning rate"
        )
    return F.normalize(embedding_NE, dim=1)


def retrieval_metrics(
    image_IE: Tensor, text_TE: Tensor, at: Sequence[int] = RECALL_AT, pairs_P2: Tensor | None = None
) -> dict[str, Any]:
    """Recall at each K and mAP, in percent of the queries, and the median rank, in both directions.

    image_IE, text_TE  embeddings of different pictures and different captions
    pairs_P2           int64 (picture, caption), rows that belong together, each pair once; rows in no pair are neither
                       asked for nor an answer. Default: caption i belongs to picture i

    A query with several right answers has the rank of the best of them: 1 + the wrong answers that are no less similar.
    Its average precision is the mean, over its right answers, of the share of right ones among all that are no less
    similar; for a single right answer that is 1 / rank.
    R@K is left out where there are no more than K answers, as it would be 100 for any model. The median of an even
    number is the mean of the middle two.

    Returns {"text_to_image": {"R@1": …, "mAP": …, "median_rank": …}, "image_to_text": {…}, "count": P}.
    Source: GOAL (arXiv 2503.17782) reports these recalls, and mAP among pictures and regions together. Raises as
    `ranks` does; ValueError where there is no pair.
    """
    if pairs_P2 is None:
        if len(image_IE) != len(text_TE):
            raise ValueError(f"{len(image_IE)} pictures and {len(text_TE)} captions need pairs_P2")
        pairs_P2 = torch.arange(len(image_IE), device=image_IE.device)[:, None].expand(-1, 2)
    if len(pairs_P2) == 0:
        raise ValueError("there are no pairs to measure retrieval on")
    pictures, picture_P = pairs_P2[:, 0].unique(return_inverse=True)
    captions, caption_P = pairs_P2[:, 1].unique(return_inverse=True)
    image_IE, text_TE = image_IE[pictures], text_TE[captions]

    def summary(query_QE: Tensor, target_TE: Tensor, query_P: Tensor, target_P: Tensor) -> dict[str, float]:
        # On the CPU, where sums have an order.
        rank_P = ranks(query_QE[query_P], target_TE, target_index=target_P).cpu()
        query_P = query_P.cpu()
        # Right answers by query and, within one, by rank: of the answers no less similar than the nth, which are `rank`
        # in number, n are right; of right ones that tie, the last has the n of all.
        by_rank = rank_P.argsort()
        order = by_rank[query_P[by_rank].argsort(stable=True)]
        query_P, rank_P = query_P[order], rank_P[order]
        answers_Q = query_P.bincount()
        first_Q = answers_Q.cumsum(0) - answers_Q
        place_P = 1 + torch.arange(len(query_P)) - first_Q[query_P]
        _, tie_P = torch.stack([query_P, rank_P]).unique_consecutive(return_inverse=True, dim=1)
        place_P = torch.zeros_like(place_P).scatter_reduce(0, tie_P, place_P, "amax")[tie_P]
        precision_Q = torch.zeros(len(answers_Q), dtype=torch.float64)
        precision_Q = precision_Q.index_add(0, query_P, place_P.double() / rank_P) / answers_Q
        best_Q, count = (1 + rank_P - place_P)[first_Q], len(answers_Q)
        recalls = {f"R@{k}": 100 * int((best_Q <= k).sum()) / count for k in at if k < len(target_TE)}
        low, high = best_Q.sort().values[[(count - 1) // 2, count // 2]].tolist()
        return {**recalls, "mAP": 100 * precision_Q.mean().item(), "median_rank": (low + high) / 2}

    return {
        "text_to_image": summary(text_TE, image_IE, caption_P, picture_P),
        "image_to_text": summary(image_IE, text_TE, picture_P, caption_P),
        "count": len(pairs_P2),
    }
