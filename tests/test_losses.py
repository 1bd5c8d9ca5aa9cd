"""The GOAL loss against an independent float64 computation, alone and over ranks."""

import os
from itertools import product

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from goal_batches import MEAN, STD, gradients, load, random_batch
from open_clip.loss import ClipLoss, SigLipLoss

from goal_ray.config import load_config
from goal_ray.errors import ModelError
from goal_ray.goal_batch import GoalBatch, count_batch
from goal_ray.gradcache import split_batch
from goal_ray.losses import MAX_LOGIT_SCALE, Features, GoalModel, contrastive_terms
from goal_ray.settings import TERMS, LossConfig


def slow_goal_terms(clip, batch: GoalBatch) -> torch.Tensor:
    """The four terms by plain loops from METHOD's formulas, two passes per tower, on open_clip's own forwards."""

    def normal(pixels):
        mean_311, std_311 = (torch.tensor(each).to(pixels.device).double().view(3, 1, 1) for each in (MEAN, STD))
        return (pixels.double() / 255 - mean_311) / std_311

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


@pytest.mark.parametrize("backend", ["reference", "eager", "triton"])
def test_loss_and_gradients_equal_an_independent_float64_computation(tiny_clip, backend):
    loaded = load(tiny_clip)
    # Where a GPU is, Triton compiles its kernels for it, and takes no tensors of the CPU.
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    batch = GoalBatch(*(each.to(device) for each in random_batch(loaded.tokenizer, seed=11)[:-1]))
    weights = torch.tensor([1.0, 0.5, 2.0, 3.0], device=device)
    model = GoalModel(loaded.clip, LossConfig(tsl_backend=backend), MEAN, STD).double().to(device)
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


@pytest.mark.parametrize(("wrong", "moves"), [(True, True), (False, False)])
def test_a_logit_scale_beyond_its_limit_counts_as_the_limit_and_can_only_fall(tiny_clip, wrong, moves):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=3)
    model = GoalModel(
        loaded.clip, LossConfig(weight_local=0, weight_tsl_image=0, weight_tsl_text=0), MEAN, STD
    ).double()
    features = model(batch, features_only=True)
    # Pairs that match exactly want a larger scale; mismatched ones a smaller.
    text = features.image_BE.roll(1, dims=0) if wrong else features.image_BE
    beyond = torch.tensor([MAX_LOGIT_SCALE + 1], requires_grad=True)
    at_limit = torch.tensor([MAX_LOGIT_SCALE], requires_grad=True)
    losses = [
        contrastive_terms(features._replace(text_BE=text, logit_scale=scale), count_batch(batch)[None], "clip")[0]
        for scale in (beyond, at_limit)
    ]
    assert losses[0] == losses[1]
    losses[0].backward()
    assert (beyond.grad.item() > 0) == moves
    assert beyond.grad.item() >= 0


def test_siglip_needs_a_logit_bias(tiny_clip):
    with pytest.raises(ModelError, match="logit bias"):
        GoalModel(load(tiny_clip).clip, LossConfig(contrastive="siglip"), MEAN, STD)


# Of pictures and of pairs; a rank may have none.
ROWS = {"whole": (3, 2), "local": (0, 4)}
INPUTS = ("left", "right", "scale", "bias")


SCALES = {"within": 2.0, "beyond": MAX_LOGIT_SCALE + 0.5}


