"""The GOAL loss against an independent float64 computation, alone and over ranks."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from goal_ray.errors import ModelError
from goal_ray.losses import TERMS, GoalBatch, GoalModel, LossConfig
from goal_ray.model import LoadedModel, ModelConfig, load_model

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


def slow_goal_terms(clip, batch: GoalBatch) -> torch.Tensor:
    """The four terms by plain loops from METHOD's formulas, two passes per tower, on open_clip's own forwards."""

    def normal(pixels):
        return (pixels.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
            3, 1, 1
        )

    def info_nce(left, right):
        left, right = F.normalize(left, dim=1), F.normalize(right, dim=1)
        logits = clip.logit_scale.exp() * left @ right.T
        rows = torch.stack([torch.logsumexp(logits[k], 0) - logits[k, k] for k in range(len(logits))])
        columns = torch.stack([torch.logsumexp(logits[:, k], 0) - logits[k, k] for k in range(len(logits))])
        return (rows.mean() + columns.mean()) / 2

    def pad(ids):
        return F.pad(ids, (0, 77 - ids.shape[1]))

    def tsl(pooled, layer_norm, projection, target):
        return (1 - F.cosine_similarity(layer_norm(pooled) @ projection, target, dim=0)) ** 2

    images, crops = normal(batch.images_B3SS), normal(batch.crops_M3SS)
    texts, sentences = pad(batch.text_BL), pad(batch.sentences_ML)
    crop_features, sentence_features = clip.encode_image(crops), clip.encode_text(sentences)
    patches = clip.forward_intermediates(images, image_indices=1)["image_intermediates"][0]  # (B, D, H, W)
    tokens = clip.forward_intermediates(text=texts, text_indices=1)["text_intermediates"][0]
    image_losses, text_losses = [], []
    for pair, sample in enumerate(batch.sample_index_M.tolist()):
        x0, y0, x1, y1 = batch.boxes_M4[pair].tolist()
        touched = [
            patches[sample, :, y, x]
            for y in range(4)
            for x in range(4)
            if min(x + 1, x1) - max(x, x0) > 0 and min(y + 1, y1) - max(y, y0) > 0
        ]
        if touched:
            pooled = torch.stack(touched).mean(0)
            image_losses.append(tsl(pooled, clip.visual.ln_post, clip.visual.proj, crop_features[pair]))
        start, end = batch.spans_M2[pair].tolist()
        if end > start >= 0:
            pooled = tokens[sample, start:end].mean(0)
            text_losses.append(tsl(pooled, clip.ln_final, clip.text_projection, sentence_features[pair]))
    return torch.stack(
        [
            info_nce(clip.encode_image(images), clip.encode_text(texts)),
            info_nce(crop_features, sentence_features),
            torch.stack(image_losses).mean(),
            torch.stack(text_losses).mean(),
        ]
    )


def gradients(clip, total: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*clip.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters, allow_unused=True)
    return {name: torch.zeros(()) if g is None else g for name, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_loss_and_gradients_equal_an_independent_float64_computation(tiny_clip, backend):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=11)
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0])
    model = GoalModel(loaded.clip, LossConfig(tsl_backend=backend), MEAN, STD).double()
    mine, theirs = model(batch), slow_goal_terms(loaded.clip, batch)
    # The contrastive part and the reported terms are float32 by design; the towers and the TSL run in float64 here.
    assert torch.allclose(mine.double(), theirs, rtol=2e-6)
    expected = gradients(loaded.clip, (theirs * weights).sum())
    for name, gradient in gradients(loaded.clip, (mine * weights).sum()).items():
        scale = expected[name].abs().max().clamp(min=1e-3)
        assert ((gradient - expected[name]).abs().max() / scale) < 1e-4, name


def test_without_pair_terms_only_whole_pictures_are_read(tiny_clip):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=11)
    none = batch._replace(
        crops_M3SS=batch.crops_M3SS[:0], sentences_ML=batch.sentences_ML[:0], sample_index_M=batch.sample_index_M[:0]
    )
    config = LossConfig(weight_local=0, weight_tsl_image=0, weight_tsl_text=0)
    terms = GoalModel(loaded.clip, config, MEAN, STD).double()(none)
    whole = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()(batch)
    assert terms.tolist() == [pytest.approx(whole[0].item()), 0, 0, 0]


def test_a_batch_whose_regions_were_all_cut_away_gives_zero_tsl_and_finite_gradients(tiny_clip):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=2)
    batch = batch._replace(boxes_M4=torch.zeros_like(batch.boxes_M4), spans_M2=torch.full_like(batch.spans_M2, -1))
    terms = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()(batch)
    assert terms[2:].tolist() == [0, 0]
    assert all(g.isfinite().all() for g in gradients(loaded.clip, terms.sum()).values())


def test_siglip_needs_a_logit_bias(tiny_clip):
    with pytest.raises(ModelError, match="logit bias"):
        GoalModel(load(tiny_clip).clip, LossConfig(contrastive="siglip"), MEAN, STD)


def split_batch(batch: GoalBatch, rank: int) -> GoalBatch:
    """Pictures 0-1 with their two pairs for rank 0, 2-3 with their four for rank 1."""
    images = slice(0, 2) if rank == 0 else slice(2, 4)
    pairs = slice(0, 2) if rank == 0 else slice(2, 6)
    return GoalBatch(
        batch.images_B3SS[images],
        batch.text_BL[images],
        batch.crops_M3SS[pairs],
        batch.sentences_ML[pairs],
        batch.boxes_M4[pairs],
        batch.spans_M2[pairs],
        batch.sample_index_M[pairs] - (0 if rank == 0 else 2),
    )


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()
    terms = model(split_batch(random_batch(loaded.tokenizer, seed=7), rank))
    averaged = {}
    for name, gradient in gradients(loaded.clip, terms.sum()).items():
        dist.all_reduce(gradient)
        averaged[name] = gradient / 2
    dist.all_reduce(terms)
    if rank == 0:
        torch.save({"terms": terms.detach() / 2, "gradients": averaged}, os.path.join(folder, "result.pt"))
    dist.destroy_process_group()


def test_two_ranks_with_unequal_pairs_give_the_gradient_of_the_whole_batch(tiny_clip, tmp_path):
    mp.spawn(run_rank, (str(tmp_path), tiny_clip), nprocs=2)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()
    terms = model(random_batch(loaded.tokenizer, seed=7))
    assert len(terms) == len(TERMS)
    assert torch.allclose(found["terms"], terms, rtol=1e-6)
    for name, gradient in gradients(loaded.clip, terms.sum()).items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((found["gradients"][name] - gradient).abs().max() / scale) < 1e-4, name
