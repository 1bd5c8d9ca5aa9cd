"""A run on a cluster whose nodes come and go, with real Ray nodes on this machine."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paired_shards import write_shards

from goal_ray.config import to_yaml
from goal_ray.settings import ModelConfig
from goal_ray.train.config import DataConfig, OptimizerConfig, TrainConfig
from goal_ray.train.recorder import read_records

pytestmark = pytest.mark.ray

STEPS = 100  # enough that the run is not over before the node goes


def curve(run_dir) -> list[float]:
    return [record["loss"] for record in read_records(run_dir / "metrics.jsonl")]


def run_on(address: str, config: TrainConfig, folder) -> subprocess.Popen:
    path = folder / f"{config.name}.yaml"
    path.write_text(to_yaml(config))
    environment = {**os.environ, "RAY_ADDRESS": address, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "goal_ray.train", str(path)], env=environment, stderr=subprocess.PIPE, text=True
    )


def drain(address: str, node_id: str) -> None:
    """Tells Ray that a node will be gone in ten minutes, as the autoscaler does of a spot instance."""
    why = "--reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot --deadline-remaining-seconds 600"
    subprocess.run(
        [Path(sys.executable).with_name("ray"), "drain-node", "--address", address, "--node-id", node_id, *why.split()],
        check=True,
        capture_output=True,
    )


@pytest.mark.slow
def test_a_node_that_is_about_to_go_makes_the_run_save_and_go_on_with_fewer_workers(tmp_path, tiny_clip):
    from ray.cluster_utils import Cluster

    config = TrainConfig(
        ModelConfig(tiny_clip),
        DataConfig(str(write_shards(tmp_path / "shards"))),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        batch_per_worker=4,
        workers=(1, 2),
        max_steps=STEPS,
        epochs=100,
        precision="fp32",
        device="cpu",
        checkpoint_every=100,
        log_every=1,
        storage_path=str(tmp_path),
    )
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        leaving = cluster.add_node(num_cpus=2)
        with run_on(cluster.address, config, tmp_path) as driver:
            deadline = time.monotonic() + 300
            while not curve(tmp_path / "goal"):
                assert driver.poll() is None, driver.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            cluster.add_node(num_cpus=1)
            drain(cluster.address, leaving.node_id)
            _, said = driver.communicate(timeout=300)
        assert driver.returncode == 0, said
        assert "preempted after step" in said
        assert "with 1 worker\n" in said
        with run_on(cluster.address, TrainConfig(**{**vars(config), "name": "alone"}), tmp_path) as driver:
            _, said = driver.communicate(timeout=300)
        assert driver.returncode == 0, said
    finally:
        cluster.shutdown()
    # the same batches on another number of workers: float32 sums in another order
    assert curve(tmp_path / "goal") == pytest.approx(curve(tmp_path / "alone"), rel=1e-3)
    assert len(curve(tmp_path / "goal")) == STEPS
    assert json.loads((tmp_path / "goal" / "result.json").read_text())["ending"] == "finished"
