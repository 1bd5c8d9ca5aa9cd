"""The run folder's JSONL files."""

import pytest

from goal_ray.jsonl import read_records
from goal_ray.train.cost import Cost
from goal_ray.train.metrics import Metrics
from goal_ray.train.recorder import ProgressLine, RunRecorder


def test_a_bad_sample_is_one_wherever_its_shard_lies(tmp_path):
    def record(folder, key):
        return {"shard": f"{folder}/train-0.tar", "key": key, "stage": "decode", "reason": "torn"}

    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        recorder.quarantine([record("/data", "a"), record("/data", "caf\udce9")])
    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        recorder.quarantine(
            [record("s3://bucket", "a"), record("s3://bucket", "caf\udce9"), record("s3://bucket", "b")]
        )
        assert len(recorder.bad) == 3
    assert len(read_records(tmp_path / "quarantine.jsonl")) == 3


def test_log_lines_that_a_dead_driver_had_not_written_come_from_the_checkpoint(tmp_path):
    def message(step):
        of_a_window = {"window_steps": 1, "window_seconds": 1.0, "images": 8, "flops": 1.0, "energy_joules": None}
        terms = {f"loss_{name}": 0.5 for name in ("global", "local", "tsl_image", "tsl_text")}
        rates = {"images_per_s": 8.0, "data_wait_share": 0.0, "lr": 1e-3, "peak_memory_bytes": 1}
        return {"step": step, "total_steps": 9, "loss": 2.0 / step, **terms, **rates, **of_a_window}

    def steps():
        return [record["step"] for record in read_records(tmp_path / "metrics.jsonl")]

    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        recorder.rewind(0, [])
        for step in (1, 2, 3):
            recorder.log(message(step))
    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        recorder.rewind(5, [message(step) for step in (2, 3, 4, 5)])
        assert steps() == [1, 2, 3, 4, 5]
        recorder.rewind(4, [message(4)])
        assert steps() == [1, 2, 3, 4]
        assert recorder.cost.steps == 5


def test_utilisation_is_that_of_the_workers_that_did_each_step():
    window = {"window_steps": 1, "images": 8, "peak_memory_bytes": 1, "energy_joules": None}
    cost = Cost(peak_flops=400.0)
    cost.add({**window, "window_seconds": 10.0, "flops": 1600.0})
    cost.peak_flops = 100.0
    cost.add({**window, "window_seconds": 20.0, "flops": 800.0})
    cost.peak_flops = None  # a GPU that is not in the table
    cost.add({**window, "window_seconds": 5.0, "flops": 1e6})
    assert cost.utilisation == pytest.approx(0.4)
    assert cost.flops == pytest.approx(1e6 + 2400)
    assert Cost().utilisation is None


def test_hours_on_cpus_and_on_gpus_are_told_apart():
    cost = Cost()
    cost.add_time(3600.0, workers=2)
    assert cost.line().startswith("2 CPU worker hours, ")
    cost.gpus = True
    cost.add_time(1800.0, workers=4)
    assert cost.line().startswith("2 GPU hours, 2 CPU worker hours, ")
    assert cost.worker_seconds == 4 * 3600.0
