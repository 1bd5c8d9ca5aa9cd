"""Curves in TensorBoard and, offline, in Weights & Biases."""

import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from goal_ray.errors import ConfigError
from goal_ray.settings import ModelConfig
from goal_ray.train.config import DataConfig, TrainConfig
from goal_ray.train.loggers import open_loggers


def config(**settings) -> TrainConfig:
    return TrainConfig(ModelConfig("ViT-B-16"), DataConfig("shards"), **settings)


def test_steps_that_come_again_replace_those_before_in_tensorboard(tmp_path):
    (board,) = open_loggers(tmp_path, config())
    board.rewind(0)
    for step in (1, 2, 3):
        board.log(step, {"train/loss": 10.0 + step})
    board.rewind(1)
    board.log(2, {"train/loss": 20.0})
    board.close()
    curve = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in curve] == [(1, 11.0), (2, 20.0)]


def test_weights_and_biases_gets_the_same_numbers_over_the_same_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, online = open_loggers(tmp_path, config(wandb="goal"))
    online.rewind(0)
    online.log(1, {"train/loss": 3.5})
    online.log(2, {"train/loss": 2.5})
    online.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    # wandb's own process writes it, and on a busy machine goes on for a moment after the run's end.
    until = time.monotonic() + 60
    while not all(file.read_bytes().count(word) for word in (b"train/loss", b"3.5", b"2.5")):
        assert time.monotonic() < until, file.read_bytes()
        time.sleep(0.1)


def test_without_the_package_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'goal_ray\[wandb\]'"):
        open_loggers(tmp_path, config(wandb="goal"))
