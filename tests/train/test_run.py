"""Whole runs with Ray Train and DeepSpeed, few and each looked at closely, since each takes its time to start."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from paired_shards import write_shards
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from goal_ray.config import load_config, to_yaml
from goal_ray.errors import StageError
from goal_ray.model import ModelConfig
from goal_ray.train.config import DataConfig, OptimizerConfig, TrainConfig
from goal_ray.train.attempts import WorkerDied, own_error
from goal_ray.train.run import train

UNREADABLE = ["0-3", "1-5"]
STEPS, SAVED, KILLED = 12, 5, 7


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory, tiny_clip):
    """(config, result) of a run of 3 epochs of 4 steps on 2 workers; 2 of the 37 pictures are unreadable."""
    request.getfixturevalue("cluster")
    folder = tmp_path_factory.mktemp("train")
    config = TrainConfig(
        ModelConfig(tiny_clip),
        DataConfig(str(write_shards(folder / "shards", undecodable=UNREADABLE)), pairs_per_image=2, max_bad_share=0.1),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        batch_per_worker=4,
        workers=2,
        epochs=3,
        precision="fp32",
        device="cpu",
        checkpoint_every=SAVED,
        log_every=1,
        storage_path=str(folder / "runs"),
    )
    return config, train(config)


@pytest.fixture(scope="module")
def metrics(undisturbed):
    return read_lines(undisturbed[1].run_dir / "metrics.jsonl")


def test_a_run_logs_its_terms_rate_and_speed_at_every_step(metrics, undisturbed):
    config, result = undisturbed
    assert [record["step"] for record in metrics] == list(range(1, STEPS + 1))
    assert result.steps == STEPS
    for record in metrics:
        terms = [record[f"loss_{name}"] for name in ("global", "local", "tsl_image", "tsl_text")]
        assert record["loss"] == pytest.approx(terms[0] + 0.5 * terms[1] + terms[2] + terms[3])
        assert min(terms) > 0
        assert record["images_per_s"] > 0
        assert record["lr"] == pytest.approx(1e-3 * config.optimizer.lr_factor(record["step"] - 1, STEPS))
    assert metrics[-1]["loss"] < metrics[0]["loss"]


def test_the_run_folder_holds_the_settings_that_repeat_it(undisturbed):
    config, result = undisturbed
    assert load_config(TrainConfig, result.run_dir / "config.yaml") == config


def test_tensorboard_shows_the_same_curves(undisturbed, metrics):
    events = EventAccumulator(str(undisturbed[1].run_dir / "tensorboard")).Reload()
    assert {f"train/{name}" for name in ("loss", "loss_local", "lr", "images_per_s")} <= set(events.Tags()["scalars"])
    curve = events.Scalars("train/loss")
    assert [event.step for event in curve] == [record["step"] for record in metrics]
    assert [event.value for event in curve] == pytest.approx([record["loss"] for record in metrics])


def test_unreadable_samples_are_recorded_once(undisturbed):
    records = read_lines(undisturbed[1].run_dir / "quarantine.jsonl")
    assert sorted(record["key"] for record in records) == UNREADABLE


def test_plain_open_clip_loads_the_model_as_of_the_last_step(undisturbed):
    _, result = undisturbed
    clip = open_clip.create_model(f"local-dir:{result.model_dir}")
    last = result.run_dir / "checkpoints" / f"step-{STEPS:08d}"
    saved = load_file(last / "open_clip_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in clip.state_dict().items())


@pytest.fixture(scope="module")
def resumed(undisturbed, tmp_path_factory):
    """The run as a kill after step 7 leaves it, its last checkpoint at step 5, resumed on 1 worker instead of 2."""
    config, result = undisturbed
    config = replace(config, storage_path=str(tmp_path_factory.mktemp("killed")), workers=1, batch_per_worker=8)
    ignored = shutil.ignore_patterns("model", "result.json", "ray", "step-00000010", f"step-{STEPS:08d}")
    killed = shutil.copytree(result.run_dir, Path(config.storage_path) / config.name, ignore=ignored)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:KILLED]) + lines[KILLED][:50])
    return train(config, resume=True)


def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch_as_if_never_stopped(resumed, metrics):
    again = read_lines(resumed.run_dir / "metrics.jsonl")
    assert [record["step"] for record in again] == list(range(1, STEPS + 1))
    for name in ("loss", "loss_global", "loss_local", "loss_tsl_image", "loss_tsl_text", "lr", "epoch"):
        # the same batches on another number of workers: float32 sums in another order
        assert [record[name] for record in again] == pytest.approx([record[name] for record in metrics], rel=1e-4)


def test_a_resumed_run_quarantines_nothing_twice_and_adds_its_time(resumed, metrics):
    records = read_lines(resumed.run_dir / "quarantine.jsonl")
    assert sorted(record["key"] for record in records) == UNREADABLE
    assert resumed.seconds > metrics[SAVED - 1]["seconds"]


def test_a_killed_driver_leaves_a_run_that_goes_on(undisturbed, metrics, tmp_path):
    import ray

    config = replace(undisturbed[0], storage_path=str(tmp_path))
    path, run_dir = tmp_path / "train.yaml", tmp_path / config.name
    path.write_text(to_yaml(config))
    driver = subprocess.Popen(
        [sys.executable, "-m", "goal_ray.train", str(path)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 180
        while not (run_dir / "checkpoints" / f"step-{SAVED:08d}").exists():
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert not (run_dir / "result.json").exists()

    train(config, resume=True)
    again = read_lines(run_dir / "metrics.jsonl")
    assert [record["step"] for record in again] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in again] == pytest.approx([record["loss"] for record in metrics], rel=1e-4)
    assert sorted(record["key"] for record in read_lines(run_dir / "quarantine.jsonl")) == UNREADABLE


def test_resuming_a_finished_run_changes_nothing(undisturbed):
    config, result = undisturbed
    before = (result.run_dir / "metrics.jsonl").read_bytes()
    assert train(config, resume=True) == result
    assert (result.run_dir / "metrics.jsonl").read_bytes() == before


def test_too_many_unreadable_samples_stop_the_run_with_their_names(undisturbed, tmp_path):
    config, _ = undisturbed
    data = replace(config.data, max_bad_share=0.0)
    with pytest.raises(StageError, match=r"samples turned out unreadable.*(0-3|1-5).*ImageError") as caught:
        train(replace(config, data=data, workers=1, batch_per_worker=37, storage_path=str(tmp_path)))
    assert len(str(caught.value).splitlines()) == 1
    records = read_lines(tmp_path / config.name / "quarantine.jsonl")
    assert {record["key"] for record in records} == set(UNREADABLE)


@pytest.mark.usefixtures("cluster")
def test_the_command_shows_one_progress_line_and_where_the_model_is(tmp_path, tiny_clip):
    import ray

    shards = write_shards(tmp_path / "shards", without="pairs.json")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {{name: {tiny_clip}}}\ndata: {{shards: {shards}}}\n"
        "loss: {weight_local: 0, weight_tsl_image: 0, weight_tsl_text: 0}\n"
        "batch_per_worker: 4\naccumulate: 2\nmax_steps: 3\nlog_every: 1\nzero_stage: 2\n"
    )
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-m", "goal_ray.train", str(path), f"storage_path={tmp_path}", "name=cli"],
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    trained, cost = done.stdout.splitlines()
    assert re.fullmatch(rf"trained 3 steps in \d+ s; model: {tmp_path}/cli/model", trained)
    assert re.fullmatch(r"cost: \S+ CPU worker hours, \S+ FLOPs, \S+ images/s, peak memory \d\.\d\d GB", cost)
    assert all(line.startswith("train cli:") for line in re.split(r"[\r\n]+", done.stderr) if line)
    metrics = read_lines(tmp_path / "cli" / "metrics.jsonl")
    assert [record["epoch"] for record in metrics] == [0.25, 0.5, 0.75]  # 8 of 37 samples a step, in 2 micro-batches
    assert all(record["loss"] == record["loss_global"] > 0 for record in metrics)
    assert all(record["loss_local"] == 0 for record in metrics)


@pytest.mark.usefixtures("cluster")
def test_the_death_of_a_worker_is_told_without_a_traceback(tmp_path):
    import ray
    from ray.train import WorkerGroupError

    @ray.remote(num_cpus=0)
    class Worker:
        def train(self):
            os._exit(1)

    with pytest.raises(ray.exceptions.RayActorError) as died:
        ray.get(Worker.remote().train.remote())
    error = own_error(WorkerGroupError("a worker failed", {1: died.value}), tmp_path)
    assert isinstance(error, WorkerDied)
    assert re.fullmatch(r"a training worker died \(.+\); the memory may have run out: .*--resume.*", str(error))
