"""Runs that cannot start or go on are refused with the cause and the remedy, and leave no trace."""

import json
import os
import shutil
import signal
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from paired_shards import write_shards
from safetensors.torch import save_file

from goal_ray.config import load_config, to_yaml
from goal_ray.errors import ConfigError, GoalRayError, ModelError, ShardError, StageError
from goal_ray.run_folder import HISTORY_FILE
from goal_ray.settings import LossConfig, ModelConfig, StepConfig
from goal_ray.train.checks import check_backend, check_evaluation, check_run
from goal_ray.train.config import DataConfig, EvaluationConfig, OptimizerConfig, TrainConfig
from goal_ray.train.driver_lock import driver_lock
from goal_ray.train.loop import Job, read_batches, train_worker
from goal_ray.train.run import interruption, train


@pytest.fixture
def config(tmp_path, tiny_clip):
    write_shards(tmp_path / "shards", (5, 4))
    data = DataConfig(str(tmp_path / "shards"))
    return TrainConfig(ModelConfig(tiny_clip), data, batch_per_worker=4, storage_path=str(tmp_path / "runs"))


@pytest.fixture
def started(config, tmp_path):
    """The folder of a run of `config` that made one checkpoint, as far as a resume looks before Ray starts."""
    run = tmp_path / "runs" / "goal"
    checkpoint = run / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(config))
    for name in ("open_clip_model.safetensors", "optimizer.safetensors"):
        save_file({"x": torch.zeros(100)}, checkpoint / name)
    (checkpoint / "open_clip_config.json").write_text("{}")
    (checkpoint / "state.json").write_text('{"step": 2}')
    return run


def test_missing_shards_are_refused(config, tmp_path):
    with pytest.raises(ShardError, match="no such file or folder"):
        train(replace(config, data=DataConfig(str(tmp_path / "nowhere"))))


def test_an_empty_folder_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match=r"holds no \.tar"):
        train(replace(config, data=DataConfig(str(tmp_path / "empty"))))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optimizer.lrr=1", r"command line: optimizer.lrr: unknown key \(did you mean lr\?\); allowed here: lr"),
        ("workers=two", "workers"),
        ("batch_per_worker=0", "batch_per_worker must be at least 1"),
        ("zero_stage=4", "zero_stage"),
        ("seed=-1", "seed must not be negative"),
        ("optimizer.betas=[1.0,0.98]", r"betas must be in \[0, 1\)"),
        ("optimizer.eps=-1", "eps must be a positive number"),
        ("optimizer.eps=0", "eps must be a positive number"),
        ("optimizer.weight_decay=.nan", "weight_decay must be a number"),
        ("optimizer.clip_norm=.inf", "clip_norm must be a number"),
        ("name=a/b", "name is one folder name"),
        ("storage_path=s3://bucket/runs", "mounted folder"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(tmp_path, setting, message):
    path = tmp_path / "train.yaml"
    path.write_text("model: {name: ViT-B-16}\ndata: {shards: paired}\n")
    with pytest.raises(ConfigError, match=message):
        load_config(TrainConfig, path, [setting])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig("ViT-B-61"), r"model.name: 'ViT-B-61' is no folder.*did you mean ViT-B-16"),
        (ModelConfig("nowhere.json"), "model.name: nowhere.json: no such model config file"),
        (ModelConfig("ViT-B-16", "openia"), r"model.weights: 'openia' is no file here and no tag.*openai"),
    ],
)
def test_a_model_that_is_nowhere_is_refused_before_ray_starts(config, tmp_path, monkeypatch, model, message):
    monkeypatch.setattr("goal_ray.train.run.ray_session", None)
    with pytest.raises(ModelError, match=message):
        train(replace(config, model=model))
    assert not (tmp_path / "runs").exists()


def test_a_run_with_a_checkpoint_needs_its_first_weights_no_more(config, started, monkeypatch):
    config = replace(config, model=ModelConfig("gone.json"))
    (started / "config.yaml").write_text(to_yaml(config))
    monkeypatch.setattr("goal_ray.train.run.ray_session", None)
    with pytest.raises(TypeError, match="NoneType"):  # as far as Ray's session, which is none here
        train(config, resume=True)


def test_a_place_where_no_run_folder_can_be_made_is_refused_by_its_key(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"storage_path: .*file/runs/goal cannot be made"):
        train(replace(config, storage_path=str(tmp_path / "file" / "runs")))


def test_a_run_that_saved_nothing_may_go_on_with_other_settings(config, started):
    shutil.rmtree(started / "checkpoints")
    check_run(started, replace(config, seed=7), resume=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": OptimizerConfig(lr=1e-7)},
        {"chunk": 2},
        {"batch_per_worker": 2, "accumulate": 2},
        {"step": StepConfig(checkpoint_activations=True), "zero_stage": 2, "offload": "optimizer"},
        {"data": {"max_bad_share": 0.5}},
        {"evaluation": {"metric": "image_to_text.mAP"}},
    ],
)
def test_what_errors_name_as_remedies_may_change_when_a_run_goes_on(config, started, changes):
    sections = {
        key: replace(getattr(config, key), **value) for key, value in changes.items() if isinstance(value, dict)
    }
    check_run(started, replace(config, **(changes | sections)), resume=True)


