"""A ragged batch for the whole GOAL loss, and gradients by parameter."""

import torch

from goal_ray.goal_batch import GoalBatch
from goal_ray.model import LoadedModel, load_model
from goal_ray.settings import ModelConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
PAIRS_PER_IMAGE = [2, 0, 1, 3]


def load(tiny_clip: str) -> LoadedModel:
    loaded = load_model(ModelConfig(tiny_clip), seed=3)
    loaded.clip.double().eval()
    return loaded


def random_batch(tokenizer, seed: int) -> GoalBatch:
    """Four pictures with 2, 0, 1 and 3 pairs; one box was cut away, one sentence lies beyond the context."""
    generator = torch.Generator().manual_seed(seed)
    pairs = sum(PAIRS_PER_IMAGE)
    corners = torch.rand(pairs, 2, 2, generator=generator).sort(dim=1).values * 4
    boxes = corners.reshape(pairs, 4)
    boxes[1] = 0
    spans = torch.tensor([[1, 4], [4, 9], [2, 3], [1, 10], [-1, -1], [3, 8]])
    words = ["red cat", "a blue dog runs fast", "house", "the big green tree by the sea", "moon", "old car"]
    captions = [f"{words[k]} and {words[(k + 1) % 6]}. then some more words here" for k in range(4)]
    return GoalBatch(
        images_B3SS=torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        text_BL=tokenizer(captions)[:, :20],
        crops_M3SS=torch.randint(0, 256, (pairs, 3, 32, 32), generator=generator, dtype=torch.uint8),
        sentences_ML=tokenizer(words)[:, :12],
        boxes_M4=boxes,
        spans_M2=spans,
        sample_index_M=torch.repeat_interleave(torch.arange(4), torch.tensor(PAIRS_PER_IMAGE)),
    )


def gradients(clip, total: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*clip.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}
