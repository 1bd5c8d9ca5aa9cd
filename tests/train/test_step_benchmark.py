"""The step's benchmark compares like with like: its competitors compute the same loss, or the same work."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from goal_ray.settings import LossConfig, StepConfig
from goal_ray.timing import measure
from goal_ray.train.benchmark import competitors
from goal_ray.train.benchmark.__main__ import SWITCHES, competing, main, turn
from goal_ray.train.benchmark.competitors import COMPETITORS, PARTS, encode_cut_text, own_copy
from goal_ray.train.benchmark.measure import peak_memory, ratio, time_in_turn
from goal_ray.train.benchmark.table import show_switches
from goal_ray.train.benchmark.work import CONTEXT, Settings, Work, make_work


@pytest.fixture(scope="module")
def settings(tiny_clip: str) -> Settings:
    return Settings(tiny_clip, batch=3, seed=5, step=StepConfig(text_multiple=1))


@pytest.fixture(scope="module")
def loaded(settings: Settings):
    return settings.load()


@pytest.fixture(scope="module")
def work(loaded, settings: Settings) -> Work:
    return make_work(loaded, settings)


def test_captions_are_long_and_hold_their_sentences(loaded, work, settings):
    assert all(sentence in caption for caption, sentence in zip(work.captions, work.sentences, strict=True))
    many = make_work(loaded, replace(settings, batch=40))
    captions, sentences = ((ids > 0).sum(1) for ids in (many.batch.text_BL, many.batch.sentences_ML))
    assert captions.min() >= 90
    assert captions.max() < CONTEXT
    assert sentences.min() >= 10
    assert sentences.max() <= 60


def test_the_same_seed_draws_the_same_batch(loaded, work, settings):
    again = make_work(loaded, settings)
    assert again.captions == work.captions
    assert all(torch.equal(a, b) for a, b in zip(again.batch, work.batch, strict=True))


def gradients_of(name: str, loaded, work, settings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    built = COMPETITORS[name](name, loaded, work, settings)
    loss = built.loss()
    (group,) = built.optimizer.param_groups
    names = [each for each, _ in loaded.clip.named_parameters()]
    found = torch.autograd.grad(loss, group["params"])
    return loss.detach(), dict(zip(names, found, strict=True))


def test_the_published_style_computes_goal_rays_loss_and_gradients(loaded, work, settings):
    loss, expected = gradients_of("goal", loaded, work, settings)
    published_loss, found = gradients_of("published", loaded, work, settings)
    assert LossConfig().weights(0.0) == (1.0, 0.5, 1.0, 1.0)  # the published ones, which the style has built in
    assert torch.allclose(published_loss, loss, rtol=1e-5)
    for name, gradient in expected.items():
        # float32 through two orders of summation; padding to the full context adds nothing to a causal tower
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max()), name


def test_the_floor_reads_cut_texts_as_open_clip_reads_padded_ones(loaded, work):
    ids_BL = work.batch.text_BL
    padded = torch.nn.functional.pad(ids_BL, (0, CONTEXT - ids_BL.shape[1]))
    expected = loaded.clip.encode_text(padded, normalize=True)
    assert torch.allclose(encode_cut_text(loaded.clip, ids_BL), expected, atol=1e-6)


def test_the_floor_does_the_useful_work_and_nothing_else(loaded, work, settings):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    useful = work.useful_flops(loaded.clip)
    built = COMPETITORS["plain"]("plain", loaded, work, settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        built.loss().backward()
    # the contrastive loss: 6 pictures with 6 texts of width 32, both ways, forward and for both gradients
    assert counter.get_total_flops() == useful + 2 * 6 * 6 * 32 * 2 * 3


def test_competitors_share_their_weights_but_no_module(loaded):
    copied = own_copy(loaded.clip)
    assert all(a is b for a, b in zip(copied.parameters(), loaded.clip.parameters(), strict=True))
    assert not {id(module) for module in copied.modules()} & {id(module) for module in loaded.clip.modules()}


def test_every_part_of_a_step_is_timed(loaded, work, settings):
    built = [COMPETITORS[name](name, loaded, work, settings) for name in ("goal", "plain", "published")]
    with measure("between") as seconds:
        for competitor in built:
            competitor.step()
    for name in ("goal", "plain"):
        assert all(seconds[f"{name}: {part}"] > 0 for part in PARTS)
    assert all(seconds[f"published: {part}"] > 0 for part in ("losses", "backward", "optimizer"))


def test_steps_train(work, settings, monkeypatch):
    monkeypatch.setattr(competitors, "LEARNING_RATE", 1e-3)
    for name, build in COMPETITORS.items():
        fresh = settings.load()
        built = build(name, fresh, work, settings)
        before = built.loss().item()
        for _ in range(3):
            built.step()
        assert built.loss().item() < before


def test_all_rounds_after_the_warmup_are_kept(loaded, work, settings):
    built = [COMPETITORS[name](name, loaded, work, settings) for name in ("goal", "plain")]
    times = time_in_turn(built, rounds=3, warmup=1)
    assert {name: len(rounds) for name, rounds in times.items()} == {"goal": 3, "plain": 3}


def test_a_ratio_is_taken_round_by_round():
    slowing = [{"backward": seconds} for seconds in (1.0, 2.0, 30.0)]
    twice = [{"backward": 2 * seconds} for seconds in (1.0, 2.0, 30.0)]
    assert ratio(twice, slowing) == (2.0, 2.0, 2.0)


def test_peak_memory_grows_with_the_batch(tiny_clip):
    variants = {str(batch): ("goal", Settings(tiny_clip, batch)) for batch in (2, 256)}
    found = peak_memory(variants)
    assert found["256"] > found["2"] + 256 * 2 * 3 * 32 * 32 * 4  # the normalised pictures alone


def test_a_step_in_bf16_is_also_compared_with_the_published_style_in_fp32():
    fp32, bf16 = Settings("any", 2), Settings("any", 2, precision="bf16")
    assert competing(["goal", "published"], fp32) == {"goal": ("goal", fp32), "published": ("published", fp32)}
    assert competing(["goal", "published"], bf16) == {
        "goal": ("goal", bf16),
        "published": ("published", bf16),
        "published fp32": ("published", fp32),
    }
    assert list(competing(["goal", "plain"], bf16)) == ["goal", "plain"]


def test_each_switch_is_turned_over_alone():
    given = Settings("any", 2)
    turned = dict(turn(given, name) for name in SWITCHES)
    assert turned["sdpa off"] == Settings("any", 2, step=StepConfig(sdpa=False))
    assert turned["bf16"] == Settings("any", 2, precision="bf16")
    assert len(turned) == len(SWITCHES)


def test_the_command_prints_ratios_and_writes_all_numbers(tiny_clip, tmp_path, capsys):
    out = tmp_path / "step.json"
    main(["--model", tiny_clip, "--batch=2", "--steps=2", "--warmup=1", "--device=cpu", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "published / goal" in printed
    assert "goal / plain" in printed
    result = json.loads(out.read_text())
    assert list(result["variants"]) == ["goal", "plain", "published"]
    for each in result["variants"].values():
        assert each["seconds"] > 0
        assert each["peak_bytes"] > 0
        assert 0 < each["mfu"] < 1


def test_switches_are_compared_with_the_given_settings(settings):
    def variant(seconds: float, memory: int):
        return {"rounds": [{"backward": seconds}] * 3, "seconds": seconds, "peak_bytes": memory}

    result = {
        "settings": asdict(settings),
        "machine": {"device": "a GPU", "torch": "2", "open_clip": "3"},
        "tokens": {"captions": 150, "sentences": 30},
        "useful_flops": 10**12,
        "variants": {"as given": variant(2.0, 2**30), "compile on": variant(1.5, 2**31)},
    }
    *_, given, turned = show_switches(result, "as given").splitlines()
    assert given.split() == ["as", "given", "1.000", "1.000", "2000.0", "1.00", "GiB"]
    assert turned.split() == ["compile", "on", "0.750", "(0.750", "to", "0.750)", "2.000", "1500.0", "2.00", "GiB"]


@pytest.mark.parametrize("arguments", [["--batch", "1"], ["--steps", "0"], ["--switches", "speed"]])
def test_what_cannot_be_measured_is_refused(arguments):
    with pytest.raises(SystemExit):
        main(arguments)
