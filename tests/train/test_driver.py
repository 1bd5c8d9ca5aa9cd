"""What the driver makes of a run that goes on: more training, or evaluations alone. Ray is stood in for."""

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paired_shards import write_shards
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from goal_ray.config import to_yaml
from goal_ray.errors import StageError
from goal_ray.jsonl import append_records, read_records
from goal_ray.run_folder import HISTORY_FILE, RESULT_FILE, write_result
from goal_ray.settings import ModelConfig
from goal_ray.train.config import DataConfig, EvaluationConfig, TrainConfig
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.run import train
from goal_ray.train.scan import Scan, scan_shard

R1, MAP = "text_to_image.R@1", "text_to_image.mAP"
END = 4


class Trains(StageError):
    """Workers would start."""


class NoWorkers:
    def __init__(self, *_):
        pass

    def run(self, resume_from):
        raise Trains(f"from {resume_from and resume_from.name}")


def scan_here(urls, needs_pairs):
    indexes = [scan_shard(url, needs_pairs) for url in urls]
    return Scan([len(index) for index in indexes], [record for index in indexes for record in index.bad], ())


def evaluate_here(self, wait_s=0.0):  # noqa: ARG001
    step, self.waiting = self.waiting, None
    ranking = {"R@1": float(step), "mAP": float(step)}
    self.record(step, {"text_to_image": ranking, "image_to_text": ranking})


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    monkeypatch.setattr("goal_ray.train.run.ray_session", lambda _: nullcontext())
    monkeypatch.setattr("goal_ray.train.run.scan_shards", scan_here)
    monkeypatch.setattr("goal_ray.train.checks.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr("goal_ray.train.run.Attempts", NoWorkers)
    monkeypatch.setattr(Evaluations, "poll", evaluate_here)


@pytest.fixture
def config(tmp_path, tiny_clip):
    """A run whose last step is END."""
    shards, held_out = write_shards(tmp_path / "shards", (5, 4)), write_shards(tmp_path / "held-out", (3,))
    return TrainConfig(
        ModelConfig(tiny_clip),
        DataConfig(str(shards)),
        evaluation=EvaluationConfig(str(held_out)),
        batch_per_worker=4,
        max_steps=END,
        storage_path=str(tmp_path / "runs"),
    )


def log_record(step):
    of_a_window = {"window_steps": 1, "window_seconds": 1.0, "images": 8, "flops": 1.0, "energy_joules": None}
    terms = {f"loss_{name}": 0.5 for name in ("global", "local", "tsl_image", "tsl_text")}
    rates = {"images_per_s": 8.0, "data_wait_share": 0.0, "lr": 1e-3, "peak_memory_bytes": 1}
    return {"step": step, "total_steps": END, "loss": 2.0, **terms, **rates, **of_a_window}


def folder_of(config):
    return Path(config.storage_path) / config.name


def run_of(config, *steps, history=(), ending=""):
    """The folder of a run with checkpoints after these steps, whose weights tell the step; with a result if it ended.

    history  {metric: value} by step
    """
    run = folder_of(config)
    run.mkdir(parents=True, exist_ok=True)
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        for name in ("open_clip_model.safetensors", "optimizer.safetensors"):
            save_file({"x": torch.full((100,), float(step))}, folder / name)
        (folder / "open_clip_config.json").write_text("{}")
        (folder / "state.json").write_text(json.dumps({"step": step, "log": [log_record(step)]}))
    (run / "config.yaml").write_text(to_yaml(config))
    append_records(run / HISTORY_FILE, [{"step": step, **values} for step, values in dict(history).items()])
    if ending:
        best = max(history, key=lambda step: history[step][config.evaluation.metric], default=None)
        write_result(run, steps[-1], 10.0, ending, best)
    return run


def exported_step(result):
    return load_file(result.model_dir / "open_clip_model.safetensors")["x"][0].item()


def test_a_run_that_was_interrupted_in_its_last_evaluations_goes_on_with_these(config):
    run = run_of(config, 2, END, history={2: {R1: 1.0}})
    result = train(config, resume=True)
    assert (result.steps, result.best_step, exported_step(result)) == (END, END, END)
    assert [record["step"] for record in read_records(run / HISTORY_FILE)] == [2, END]
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in curves.Scalars(f"evaluation/{R1}")] == [(END, END)]
    # a driver that was killed had not written it
    assert [record["step"] for record in read_records(run / "metrics.jsonl")] == [END]


