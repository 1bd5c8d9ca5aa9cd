"""The live view, on a clock that the tests turn."""

import io
import sys
import time

import pytest
from tqdm import tqdm

from goal_ray.lism import progress as progress_module
from goal_ray.lism.progress import LINE_EVERY_S, Meter, Progress
from goal_ray.lism.work import Work


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class NoMetrics:
    """Stands in for Ray's, which need a cluster."""

    def group(self, *_): ...
    def shard(self, *_): ...
    def speed(self, *_): ...


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock():
    return Clock()


def work(stage="propose", seconds=1.0, images=4, worker="n:1"):
    return Work(stage, worker, images, {stage: seconds})


def run_for(meter, clock, seconds, *works):
    """The same reports every second."""
    for _ in range(seconds):
        clock.now += 1
        for each in works:
            meter.add(each)


def test_busy_is_the_share_of_time_that_a_stages_workers_worked_and_the_bottleneck_comes_first(clock):
    meter = Meter(clock)
    both = [work("propose", 0.9, worker=f"n:{number}") for number in (1, 2)]
    run_for(meter, clock, 60, work("read", 0.1, worker="n:3"), *both, work("match", 0.4, worker="n:4"))
    assert list(meter.busy()) == ["propose", "match", "read"]
    assert meter.busy() == pytest.approx({"propose": 0.9, "match": 0.4, "read": 0.1}, rel=0.05)


def test_speed_and_busy_are_of_late_and_the_rest_is_forgotten(clock):
    meter = Meter(clock)
    run_for(meter, clock, 300, work("read", 0.2, images=100), work("match", 1.0))
    run_for(meter, clock, 31, work("read", 0.8, images=5), work("match", 0.5))
    assert meter.images_per_s() == pytest.approx(5, rel=0.05)
    assert meter.busy() == pytest.approx({"read": 0.8, "match": 0.5}, rel=0.05)
    assert len(meter.reports) < 70


def test_a_worker_that_has_gone_does_not_make_its_stage_look_idle(clock):
    meter = Meter(clock)
    run_for(meter, clock, 40, work(worker="n:1"), work(worker="n:2"))
    run_for(meter, clock, 31, work(worker="n:1"))
    assert meter.busy()["propose"] == pytest.approx(1.0)


def test_groups_that_take_minutes_count_as_busy_all_along(clock):
    meter = Meter(clock)
    for _ in range(4):
        clock.now += 200
        meter.add(work("read", 5.0))
        meter.add(work("propose", 198.0))
    assert meter.busy()["propose"] == pytest.approx(0.99, abs=0.02)
    assert meter.images_per_s() == pytest.approx(4 / 200, rel=0.05)


def test_before_anything_can_be_told_nothing_is(clock):
    meter = Meter(clock)
    assert (meter.busy(), meter.images_per_s(), meter.left_s(0, 100)) == ({}, 0, None)
    meter.add(work("read", 0.01, images=64))
    assert (meter.busy(), meter.images_per_s()) == ({}, 0)


def feed(progress, clock, seconds):
    for _ in range(seconds):
        clock.now += 1
        reports = [work("read", 0.08, 12), work("propose", 0.97, 12), work("match", 0.41, 12)]
        progress.passed(12, 100, ["decode"], reports)


def test_the_speed_is_told_for_as_long_as_the_run_is_on_also_when_nothing_comes(clock, monkeypatch):
    monkeypatch.setattr(progress_module, "BEAT_S", 0.001)
    told = []
    metrics = NoMetrics()
    metrics.speed = told.append

    def wait_for(speed):
        until = time.monotonic() + 60
        told.clear()
        while not told or told[-1] != pytest.approx(speed):
            assert time.monotonic() < until, told
            time.sleep(0.001)

    with Progress("out", 60_000, 10, metrics, clock) as progress:
        wait_for(0)
        feed(progress, clock, 60)
        wait_for(12)
        clock.now += 100
        wait_for(0)
        feed(progress, clock, 60)
        wait_for(12)
    assert told[-1] == 0
    told.clear()
    time.sleep(0.02)
    assert not told


def test_without_a_terminal_there_is_a_line_now_and_then(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("out", 60_000, 10, NoMetrics(), clock) as progress:
        feed(progress, clock, 300)
        progress.finished(40, work("write", 0.5))
        progress.all_done()
    *lines, last = sys.stderr.getvalue().splitlines()
    assert len(lines) == 300 / LINE_EVERY_S
    assert lines[-1] == (
        "lism: 50 %, 12.0 img/s 04:59 left, 0/10 tars 300 bad, bottleneck propose 97% (match 41 read 8)"
    )
    assert last == "lism: 3600 images, 1 shards, 300 bad"
    assert "\r" not in sys.stderr.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_where_log_records_are_wanted_there_are_these_and_no_line(clock, monkeypatch, caplog, stream):
    monkeypatch.setenv("GOAL_RAY_LOG", "json")
    monkeypatch.setattr(sys, "stderr", stream())
    caplog.set_level("INFO")
    with Progress("s3://b/out", 60_000, 10, NoMetrics(), clock) as progress:
        feed(progress, clock, 300)
        progress.finished(40, work("write", 0.5))
        progress.all_done()
    assert sys.stderr.getvalue() == ""
    *lines, last = caplog.records
    assert len(lines) == 300 / LINE_EVERY_S
    assert {(record.run, record.stage) for record in caplog.records} == {("s3://b/out", "lism")}
    assert (lines[-1].message, lines[-1].share, lines[-1].images_per_s, lines[-1].images) == ("pairing", 0.5, 12, 3600)
    assert list(lines[-1].busy) == ["propose", "match", "read"]
    assert (last.message, last.images, last.shards_done, last.quarantined) == ("all shards paired", 3600, 1, 300)


def test_on_a_terminal_of_100_columns_the_whole_line_can_be_read(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("out", 400_000, 100, NoMetrics(), clock) as progress:
        feed(progress, clock, 20)
        progress.finished(40, work("write", 0.3))
        progress.bar.refresh()
        assert sys.stderr.getvalue().rstrip().endswith(progress.text())
        line = tqdm.format_meter(**{**progress.bar.format_dict, "ncols": 100})
    assert line.startswith("  0%|")
    assert line.endswith("12.0 img/s 1:06:14 left, 1/100 tars 20 bad, bottleneck propose 97% (match 41 read 8 write 2)")
    assert len(line) <= 100
