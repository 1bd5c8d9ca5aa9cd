"""A model to evaluate, and scenes to evaluate it on."""

from pathlib import Path

import pytest

from goal_ray.model import load_model, save_model
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.settings import ModelConfig


@pytest.fixture(scope="module")
def model(tiny_clip, tmp_path_factory) -> str:
    """An exported folder with random weights."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    loaded = load_model(ModelConfig(tiny_clip))
    save_model(folder, loaded, loaded.clip.state_dict())
    return str(folder)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """30 drawn scenes in three tars; their captions exceed the model's context."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(folder, 30, 7, SceneSettings(shard_size=10, size=40))
    return folder
