"""Log windows on one rank: means, speed, and losses that are not finite."""

from types import SimpleNamespace

import pytest
import torch
from goal_batches import load, random_batch

from goal_ray.errors import StageError
from goal_ray.goal_batch import count_batch
from goal_ray.train import loop
from goal_ray.train.feed import MicroBatch
from goal_ray.train.window import LogWindow

WEIGHTS = (1.0, 0.5, 2.0, 0.0)


@pytest.fixture
def micro_batch(tiny_clip):
    batch = random_batch(load(tiny_clip).tokenizer, seed=1)
    return MicroBatch([batch], count_batch(batch)[None], [8, 8], None)


def test_a_record_holds_the_means_of_its_window_alone(micro_batch, monkeypatch):
    window = LogWindow(torch.device("cpu"))
    window.add(0, torch.tensor([9.0, 9.0, 9.0, 9.0]), micro_batch, flops=5)
    window.close({"step": 1}, WEIGHTS, None)
    window.arrived(wait=True)
    monkeypatch.setattr(window.wait, "seconds", lambda: 1e-5)
    window.add(1, torch.tensor([1.0, 2.0, 3.0, 4.0]), micro_batch, flops=10)
    window.add(1, torch.tensor([3.0, 4.0, 5.0, 6.0]), micro_batch, flops=20)
    window.add(2, torch.tensor([2.0, 3.0, 4.0, 5.0]), micro_batch, flops=30)
    window.close({"step": 3}, WEIGHTS, torch.tensor([0.25]))
    record = window.arrived(wait=True)
    assert record["step"] == 3
    assert [record[f"loss_{name}"] for name in ("global", "local", "tsl_image", "tsl_text")] == [2, 3, 4, 5]
    assert record["loss"] == 2 + 0.5 * 3 + 2 * 4
    assert record["grad_norm"] == 0.25
    assert (record["images"], record["flops"], record["window_steps"]) == (12, 60, 2)
    assert record["images_per_s"] == pytest.approx(12 / record["window_seconds"])
    assert record["peak_memory_bytes"] > 1e6
    assert record["data_wait_share"] == pytest.approx(min(1, 1e-5 / record["window_seconds"]))
    assert record["energy_joules"] is record["nonfinite_step"] is None
    assert window.arrived(wait=True) is None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_step_with_a_loss_that_is_not_finite_is_named(micro_batch, value):
    window = LogWindow(torch.device("cpu"))
    for step in range(6):
        broken = torch.tensor([1.0, value, 1.0, 1.0])
        window.add(step, broken if step in (3, 5) else torch.ones(4), micro_batch, flops=1)
    window.close({"step": 6}, WEIGHTS, 1.0)
    assert window.arrived(wait=True)["nonfinite_step"] == 3


def test_a_rank_ends_at_a_record_whose_loss_was_not_finite(tmp_path, monkeypatch):
    sent: list[dict] = []

    def write_offenders(*_):
        assert sent == [{"nonfinite": 4}]  # this takes a while, in which another rank may end all
        return tmp_path / "nonfinite.json"

    monkeypatch.setattr(loop, "write_offenders", write_offenders)
    job = SimpleNamespace(send=sent.append)
    loop.check_finite(job, {"step": 1, "nonfinite_step": None})
    assert sent == []
    with pytest.raises(StageError, match=r"the loss of step 4, .*nonfinite\.json"):
        loop.check_finite(job, {"step": 8, "nonfinite_step": 3})
    assert sent[-1] == {"nonfinite": 4}