def test_held_out_shards_and_pairs_may_change_until_something_is_evaluated(config, started):
    wanted = replace(config, evaluation=EvaluationConfig(config.data.shards, pairs=1))
    check_run(started, wanted, resume=True)
    (started / HISTORY_FILE).write_text('{"step": 2, "text_to_image.R@1": 1.0}\n')
    with pytest.raises(StageError, match=r"evaluation\.pairs=1, it was 0; evaluation\.shards=.*, it was None"):
        check_run(started, wanted, resume=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_for_a_checkpoint_and_a_second_ends(number):
    said = []
    before = signal.signal(number, lambda *_: said.append("ended"))
    try:
        with interruption(said.append) as interrupted:
            signal.raise_signal(number)
            assert interrupted.is_set()
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert said == ["saving a checkpoint, to go on from with --resume; a second signal ends at once", "ended"]


@pytest.mark.usefixtures("started")
def test_a_run_is_not_started_twice(config):
    with pytest.raises(StageError, match="already holds a run; add --resume"):
        train(config)


def test_resuming_where_no_run_is_gets_refused(config, tmp_path):
    with pytest.raises(StageError, match="holds no run to go on with; leave out --resume"):
        train(config, resume=True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 7}, "seed=7, it was 0"),
        ({"loss": LossConfig(weight_local=2.0)}, "loss.weight_local=2.0, it was 0.5"),
        ({"batch_per_worker": 8}, "a global batch of 8, it was 4"),
    ],
)
@pytest.mark.usefixtures("started")
def test_resuming_with_other_settings_names_them(config, changes, message):
    with pytest.raises(StageError, match=message):
        train(replace(config, **changes), resume=True)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "optimizer.safetensors", "open_clip_config.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_run_whose_only_checkpoint_is_torn_is_refused_by_its_name(config, started, name, damage, capsys):
    file = started / "checkpoints" / "step-00000002" / name
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    with pytest.raises(StageError, match=r"every checkpoint is damaged; delete .*checkpoints to start anew"):
        train(config, resume=True)
    assert "step-00000002 is damaged" in capsys.readouterr().err


@pytest.mark.usefixtures("cluster")
def test_resuming_on_other_data_is_refused(config, started):
    (started / "shards.json").write_text(json.dumps({"train-0.tar": 5, "train-1.tar": 400}))
    with pytest.raises(StageError, match=r"the shards are not those .* train-1\.tar differ"):
        train(config, resume=True)


@pytest.mark.usefixtures("cluster")
def test_resuming_on_the_same_data_in_another_order_is_refused(config, started):
    (started / "shards.json").write_text(json.dumps({"train-1.tar": 4, "train-0.tar": 5}))
    with pytest.raises(StageError, match=r"the shards are not those .*: their order differs"):
        train(config, resume=True)


