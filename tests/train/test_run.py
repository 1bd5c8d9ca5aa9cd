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
import psutil
import pytest
import torch
from paired_shards import write_shards
from processes import workers_below
from safetensors.torch import load_file
from scraping import scraped
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from goal_ray.config import load_config, to_yaml
from goal_ray.errors import StageError
from goal_ray.jsonl import read_records
from goal_ray.settings import ModelConfig
from goal_ray.train.config import DataConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from goal_ray.train.failures import WorkerDied, own_error
from goal_ray.train.run import train

pytestmark = pytest.mark.ray

UNREADABLE = ["0-3", "1-5"]
STEPS, SAVED, LOGGED = 24, 5, 3


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory, tiny_clip):
    """(config, result) of a run of 6 epochs of 4 steps on 2 workers; 2 of the 37 pictures are unreadable."""
    request.getfixturevalue("cluster")
    folder = tmp_path_factory.mktemp("train")
    config = TrainConfig(
        ModelConfig(tiny_clip),
        DataConfig(str(write_shards(folder / "shards", undecodable=UNREADABLE)), pairs_per_image=2, max_bad_share=0.1),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=3),
        batch_per_worker=4,
        workers=2,
        epochs=6,
        precision="fp32",
        device="cpu",
        checkpoint_every=SAVED,
        keep_checkpoints=9,
        log_every=1,
        storage_path=str(folder / "runs"),
    )
    return config, train(config, resume=None)  # there is none: it starts


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


def test_the_metrics_of_a_run_can_be_scraped_from_the_node(undisturbed):
    prefix, run_dir = "ray_goal_ray_train_", str(undisturbed[1].run_dir)
    images = json.loads((undisturbed[1].run_dir / "cost.json").read_text())["images"]
    found = scraped("run", run_dir, (), until=lambda found: found.get((f"{prefix}images_total",)) == images)
    assert found[f"{prefix}quarantined_total",] == len(UNREADABLE)
    assert found[f"{prefix}images_total",] == images


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
    """The run as a kill after step 7 leaves it, its last checkpoint at step 5, resumed on 1 worker instead of 2.

    The driver had written no more than three lines of the log.
    """
    config, result = undisturbed
    config = replace(config, storage_path=str(tmp_path_factory.mktemp("killed")), workers=1, batch_per_worker=8)
    ignored = shutil.ignore_patterns(
        "model", "result.json", "ray", "step-00000010", "step-00000015", "step-00000020", f"step-{STEPS:08d}"
    )
    killed = shutil.copytree(result.run_dir, Path(config.storage_path) / config.name, ignore=ignored)
    lines = (result.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (killed / "metrics.jsonl").write_text("".join(lines[:LOGGED]) + lines[LOGGED][:50])
    return train(config, resume=None)  # there is one: it goes on


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


def start_driver(config, folder) -> subprocess.Popen:
    """`python -m goal_ray.train` on the session's cluster."""
    import ray

    path = folder / "train.yaml"
    path.write_text(to_yaml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "goal_ray.train", str(path)],
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, driver) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert driver.poll() is None, driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def logged(run_dir) -> int:
    """The last step that a run has logged."""
    records = read_records(run_dir / "metrics.jsonl")
    return records[-1]["step"] if records else 0


def train_workers() -> list[psutil.Process]:
    """Ray Train's workers in this session's cluster, whose node is a child of this process."""
    return workers_below(psutil.Process(), "RayTrainWorker")


def assert_same_curve(run_dir, metrics) -> None:
    """Every step once, with the very numbers of the undisturbed run: the same samples, on the same workers."""
    again = read_lines(run_dir / "metrics.jsonl")
    assert [record["step"] for record in again] == list(range(1, STEPS + 1))
    for name in ("loss", "loss_global", "loss_local", "loss_tsl_image", "loss_tsl_text", "grad_norm", "lr", "epoch"):
        assert [record[name] for record in again] == [record[name] for record in metrics], name
    assert sorted(record["key"] for record in read_lines(run_dir / "quarantine.jsonl")) == UNREADABLE


def test_a_run_goes_on_by_itself_when_a_worker_is_killed_and_later_when_the_driver_is(undisturbed, metrics, tmp_path):
    config = replace(undisturbed[0], storage_path=str(tmp_path))
    run_dir = tmp_path / config.name
    with start_driver(config, tmp_path) as driver:
        wait_for(lambda: logged(run_dir) > SAVED, driver)
        sockets = [each for worker in train_workers() for each in worker.net_connections("inet")]
        assert {each.laddr.ip.removeprefix("::ffff:") for each in sockets} == {"127.0.0.1"}
        killed = train_workers()
        killed[0].kill()
        wait_for(lambda: {worker.pid for worker in train_workers()} - {worker.pid for worker in killed}, driver)
        wait_for(lambda: (run_dir / "checkpoints" / f"step-{2 * SAVED:08d}").exists(), driver)
        driver.kill()
        said = driver.stderr.read()
    assert driver.returncode == -signal.SIGKILL
    assert "restart 1 of 3" in said
    assert not (run_dir / "result.json").exists()
    result = train(config, resume=True)
    assert_same_curve(run_dir, metrics)
    assert result.steps == STEPS
    cost = json.loads((run_dir / "cost.json").read_text())
    assert cost["steps"] > STEPS  # what was done twice was paid for twice


