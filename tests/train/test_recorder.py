"""The run folder's JSONL files, and the progress line."""

import io
import sys

import pytest

from goal_ray.jsonl import read_records
from goal_ray.train.cost import Cost
from goal_ray.train.metrics import Metrics
from goal_ray.train.recorder import ProgressLine, RunRecorder, fitting


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


def test_samples_that_were_bad_in_an_earlier_call_count_only_when_they_are_met_again(tmp_path):
    def record(key):
        return {"shard": "train-0.tar", "key": key, "stage": "decode", "reason": "torn"}

    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        recorder.quarantine([record("a"), record("b")])
    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        assert not recorder.bad
        for key in ("b", "b", "c"):
            recorder.quarantine([record(key)])
        assert [key for _, key in recorder.bad] == ["b", "c"]
    assert [each["key"] for each in read_records(tmp_path / "quarantine.jsonl")] == ["a", "b", "c"]


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


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def logged(step: int, total: int, **changed: float) -> dict[str, float]:
    """A log record."""
    terms = {"loss_global": 0.866, "loss_local": 0.953, "loss_tsl_image": 0.28, "loss_tsl_text": 0.22}
    return {"step": step, "total_steps": total, "loss": 2.32, **terms, "images_per_s": 61.04, **changed}


def test_a_log_file_gets_a_plain_line_now_and_then_the_first_and_the_last_in_any_case(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock()
    with ProgressLine("goal", clock) as line:
        line.show("scanning the shards")
        line.begin(0, 240)
        clock.now += 20  # the workers start, which says nothing about the steps
        for step in range(10, 250, 10):
            line.took(logged(step, 240))
            line.tick()
            clock.now += 10
        line.say("step 240: text_to_image.R@1 9.09, the best so far")
        line.show("evaluating")
    printed = sys.stderr.getvalue()
    assert "\r" not in printed
    assert printed.isascii()
    scanning, first, *later, last, said, evaluating = printed.splitlines()
    rest = "loss 2.32: global .87 local .95 TSL image .28 TSL text .22, 61.0 img/s"
    assert scanning == "train goal: scanning the shards"
    assert first == f"train goal: step 10/240, {rest}"
    assert later[0] == f"train goal: step 40/240, 03:20 left, {rest}"
    assert len(later) == 7
    assert last == f"train goal: step 240/240, {rest}"
    assert said.startswith("step 240: ")
    assert evaluating == "train goal: step 240/240, evaluating"


def test_the_last_step_of_a_run_that_ends_early_is_told(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock = Clock()
    with ProgressLine("goal", clock) as line:
        line.begin(100, 240)
        for step in (101, 102, 103):
            line.took(logged(step, 240))
            clock.now += 1
    assert [text.split(",")[0] for text in sys.stderr.getvalue().splitlines()] == [
        "train goal: step 101/240",
        "train goal: step 103/240",
    ]


def test_json_logs_get_no_line(monkeypatch):
    monkeypatch.setenv("GOAL_RAY_LOG", "json")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with ProgressLine("goal") as line:
        line.show("scanning the shards")
        line.took(logged(1, 1))
    assert sys.stderr.getvalue() == ""


def shown_on(columns: int, name: str, monkeypatch: pytest.MonkeyPatch, *records: dict[str, float]) -> str:
    """The line on a terminal after records that came 10 s apart."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with ProgressLine(name, clock) as line:
        line.bar.dynamic_ncols = lambda _: (columns, 24)
        line.begin(0, records[-1]["total_steps"])
        for record in records:
            clock.now += 10
            line.took(record)
    return sys.stderr.getvalue().split("\r")[-1].rstrip()


def test_what_matters_most_is_whole_on_a_terminal_of_80_columns(monkeypatch):
    line = shown_on(80, "docci_vit_b1", monkeypatch, logged(20, 240), logged(30, 240))
    assert line == "train docci_vit_b1 12% 30/240, 03:30 left, loss 2.32: global .87 local .95"
    assert len(line) <= 80
    two = {"loss_tsl_image": 0.0, "loss_tsl_text": 0.0}
    line = shown_on(80, "goal", monkeypatch, logged(20, 240, **two), logged(30, 240, **two))
    assert line == "train goal 12% 30/240, 03:30 left, loss 2.32: global .87 local .95, 61.0 img/s"


def test_a_wide_terminal_shows_the_whole_line_and_a_narrow_one_its_start(monkeypatch):
    records = logged(20, 240), logged(30, 240)
    assert shown_on(120, "goal", monkeypatch, *records) == (
        "train goal 12% 30/240, 03:30 left, loss 2.32: global .87 local .95 TSL image .28 TSL text .22, 61.0 img/s"
    )
    assert shown_on(40, "goal", monkeypatch, *records) == "train goal 12% 30/240, 03:30 left"
    assert fitting(["train goal", " 12%"], 5) == "train goal"


def test_the_time_left_counts_from_the_first_step_after_a_restart(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    clock = Clock()
    with ProgressLine("goal", clock) as line:
        line.begin(0, 100)
        for step in (10, 20):
            line.took(logged(step, 100))
            clock.now += 10
        line.rewind(10)
        clock.now += 1000
        line.took(logged(11, 100))
        assert " left" not in "".join(line.parts())
        clock.now += 3
        line.took(logged(12, 100))
        clock.now += 4
        assert line.parts()[2] == ", 04:20 left"