@pytest.fixture
def early(config):
    """(config, folder) of a run that ended early, out of patience."""
    config = replace(config, max_steps=20, evaluation=replace(config.evaluation, patience=1))
    return config, run_of(config, 2, 4, history={2: {R1: 30.0}, 4: {R1: 10.0}}, ending="early")


def test_a_run_that_ended_early_trains_on_with_more_patience(early):
    config, run = early
    patient = replace(config, evaluation=replace(config.evaluation, patience=2))
    with pytest.raises(Trains, match="step-00000004"):
        train(patient, resume=True)
    assert not (run / RESULT_FILE).exists()
    with pytest.raises(Trains, match="step-00000004"):  # a kill left it so
        train(patient, resume=True)


def test_a_run_that_ended_early_stays_so_with_the_same_patience(early):
    config, run = early
    result = train(replace(config, log_every=7), resume=True)
    assert (result.steps, result.best_step, exported_step(result)) == (4, 2, 2)
    assert json.loads((run / RESULT_FILE).read_text())["ending"] == "early"


def test_another_metric_has_another_best_checkpoint(config):
    history = {2: {R1: 30.0, MAP: 1.0}, END: {R1: 10.0, MAP: 2.0}}
    run_of(config, 2, END, history=history, ending="finished")
    assert exported_step(train(config, resume=True)) == 2
    result = train(replace(config, evaluation=replace(config.evaluation, metric=MAP)), resume=True)
    assert (result.best_step, exported_step(result)) == (END, END)


def test_a_damaged_best_checkpoint_is_not_exported_and_without_it_the_best_of_the_others_is(config):
    run = run_of(config, 2, 3, END, history={2: {R1: 30.0}, 3: {R1: 20.0}, END: {R1: 10.0}}, ending="finished")
    weights = run / "checkpoints" / "step-00000002" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(StageError, match=r"step-00000002 is damaged \(open_clip_model.*delete it.*--resume"):
        train(config, resume=True)
    assert not (run / "model").exists()
    shutil.rmtree(weights.parent)
    result = train(config, resume=True)
    assert (result.best_step, exported_step(result)) == (3, 3)


def test_a_finished_run_without_checkpoints_starts_its_training_anew(config):
    run = run_of(config, END, history={END: {R1: 10.0}}, ending="finished")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(Trains, match="from None"):
        train(config, resume=True)


def test_a_micro_batch_of_one_sample_is_warned_of(config, capsys):
    config = replace(config, batch_per_worker=1, workers=2)
    with pytest.raises(Trains):
        train(config)
    assert "batch_per_worker is 1: an unreadable sample leaves a micro-batch empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stored", "remedy"), [(False, "mend it, then start it again"), (True, "mend it, then go on with --resume")]
)
def test_an_error_of_the_storage_names_resume_only_where_there_is_a_run(config, monkeypatch, stored, remedy):
    def fail(config, *_):
        if stored:
            run_of(config)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("goal_ray.train.run.train_on_cluster", fail)
    with pytest.raises(StageError, match=remedy):
        train(config)


def test_held_out_shards_without_pairs_are_refused_before_the_training(config, tmp_path):
    unpaired = str(write_shards(tmp_path / "unpaired", (3,), without="pairs.json"))
    wanted = replace(config, evaluation=EvaluationConfig(unpaired, pairs=1))
    message = r"evaluation\.shards: none of the 3 samples of .*train-0\.tar.*evaluation\.pairs=0.*goal-ray lism"
    with pytest.raises(StageError, match=message):
        train(wanted)
    assert not folder_of(config).exists()
    with pytest.raises(Trains):
        train(replace(wanted, evaluation=EvaluationConfig(unpaired)))
