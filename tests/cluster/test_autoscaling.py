"""Ray's real autoscaler on this machine: nodes come for LISM's actors and for training workers, and go after them."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_cluster import FakeCluster

from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.tars import stream_samples

pytestmark = pytest.mark.ray

WATCH = Path(__file__).with_name("watch.py")
PATIENCE_S = 300


class Timeline:
    """Which nodes there were when: lists of (id, custom resource, whether it is in use). Grows while it is watched."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def records(self) -> list[dict]:
        lines = self.path.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]  # Ray prints, too

    def counts(self, kind: str) -> list[int]:
        """The number of nodes of a kind, over time."""
        return [sum(node[1] == kind for node in record["nodes"]) for record in self.records]

    def worked(self, kind: str) -> set[str]:
        """The nodes of a kind that ever worked."""
        return {name for record in self.records for name, what, busy in record["nodes"] if what == kind and busy}

    def show(self, title: str) -> None:
        """Prints the figures."""
        print(f"\n{title}\n  seconds  nodes (working)")
        for record in self.records:
            kinds = sorted({kind for _, kind, _ in record["nodes"]})
            of = {kind: [busy for _, what, busy in record["nodes"] if what == kind] for kind in kinds}
            text = ", ".join(f"{kind} {len(busy)} ({sum(busy)})" for kind, busy in of.items())
            print(f"  {record['seconds']:7.1f}  {text or 'none'}")


@contextmanager
def watching(cluster: FakeCluster, *kinds: str) -> Iterator[Timeline]:
    """Watches the nodes while the block runs."""
    path = cluster.folder / "nodes.jsonl"
    with path.open("w") as file:
        watcher = cluster.start(WATCH, *kinds, stdout=file)
        try:
            yield Timeline(path)
        finally:
            watcher.kill()
            watcher.communicate()


def finish(driver: subprocess.Popen) -> str:
    """Waits for a driver that must succeed; returns what it printed."""
    printed, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, errors
    return printed


def test_nodes_come_for_lism_s_actors_share_the_work_and_go(tmp_path, tiny_clip):
    draw_scenes(tmp_path / "in", 96, 0, SceneSettings(size=256, shard_size=8))
    kinds = {
        "decode": {"resources": {"CPU": 1, "decode": 1}, "min": 1, "max": 1},
        "segment": {"resources": {"CPU": 1, "segment": 1}, "max": 2},
    }
    settings = ["fused=true", "proposer_actors=[2,2]", "actor_resources={segment: 1}", "images_per_batch=4"]
    with FakeCluster(tmp_path, kinds) as cluster, watching(cluster, "decode", "segment") as timeline:
        command = ["-m", "goal_ray.lism", tmp_path / "in", tmp_path / "out", f"matcher.model.name={tiny_clip}"]
        printed = finish(cluster.start(*command, *settings))
        cluster.wait_until(lambda: timeline.counts("segment")[-1] == 0, PATIENCE_S)
    timeline.show("LISM on a cluster that grows")
    assert "samples 96: paired 96, quarantined 0" in printed
    assert sum(1 for tar in (tmp_path / "out").glob("*.tar") for _ in stream_samples(str(tar))) == 96
    assert timeline.counts("segment")[0] == 0
    assert max(timeline.counts("segment")) == 2
    assert len(timeline.worked("segment")) == 2
    assert timeline.counts("decode")[-1] == 1  # its least


@pytest.mark.slow
def test_nodes_come_for_training_workers_and_go(tmp_path, tiny_clip):
    draw_scenes(tmp_path / "in", 32, 0, SceneSettings(size=64, shard_size=8, paired=True))
    kinds = {
        "ingest": {"resources": {"CPU": 1, "ingest": 1}, "max": 1},
        "train": {"resources": {"CPU": 1, "train": 1}, "max": 2},
    }
    settings = {
        "model.name": tiny_clip,
        "data.shards": tmp_path / "in",
        "workers": 2,
        "worker_resources": "{train: 1}",
        "batch_per_worker": 4,
        "max_steps": 6,
        "precision": "fp32",
        "storage_path": tmp_path / "runs",
    }
    (tmp_path / "train.yaml").write_text("model: {name: x}\ndata: {shards: x}\n")
    command = ["-m", "goal_ray.train", tmp_path / "train.yaml", *(f"{key}={value}" for key, value in settings.items())]
    with FakeCluster(tmp_path, kinds) as cluster, watching(cluster, "ingest", "train") as timeline:
        printed = finish(cluster.start(*command))
        cluster.wait_until(lambda: timeline.counts("train")[-1] == timeline.counts("ingest")[-1] == 0, PATIENCE_S)
    timeline.show("training on a cluster that starts from nothing")
    assert "trained 6 steps" in printed
    assert max(timeline.counts("train")) == 2
    assert len(timeline.worked("train")) == 2
