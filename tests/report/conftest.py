"""Fixtures of a report: drawn scenes paired with their truth, and run folders as training leaves them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from report_inputs import log_record, write_paired

from goal_ray.config import load_config, to_yaml
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.train.config import TrainConfig


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars of three scenes each, without pairs."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(str(folder), count=6, seed=5, settings=SceneSettings(shard_size=3, size=96))
    return folder


@pytest.fixture(scope="session")
def paired(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same scenes with pairs."""
    folder = tmp_path_factory.mktemp("paired")
    for tar in scenes.glob("*.tar"):
        write_paired(str(tar), folder / tar.name)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, paired: Path) -> Callable[..., Path]:
    """Makes a run folder: make_run(name, settings, records)."""

    def make(name: str = "goal", settings: tuple[str, ...] = (), records: list[dict] | None = None) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        defaults = ("model.name=ViT-B-16", f"data.shards={paired}", f"name={name}", f"storage_path={tmp_path}")
        config = load_config(TrainConfig, overrides=(*defaults, *settings))
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        lines = [log_record(step) for step in range(10, 41, 10)] if records is None else records
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
