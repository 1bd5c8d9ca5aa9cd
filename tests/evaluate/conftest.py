"""A model to evaluate, and scenes to evaluate it on."""

import shutil
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


@pytest.fixture
def run(model, tmp_path) -> Path:
    """A run folder with two checkpoints and the leftovers of a third."""
    folder = tmp_path / "run"
    for name, state in (("step-00000002", "state.json"), ("step-00000010", "state.json"), (".step-00000020.tmp", "x")):
        shutil.copytree(model, folder / "checkpoints" / name)
        (folder / "checkpoints" / name / state).write_text('{"step": 1}')
    return folder