def contrast_inputs(rows: int, scale: float) -> list[torch.Tensor]:
    """Rows that hardly differ. The second half matches and wants a larger scale, the first, mirrored, a smaller."""
    noise_ME = 0.1 * torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))
    sign_M1 = torch.where(torch.arange(rows) < (rows + 1) // 2, -1, 1)[:, None]
    left, right = (F.normalize(1 + each, dim=1) for each in (noise_ME, sign_M1 * noise_ME))
    return [each.requires_grad_() for each in (left, right, torch.tensor([scale]), torch.tensor([-3.0]))]


def contrast_on_rank(rank: int, kind: str, scale_is: str) -> dict[str, dict[str, torch.Tensor]]:
    """Means over ranks of each contrastive term and of its gradients."""
    inputs = {name: contrast_inputs(sum(counts), SCALES[scale_is]) for name, counts in ROWS.items()}
    own = [rows.split(counts)[rank] for name, counts in ROWS.items() for rows in inputs[name][:2]]
    counts_R4 = torch.tensor([*ROWS.values(), (0, 0), (0, 0)]).T
    *_, scale, bias = inputs["whole"]
    terms_2 = contrastive_terms(Features(*own, scale, bias), counts_R4, kind)
    found = {}
    for name, term in zip(ROWS, terms_2, strict=True):
        wanted = [*inputs[name][:2], scale, bias]
        values = [term.detach(), *torch.autograd.grad(term, wanted, retain_graph=True)]
        for value in values:
            dist.all_reduce(value)
        found[name] = dict(zip(("term", *INPUTS), (value / 2 for value in values), strict=True))
    return found


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()
    terms = model(split_batch(random_batch(loaded.tokenizer, seed=7), 2)[rank])
    averaged = {}
    for name, gradient in gradients(loaded.clip, terms.sum()).items():
        dist.all_reduce(gradient)
        averaged[name] = gradient / 2
    dist.all_reduce(terms)
    contrasts = {
        f"{kind} {scale_is}": contrast_on_rank(rank, kind, scale_is)
        for kind, scale_is in product(("clip", "siglip"), SCALES)
    }
    if rank == 0:
        result = {"terms": terms.detach() / 2, "gradients": averaged, **contrasts}
        torch.save(result, os.path.join(folder, "result.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, (str(folder), tiny_clip), nprocs=2)
    return torch.load(folder / "result.pt", weights_only=True)


@pytest.mark.parametrize(("kind", "loss"), [("clip", ClipLoss()), ("siglip", SigLipLoss())])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("scale_is", SCALES)
def test_ranks_with_rows_or_none_share_what_open_clip_computes_of_all(on_two_ranks, kind, loss, name, scale_is):
    left, right, scale, bias = contrast_inputs(sum(ROWS[name]), min(SCALES[scale_is], MAX_LOGIT_SCALE))
    whole = loss(left, right, scale.exp(), bias)
    gradients = list(torch.autograd.grad(whole, [left, right, scale, bias]))
    if scale_is == "beyond":
        gradients[2] = gradients[2].clamp(min=0)
    expected = dict(zip(("term", *INPUTS), (whole.detach(), *gradients), strict=True))
    torch.testing.assert_close(on_two_ranks[f"{kind} {scale_is}"][name], expected, rtol=1e-5, atol=1e-5)


def test_two_ranks_with_unequal_pairs_give_the_gradient_of_the_whole_batch(on_two_ranks, tiny_clip):
    found = on_two_ranks
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()
    terms = model(random_batch(loaded.tokenizer, seed=7))
    assert len(terms) == len(TERMS)
    assert torch.allclose(found["terms"], terms, rtol=1e-6)
    for name, gradient in gradients(loaded.clip, terms.sum()).items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((found["gradients"][name] - gradient).abs().max() / scale) < 1e-4, name


@pytest.mark.parametrize(
    ("schedule", "progress", "weight"),
    [
        (0.5, 0.0, 0.5),
        (((0.0, 0.0), (0.5, 1.0)), 0.25, 0.5),
        (((0.2, 1.0), (0.6, 3.0)), 0.1, 1.0),
        (((0.2, 1.0), (0.6, 3.0)), 0.9, 3.0),
        (((0.2, 1.0), (0.6, 3.0), (1.0, 0.0)), 0.8, 1.5),
    ],
)
def test_a_weight_follows_its_points(schedule, progress, weight):
    config = LossConfig(weight_tsl_image=schedule)
    assert config.weights(progress) == pytest.approx((1.0, 0.5, weight, 1.0))


@pytest.mark.parametrize("schedule", [(), ((0.5, 1.0), (0.2, 1.0)), ((0.0, -1.0),), ((0.0, 1.0), (2.0, 1.0)), -1.0])
def test_impossible_schedules_are_refused_by_name(schedule):
    with pytest.raises(ValueError, match="weight_local"):
        LossConfig(weight_local=schedule)


def test_a_term_that_is_scheduled_from_zero_still_needs_pairs():
    late = LossConfig(weight_local=0, weight_tsl_image=((0.5, 0.0), (1.0, 1.0)), weight_tsl_text=0)
    assert late.needs_pairs
    assert not LossConfig(weight_local=0, weight_tsl_image=((0.0, 0.0),), weight_tsl_text=0).needs_pairs


def test_a_schedule_comes_from_the_command_line():
    config = load_config(LossConfig, None, ["weight_tsl_text=[[0, 0], [0.1, 2]]"])
    assert config.weights(0.05) == pytest.approx((1.0, 0.5, 1.0, 1.0))