@pytest.mark.slow
def test_a_signalled_run_saves_ends_and_goes_on_past_a_damaged_checkpoint(undisturbed, metrics, tmp_path, capsys):
    config = replace(undisturbed[0], storage_path=str(tmp_path), checkpoint_every=100)
    run_dir = tmp_path / config.name
    with start_driver(replace(config, checkpoint_every=2), tmp_path) as driver:
        wait_for(lambda: logged(run_dir) >= 3, driver)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=120)
    assert driver.returncode == 2
    step = int(re.search(r"interrupted after step (\d+) of 24, which is saved; go on with --resume", said)[1])
    assert 3 <= step < STEPS
    newest = run_dir / "checkpoints" / f"step-{step:08d}" / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    train(config, resume=True)
    assert f"step-{step:08d} is damaged (optimizer.safetensors is not what was written)" in capsys.readouterr().err
    assert_same_curve(run_dir, metrics)


@pytest.mark.slow
def test_the_best_checkpoint_is_exported_and_a_run_that_no_longer_gets_better_ends(undisturbed, tmp_path):
    config, _ = undisturbed
    held_out = str(write_shards(tmp_path / "held-out", (9,)))
    config = replace(
        config,
        optimizer=OptimizerConfig(lr=1e-9, warmup_steps=0),
        evaluation=EvaluationConfig(held_out, pairs=1, metric="joint.text_to_image.mAP", patience=1),
        storage_path=str(tmp_path),
        keep_checkpoints=1,
        checkpoint_every=2,
        epochs=500,
    )
    ended = train(config)
    assert 4 <= ended.steps < 2000
    history = read_lines(ended.run_dir / "evaluations.jsonl")
    assert [record["step"] for record in history] == sorted({record["step"] for record in history})
    # Nothing moves at this learning rate, so the first is the best, and it stays beside the newest.
    assert ended.best_step == history[0]["step"] == 2
    kept = sorted(path.name for path in (ended.run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000002", f"step-{ended.steps:08d}"]
    assert (ended.model_dir / "open_clip_model.safetensors").read_bytes() == (
        ended.run_dir / "checkpoints" / "step-00000002" / "open_clip_model.safetensors"
    ).read_bytes()
    events = EventAccumulator(str(ended.run_dir / "tensorboard")).Reload()
    assert "evaluation/joint.text_to_image.mAP" in events.Tags()["scalars"]
    assert train(config, resume=True) == ended


def test_a_loss_that_is_not_finite_ends_the_run_with_the_samples_named(undisturbed, tmp_path):
    config, _ = undisturbed
    config = replace(
        config, optimizer=OptimizerConfig(lr=1e30, warmup_steps=0, clip_norm=0), storage_path=str(tmp_path)
    )
    with pytest.raises(
        StageError, match=r"the loss of step \d+, or its gradient, is not finite.*nonfinite-step-.*lower optimizer.lr"
    ):
        train(config)  # of two workers: DeepSpeed shards the optimizer, and leaves out such an update without a word
    (place,) = (tmp_path / config.name).glob("nonfinite-step-*.json")
    steps = json.loads(place.read_text())
    assert list(steps) == [str(int(place.stem[-8:]) - 1), str(int(place.stem[-8:]))]
    for samples in steps.values():
        assert len({sample["key"] for sample in samples}) == len(samples) == 8
    assert not list((tmp_path / config.name).glob("checkpoints/step-*"))


def test_resuming_a_finished_run_changes_nothing_and_needs_no_ray(undisturbed, monkeypatch):
    config, result = undisturbed
    monkeypatch.setattr("goal_ray.train.run.ray_session", None)
    before = (result.run_dir / "metrics.jsonl").read_bytes()
    assert train(config, resume=True) == result
    assert (result.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_too_many_unreadable_samples_stop_the_run_with_their_names_until_they_are_mended(undisturbed, tmp_path):
    config, _ = undisturbed
    shards = write_shards(tmp_path / "shards", undecodable=UNREADABLE)
    data = replace(config.data, shards=str(shards), max_bad_share=0.0)
    config = replace(config, data=data, workers=1, batch_per_worker=37, storage_path=str(tmp_path))
    with pytest.raises(StageError, match=r"samples turned out unreadable.*(0-3|1-5).*not a JPEG") as caught:
        train(config)
    assert len(str(caught.value).splitlines()) == 1
    write_shards(shards)
    assert train(config, resume=True).steps == config.epochs
    records = read_lines(tmp_path / config.name / "quarantine.jsonl")
    assert sorted(record["key"] for record in records) == UNREADABLE


@pytest.mark.slow
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


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError, torch.distributed.DistBackendError])
def test_an_error_of_a_gpu_or_a_collective_is_one_that_workers_start_again_after(tmp_path, kind):
    from ray.train import WorkerGroupError

    cause = kind("it stopped")
    assert own_error(WorkerGroupError("a worker failed", {0: cause}), tmp_path) is cause
    assert isinstance(cause, RuntimeError)  # which `Attempts` takes for a reason to start again
