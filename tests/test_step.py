"""The switches of a step change how it computes, not what."""

from dataclasses import replace

import pytest
import torch
from goal_batches import MEAN, STD, gradients, load, random_batch
from open_clip.transformer import QuickGELU
from tiny_architecture import write_architecture
from torch import nn
from torch._dynamo.utils import counters

from goal_ray.errors import ModelError
from goal_ray.losses import GoalModel
from goal_ray.model import encode_image, encode_text
from goal_ray.settings import LossConfig, StepConfig
from goal_ray.step import RECOMPILE_LIMIT, FusedAttention, SiluGELU, prepare_step

PLAIN = StepConfig(sdpa=False)


def terms_and_gradients(tiny_clip: str, config: StepConfig):
    loaded = load(tiny_clip)
    before = {name: tensor.clone() for name, tensor in loaded.clip.state_dict().items()}
    prepare_step(loaded.clip, config)
    after = loaded.clip.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    loaded.clip.train()
    terms_4 = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()(random_batch(loaded.tokenizer, seed=4))
    return terms_4, gradients(loaded.clip, terms_4.sum())


@pytest.mark.parametrize("switch", ["sdpa", "checkpoint_activations", "channels_last", "compile"])
def test_a_switch_changes_terms_and_gradients_by_rounding_alone(tiny_clip, switch):
    terms_4, expected = terms_and_gradients(tiny_clip, PLAIN)
    switched_4, found = terms_and_gradients(tiny_clip, replace(PLAIN, **{switch: True}))
    # float64 towers under a float32 contrastive loss
    assert torch.allclose(switched_4, terms_4, rtol=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-3)
        assert ((found[name] - gradient).abs().max() / scale) < 1e-5, name


def test_quick_gelu_gives_the_same_and_keeps_one_tensor(tiny_clip):
    clip = load(tiny_clip).clip
    for tower in (clip.visual, clip):
        tower.transformer.resblocks[0].mlp.gelu = QuickGELU()
    prepare_step(clip, PLAIN)
    assert isinstance(clip.visual.transformer.resblocks[0].mlp.gelu, SiluGELU)
    assert isinstance(clip.transformer.resblocks[0].mlp.gelu, SiluGELU)
    kept, results = [], []
    for module in (QuickGELU(), SiluGELU()):
        x = torch.linspace(-60, 60, 1001, dtype=torch.float64, requires_grad=True)
        saved = set()
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.add(t.data_ptr()) or t, lambda t: t):
            y = module(x)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
        kept.append(len(saved))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
    assert kept == [2, 1]


def test_compiled_towers_stay_compiled_through_training_and_evaluation(tiny_clip, monkeypatch):
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block, **kwargs: compile_block(block, backend="eager", **kwargs))
    torch.compiler.reset()
    clip = load(tiny_clip).clip
    prepare_step(clip, StepConfig(compile=True))
    counters.clear()
    for needs_gradients, batch, lengths in (
        (True, 8, (77, 16)),
        (True, 6, (48,)),
        (False, 8, (77, 24)),
        (False, 3, (40,)),
        (False, 1, (77, 8)),
        (True, 1, (64,)),
    ):
        with torch.set_grad_enabled(needs_gradients):
            encode_image(clip, torch.rand(batch, 3, 32, 32, dtype=torch.float64))
            for length in lengths:
                encode_text(clip, torch.ones(batch, length, dtype=torch.long))
    assert counters["frames"]["ok"] == counters["frames"]["total"]
    assert counters["frames"]["ok"] <= RECOMPILE_LIMIT / 2
    torch.compiler.reset()


@pytest.mark.parametrize("tower", ["vision", "text"])
def test_blocks_that_open_clip_cannot_recompute_are_refused(tmp_path, tower):
    loaded = load(write_architecture(tmp_path, **{tower: {"block_type": "custom"}}))
    with pytest.raises(ModelError, match="cannot recompute a CustomResidualAttentionBlock"):
        prepare_step(loaded.clip, StepConfig(checkpoint_activations=True))
    prepare_step(loaded.clip, StepConfig())


def test_custom_blocks_train_on_a_batch_without_any_pair(tmp_path):
    loaded = load(write_architecture(tmp_path, text={"block_type": "custom"}))
    prepare_step(loaded.clip, StepConfig())
    batch = random_batch(loaded.tokenizer, seed=4)
    pairs = ("crops_M3SS", "sentences_ML", "boxes_M4", "spans_M2", "sample_index_M")
    batch = batch._replace(**{name: getattr(batch, name)[:0] for name in pairs})
    terms_4 = GoalModel(loaded.clip, LossConfig(), MEAN, STD).double()(batch)
    terms_4.sum().backward()
    assert terms_4[1:].tolist() == [0, 0, 0]
    assert all(parameter.grad.isfinite().all() for parameter in loaded.clip.parameters())


def test_only_a_causal_tower_attends_causally(tiny_clip):
    clip = load(tiny_clip).clip
    prepare_step(clip, StepConfig())
    causal = [
        [block.attn.causal for block in transformer.resblocks]
        for transformer in (clip.visual.transformer, clip.transformer)
    ]
    assert causal == [[False, False], [True, True]]
    assert all(isinstance(block.attn, FusedAttention) for block in clip.transformer.resblocks)


def test_a_mask_that_is_not_causal_is_kept(tiny_clip):
    clip = load(tiny_clip).clip
    clip.attn_mask = clip.attn_mask.clone()
    clip.attn_mask[0, 5] = 0
    ids = load(tiny_clip).tokenizer(["a cat on a mat"])
    expected = clip.encode_text(ids)
    prepare_step(clip, StepConfig())
    assert torch.allclose(clip.encode_text(ids), expected, atol=1e-12)