def test_workers_get_no_path_that_starts_from_where_the_user_stands(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = os.path.relpath(config.data.shards, tmp_path)
    (tmp_path / "vit.pt").write_bytes(b"")

    def look(config, urls, *_):
        assert config.model.weights == str(tmp_path / "vit.pt")
        assert config.data.shards == config.evaluation.shards == os.path.abspath(f"{folder}/*.tar")
        assert all(url.startswith("/") for url in urls)
        raise StageError("seen")

    monkeypatch.setattr("goal_ray.train.run.train_on_cluster", look)
    monkeypatch.setattr("goal_ray.train.run.ray_session", lambda _: nullcontext())
    wanted = replace(
        config,
        model=replace(config.model, weights="vit.pt"),
        data=replace(config.data, shards=f"{folder}/*.tar"),
        evaluation=EvaluationConfig(f"{folder}/*.tar"),
    )
    with pytest.raises(StageError, match="seen"):
        train(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_per_worker": 40}, "hold 9 usable samples, less than a global batch of 40; lower the batch"),
        ({"workers": 9, "batch_per_worker": 1, "device": "cpu"}, "9 workers and the ingest need 10 CPUs"),
        ({"device": "cuda", "workers": 2, "batch_per_worker": 2}, "2 workers need 2 GPUs, the cluster has 0"),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_what_the_data_or_the_cluster_cannot_carry_is_refused(config, tmp_path, changes, message):
    with pytest.raises(StageError, match=message):
        train(replace(config, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("cluster")
def test_an_evaluation_that_no_node_has_room_for_is_refused_before_the_training(config, tmp_path):
    with pytest.raises(StageError, match="an evaluation needs 1 CPUs and 3 GPUs, and there are"):
        train(replace(config, evaluation=EvaluationConfig(config.data.shards, gpus=3)))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("workers", [2, (1, 2)])
def test_an_evaluation_may_not_count_on_the_gpus_that_the_workers_take(config, monkeypatch, workers):
    monkeypatch.setattr("goal_ray.train.checks.cluster_resources", lambda: {"CPU": 8.0, "GPU": 2.0})
    wanted = replace(config, evaluation=EvaluationConfig(config.data.shards, gpus=1), batch_per_worker=2)
    check_evaluation(replace(wanted, workers=1), True, print)
    check_evaluation(replace(wanted, workers=workers), False, print)
    with pytest.raises(StageError, match=r"needs 1 CPUs and 1 GPUs, and there are 8 and, beside the workers', 0"):
        check_evaluation(replace(wanted, workers=workers), True, print)


@pytest.mark.parametrize(
    ("nodes", "told"), [([], True), ([{"CPU": 8}, {"CPU": 64, "GPU": 1}], True), ([{"CPU": 16}], False)]
)
def test_on_a_cluster_that_may_grow_an_evaluation_that_no_node_holds_is_told(config, monkeypatch, nodes, told):
    monkeypatch.setattr("goal_ray.train.checks.is_joined", lambda: True)
    monkeypatch.setattr("goal_ray.train.checks.node_resources", lambda: nodes)
    said = []
    wanted = EvaluationConfig(config.data.shards, cpus=16, gpus=2 if len(nodes) == 2 else 0)
    check_evaluation(replace(config, evaluation=wanted), True, said.append)
    assert bool(said) == told
    for text in said:
        assert "wait for the cluster to grow" in text
        assert "lower evaluation.cpus or evaluation.gpus" in text


@pytest.mark.parametrize(
    ("workers", "evaluated", "cpus"),
    [((1, 16), False, 2), ((1, 16), True, 3), ((4, 16), False, 4), (8, False, 8), (1, True, 2)],
)
def test_an_elastic_run_alone_on_a_machine_takes_no_more_workers_than_it_has_cores(
    config, monkeypatch, workers, evaluated, cpus
):
    asked = []

    def session(busy_cpus):
        asked.append(busy_cpus)
        raise StageError("seen")

    monkeypatch.setattr("goal_ray.train.run.usable_cores", lambda: 2)
    monkeypatch.setattr("goal_ray.train.run.ray_session", session)
    evaluation = EvaluationConfig(config.data.shards if evaluated else None)
    with pytest.raises(StageError, match="seen"):
        train(replace(config, workers=workers, evaluation=evaluation))
    assert asked == [cpus]


def test_a_run_that_is_at_work_is_not_gone_on_with_beside_it(config, started, monkeypatch):
    monkeypatch.setattr("goal_ray.train.run.ray_session", None)
    written = started / "checkpoints" / ".step-00000004.tmp"
    written.mkdir()
    with driver_lock(started, print), pytest.raises(StageError, match=r"in use by another driver .*--resume"):
        train(config, resume=True)
    assert written.exists()
    with pytest.raises(TypeError, match="NoneType"):  # as far as Ray's session, which is none here
        train(config, resume=True)
    assert not written.exists()


def test_a_tsl_backend_that_the_workers_cannot_run_is_refused_before_any_work(config, monkeypatch):
    monkeypatch.setattr("kernels.tsl.op.IS_INTERPRETED", False)
    wanted = replace(config, loss=LossConfig(tsl_backend="triton"))
    with pytest.raises(ConfigError, match=r"loss\.tsl_backend: .*needs a GPU, not cpu; choose auto or eager"):
        check_backend(wanted, use_gpu=False)
    check_backend(wanted, use_gpu=True)
    check_backend(config, use_gpu=False)


@pytest.mark.usefixtures("cluster")
def test_unpaired_shards_are_refused_for_a_goal_loss_and_leave_no_run(config, tmp_path):
    write_shards(tmp_path / "unpaired", without="pairs.json")
    with pytest.raises(GoalRayError, match=r"37 of 37 samples are unusable.*goal-ray lism"):
        train(replace(config, data=DataConfig(str(tmp_path / "unpaired"))))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("packed", "allowed", "message"),
    [
        (b"", 9, "a whole micro-batch is unreadable; .*raise batch_per_worker and lower accumulate.*--resume"),
        (b"batch", 0, r"more than data\.max_bad_share=0.01 allows; mend them, or raise that.*--resume"),
    ],
)
def test_unreadable_samples_end_a_run_with_what_it_may_go_on_with(
    config, monkeypatch, tmp_path, packed, allowed, message
):
    bad = [{"shard": "a.tar", "key": "0", "stage": "decode", "reason": "torn"}]
    monkeypatch.setattr("goal_ray.train.loop.stream_batches", lambda *_: iter([(packed, bad)]))
    sent = []
    job = Job(config, tmp_path, (), (), (), None, allowed, sent.append, bool)
    with pytest.raises(StageError, match=message):
        next(read_batches(job, None, 0, 1))
    assert sent == [{"bad": bad}]


def test_a_gpu_that_runs_out_of_memory_says_what_to_change(config, monkeypatch):
    def run_steps(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr("goal_ray.train.loop.run_steps", run_steps)
    job = Job(config, None, (), (), (), None, 0, print, bool)
    with pytest.raises(
        StageError,
        match=r"rank 1 \(CUDA out of memory.*2\.00 GiB\.\).*`chunk`.*checkpoint_activations.*lower batch_per_worker "
        r"and raise accumulate.*--resume",
    ):
        train_worker(job, 1, 2, torch.device("cpu"))
