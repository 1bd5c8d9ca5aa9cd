"""GradCache: a batch in chunks has the gradient of the batch at once, alone and over ranks."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from goal_batches import MEAN, STD, load, random_batch

from goal_ray.goal_batch import GoalBatch, count_batch
from goal_ray.gradcache import cached_gradients, split_batch
from goal_ray.losses import GoalModel, gather_counts
from goal_ray.settings import LossConfig

CONFIG = LossConfig(weight_local=0.5, weight_tsl_image=2.0, weight_tsl_text=3.0)


def in_chunks(model: GoalModel, batch: GoalBatch, chunks: int, weights) -> torch.Tensor:
    """Leaves the gradients of a batch, taken in chunks, in the parameters; returns the terms."""
    batch = batch._replace(counts_R4=gather_counts(count_batch(batch)))
    parts = split_batch(batch, chunks)
    with torch.no_grad():
        features = [model(part, features_only=True) for part in parts]
    terms_4 = torch.zeros(4)
    for part, cache in zip(parts, cached_gradients(features, batch.counts_R4, "clip", weights), strict=True):
        part_4 = model(part, cached=cache)
        (part_4 * part_4.new_tensor(weights)).sum().backward()
        terms_4 += part_4.detach()
    return terms_4


def at_once(tiny_clip: str, batch: GoalBatch, config: LossConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, config, MEAN, STD).double()
    terms_4 = model(batch)
    (terms_4 * terms_4.new_tensor(config.weights(0))).sum().backward()
    return terms_4.detach(), {name: p.grad for name, p in loaded.clip.named_parameters()}


def assert_equal_gradients(found: dict, expected: dict) -> None:
    for name, gradient in expected.items():
        if gradient is None:
            assert found[name] is None, name
            continue
        # The contrastive part is float32 by design.
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((found[name] - gradient).abs().max() / scale) < 1e-5, name


@pytest.mark.parametrize("chunks", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "config", [CONFIG, LossConfig(weight_local=0, weight_tsl_image=0, weight_tsl_text=0)], ids=["goal", "global only"]
)
def test_chunks_have_the_terms_and_gradients_of_the_batch_at_once(tiny_clip, chunks, config):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=5)
    terms_4, expected = at_once(tiny_clip, batch, config)
    model = GoalModel(loaded.clip, config, MEAN, STD).double()
    found_4 = in_chunks(model, batch, chunks, config.weights(0))
    assert torch.allclose(found_4, terms_4, rtol=1e-6)
    assert_equal_gradients({name: p.grad for name, p in loaded.clip.named_parameters()}, expected)


def test_a_batch_without_any_pair_goes_through_in_chunks_too(tiny_clip):
    loaded = load(tiny_clip)
    batch = random_batch(loaded.tokenizer, seed=5)
    pairs = ("crops_M3SS", "sentences_ML", "boxes_M4", "spans_M2", "sample_index_M")
    batch = batch._replace(**{name: getattr(batch, name)[:0] for name in pairs})
    terms_4, expected = at_once(tiny_clip, batch, CONFIG)
    model = GoalModel(loaded.clip, CONFIG, MEAN, STD).double()
    found_4 = in_chunks(model, batch, 2, CONFIG.weights(0))
    assert torch.allclose(found_4, terms_4, rtol=1e-6)
    assert terms_4[1:].tolist() == [0, 0, 0]
    assert_equal_gradients({name: p.grad for name, p in loaded.clip.named_parameters()}, expected)


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    loaded = load(tiny_clip)
    model = GoalModel(loaded.clip, CONFIG, MEAN, STD).double()
    mine = split_batch(random_batch(loaded.tokenizer, seed=7), 2)[rank]
    terms_4 = in_chunks(model, mine, 2, CONFIG.weights(0))
    dist.all_reduce(terms_4)
    gradients = {}
    for name, parameter in loaded.clip.named_parameters():
        dist.all_reduce(parameter.grad)
        gradients[name] = parameter.grad / 2
    if rank == 0:
        torch.save({"terms": terms_4 / 2, "gradients": gradients}, os.path.join(folder, "result.pt"))
    dist.destroy_process_group()


def test_two_ranks_of_two_chunks_with_unequal_pairs_have_the_gradient_of_the_whole(tiny_clip, tmp_path):
    mp.spawn(run_rank, (str(tmp_path), tiny_clip), nprocs=2)
    found = torch.load(tmp_path / "result.pt", weights_only=True)
    terms_4, expected = at_once(tiny_clip, random_batch(load(tiny_clip).tokenizer, seed=7), CONFIG)
    assert torch.allclose(found["terms"], terms_4, rtol=1e-6)
    assert_equal_gradients(found["gradients"], expected)


def test_parts_hold_every_pair_once_with_texts_cut_to_their_own_longest(tiny_clip):
    batch = random_batch(load(tiny_clip).tokenizer, seed=5)
    parts = split_batch(batch, 2)
    assert sum(len(part.images_B3SS) for part in parts) == 4
    assert [part.sample_index_M.tolist() for part in parts] == [[0, 0], [0, 1, 1, 1]]
    assert torch.equal(torch.cat([part.crops_M3SS for part in parts]), batch.crops_M3SS)
    for part in parts:
        assert part.text_BL[:, -1].any()
        for row, whole in zip(part.sentences_ML, batch.sentences_ML[: len(part.sentences_ML)], strict=True):
            assert row.shape <= whole.shape


@pytest.mark.parametrize("multiple", [1, 8])
def test_texts_of_parts_are_as_long_as_their_longest_rounded_up(tiny_clip, multiple):
    batch = random_batch(load(tiny_clip).tokenizer, seed=5)
    length = -(-batch.text_BL.shape[1] // 8) * 8
    batch = batch._replace(text_BL=torch.nn.functional.pad(batch.text_BL, (0, length - batch.text_BL.shape[1])))
    for part in split_batch(batch, 2, multiple):
        width = part.text_BL.shape[1]
        longest = int(part.text_BL.any(dim=0).nonzero()[-1]) + 1
        assert longest <= width < longest + multiple
        assert width % multiple == 0


def test_pairs_out_of_order_are_refused_before_they_get_to_other_pictures(tiny_clip):
    batch = random_batch(load(tiny_clip).tokenizer, seed=5)
    with pytest.raises(ValueError, match="sort the pairs by picture"):
        split_batch(batch._replace(sample_index_M=batch.sample_index_M.flip(0)), 2)


def test_more_chunks_than_pictures_are_refused(tiny_clip):
    with pytest.raises(ValueError, match="4 pictures cannot be cut into 5 chunks"):
        split_batch(random_batch(load(tiny_clip).tokenizer, seed=5), 5)
