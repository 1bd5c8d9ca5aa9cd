"""A run on a cluster whose nodes come and go, with real Ray nodes on this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from metadata_server import MetadataServer
from paired_shards import write_shards

from goal_ray.config import to_yaml
from goal_ray.jsonl import read_records
from goal_ray.settings import ModelConfig
from goal_ray.train.config import DataConfig, OptimizerConfig, TrainConfig

pytestmark = pytest.mark.ray

STEPS = 100  # enough that the run is not over before the node goes
PATIENCE_S = 300


def settings(tmp_path, tiny_clip, **more) -> TrainConfig:
    """One or two workers that share micro-batches of eight."""
    return TrainConfig(
        ModelConfig(tiny_clip),
        DataConfig(str(write_shards(tmp_path / "shards"))),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        batch_per_worker=4,
        workers=(1, 2),
        precision="fp32",
        device="cpu",
        log_every=1,
        storage_path=str(tmp_path),
        **more,
    )


class Run:
    """A run of `python -m goal_ray.train` on a cluster; a context manager that ends what still runs."""

    def __init__(self, address: str, config: TrainConfig, folder: Path):
        self.folder = folder / config.name
        path, self.output = folder / f"{config.name}.yaml", folder / f"{config.name}.txt"
        path.write_text(to_yaml(config))
        environment = {**os.environ, "RAY_ADDRESS": address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
        with self.output.open("w") as file:
            command = [sys.executable, "-m", "goal_ray.train", str(path)]
            self.driver = subprocess.Popen(command, env=environment, stderr=file)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.driver.kill()
        self.driver.wait()

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in read_records(self.folder / "metrics.jsonl")]

    @property
    def losses(self) -> list[float]:
        return [record["loss"] for record in read_records(self.folder / "metrics.jsonl")]

    def wait(self, happened) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not happened(self):
            assert self.driver.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def finish(self, status: int = 0) -> None:
        assert self.driver.wait(PATIENCE_S) == status, self.said


@pytest.fixture
def cluster():
    """A head with one CPU, to which nodes are added."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_a_node_that_is_about_to_go_makes_the_run_save_and_go_on_with_fewer_workers(cluster, tmp_path, tiny_clip):
    config = settings(tmp_path, tiny_clip, max_steps=STEPS, epochs=100, checkpoint_every=100)
    leaving = cluster.add_node(num_cpus=2)
    watching = [sys.executable, "-m", "goal_ray.spot", "aws", "--address", cluster.address]
    with MetadataServer() as machine, Run(cluster.address, config, tmp_path) as run:
        watch = subprocess.Popen([*watching, "--node-id", leaving.node_id, "--server", machine.url])
        run.wait(lambda run: run.steps)
        cluster.add_node(num_cpus=1)
        machine.give_notice(600)
        assert watch.wait(60) == 0
        run.finish()
        assert "preempted after step" in run.said
        assert "going on with 1 worker\n" in run.said
    with Run(cluster.address, TrainConfig(**{**vars(config), "name": "alone"}), tmp_path) as alone:
        alone.finish()
    # the same batches on another number of workers: float32 sums in another order
    assert run.losses == pytest.approx(alone.losses, rel=1e-3)
    assert run.steps == list(range(1, STEPS + 1))
    assert json.loads((run.folder / "result.json").read_text())["ending"] == "finished"


@pytest.mark.slow
def test_a_run_goes_on_without_a_node_that_died_and_takes_one_that_comes(cluster, tmp_path, tiny_clip):
    config = settings(tmp_path, tiny_clip, epochs=100_000, checkpoint_every=5, worker_resources={"train": 1.0})
    node = {"num_cpus": 1, "resources": {"train": 1}}  # the ingest has the head's CPU
    nodes = [cluster.add_node(**node), cluster.add_node(**node)]
    with Run(cluster.address, config, tmp_path) as run:
        run.wait(lambda run: len(run.steps) > 10)
        cluster.remove_node(nodes[1], allow_graceful=False)
        run.wait(lambda run: "going on with 1 worker\n" in run.said)
        reached = len(run.steps)
        run.wait(lambda run: len(run.steps) > reached + 10)
        cluster.add_node(**node)
        run.wait(lambda run: "going on with 2 workers\n" in run.said)
        assert "resized after step" in run.said
        reached = len(run.steps)
        run.wait(lambda run: len(run.steps) > reached + 10)
        run.driver.terminate()
        run.finish(status=2)
        assert "interrupted after step" in run.said
    assert run.steps == list(range(1, len(run.steps) + 1))
