"""Contrastive batches larger than memory: the towers see a batch in chunks, the loss sees all of it.

First every chunk's features, without a graph; then the gradients of the contrastive losses with respect to all
features; then each chunk again, with a graph, its features weighted by those gradients in place of the losses. The
gradient is that of the whole batch at once. The price is one more forward pass.
Source: GradCache (arXiv 2101.06983).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from goal_ray.goal_batch import GoalBatch
from goal_ray.losses import CachedGradients, Features, contrastive_terms


def split_batch(batch: GoalBatch, chunks: int, text_multiple: int = 1) -> list[GoalBatch]:
    """The batch, on the CPU, in `chunks` parts of nearly equal numbers of pictures, in order; texts cut to their own.

    text_multiple  tokens; what the texts' length is rounded up to, as in `goal_ray.batches.collate`

    Every part keeps the whole batch's `counts_R4`. Raises ValueError for fewer pictures than parts, and for pairs that
    do not follow the order of their pictures.
    """
    if len(batch.images_B3SS) < chunks:
        raise ValueError(f"{len(batch.images_B3SS)} pictures cannot be cut into {chunks} chunks")
    if chunks == 1:
        return [batch]
    if (batch.sample_index_M.diff() < 0).any():
        raise ValueError(
            "sample_index decreases: sort the pairs by picture, or they would get to other pictures' parts"
        )
    edges = [len(batch.images_B3SS) * part // chunks for part in range(chunks + 1)]
    pair_edges = torch.searchsorted(batch.sample_index_M, torch.tensor(edges)).tolist()
    parts = []
    for part in range(chunks):
        images, pairs = slice(*edges[part : part + 2]), slice(*pair_edges[part : part + 2])
        parts.append(
            GoalBatch(
                batch.images_B3SS[images],
                cut_padding(batch.text_BL[images], text_multiple),
                batch.crops_M3SS[pairs],
                cut_padding(batch.sentences_ML[pairs], text_multiple),
                batch.boxes_M4[pairs],
                batch.spans_M2[pairs],
                batch.sample_index_M[pairs] - edges[part],
                batch.counts_R4,
            )
        )
    return parts


def cut_padding(ids_BL: Tensor, multiple: int) -> Tensor:
    """Token ids without the columns that are padding, 0, in every row, but for a width that is such a multiple."""
    used = torch.nonzero(ids_BL.any(dim=0))
    longest = int(used[-1]) + 1 if len(used) else 1
    return ids_BL[:, : -(-longest // multiple) * multiple]


def cached_gradients(
    parts: Sequence[Features], counts_R4: Tensor, kind: str, weights: Sequence[float]
) -> list[CachedGradients]:
    """What stands in for the contrastive losses in each part's backward pass.

    parts      every chunk's features, of this rank, without a graph
    counts_R4  what `count_batch` finds for the whole batch on every rank, on the CPU
    kind       "clip" or "siglip"
    weights    of the loss's terms, in the order of TERMS
    """
    columns = list(zip(*parts, strict=True))
    rows = [None if column[0] is None else torch.cat(column).requires_grad_() for column in columns[:4]]
    shared = [None if column[0] is None else column[0].clone().requires_grad_() for column in columns[4:]]
    with torch.enable_grad():
        terms_2 = contrastive_terms(Features(*rows, *shared), counts_R4, kind)  # type: ignore[arg-type]
    # No row is in both losses, so one pass gives the rows' gradients of each; scale and bias are in both.
    row_gradients = _gradients(terms_2.sum(), rows)
    shared_gradients = _gradients(terms_2[0] + weights[1] * terms_2[1], shared)
    share = 1 / len(parts)
    shared_shares = [None if gradient is None else gradient * share for gradient in shared_gradients]
    sizes = [[0 if value is None else len(value) for value in part[:4]] for part in parts]
    pieces = [
        [None] * len(parts) if gradient is None else gradient.split([size[place] for size in sizes])
        for place, gradient in enumerate(row_gradients)
    ]
    return [
        CachedGradients(terms_2.detach() * share, (*(piece[part] for piece in pieces), *shared_shares))
        for part in range(len(parts))
    ]


def _gradients(loss: Tensor, inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient with respect to each input, None for None."""
    present = [each for each in inputs if each is not None]
    found = iter(torch.autograd.grad(loss, present, retain_graph=True))
    return [None if each is None else next(found) for each in inputs]
