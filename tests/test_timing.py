"""The stopwatch, on a clock that the tests turn."""

from contextlib import suppress

import pytest
import torch

from goal_ray import timing
from goal_ray.timing import measure, timed


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    return clock


def test_a_phase_has_its_own_seconds_without_those_of_the_phases_inside_it(clock):
    with measure("propose") as seconds:
        clock.work(1)
        with timed("encode"):
            clock.work(2)
            with timed("copy"):
                clock.work(4)
        clock.work(8)
    assert seconds == {"propose": 9, "encode": 2, "copy": 4}


def test_a_phase_that_comes_again_adds_up(clock):
    with measure("propose") as seconds:
        for _ in range(3):
            with timed("encode"):
                clock.work(2)
            with timed("propose"):
                clock.work(1)
    assert seconds == {"propose": 3, "encode": 6}


def test_a_block_that_raises_is_measured_up_to_there(clock):
    with suppress(ValueError), measure("propose") as seconds, timed("encode"):
        clock.work(2)
        raise ValueError("torn")
    assert seconds == {"propose": 0, "encode": 2}
    with measure("propose") as seconds:
        clock.work(1)
    assert seconds == {"propose": 1}


def test_a_measure_inside_another_measures_for_itself(clock):
    with measure("outer") as outer:
        with measure("inner") as inner, timed("encode"):
            clock.work(2)
        with timed("encode"):
            clock.work(1)
    assert inner == {"inner": 0, "encode": 2}
    assert outer == {"outer": 2, "encode": 1}


def test_without_a_measure_a_mark_does_not_even_read_the_clock(monkeypatch):
    monkeypatch.setattr(timing, "_now", lambda: pytest.fail("the clock was read"))
    with timed("encode"):
        pass


def test_on_cuda_a_phase_has_the_devices_seconds_and_nothing_waits_before_the_end(clock, monkeypatch):
    device, waited = Clock(), []

    class Event:
        """A moment in a stream that runs behind the host."""

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def synchronize(self):
            waited.append(clock.now)

        def elapsed_time(self, end):
            return 1000 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with measure("propose") as seconds:
        for _ in range(2):
            with timed("encode"):
                clock.work(0.25)
                device.work(3)
        clock.work(9.5)  # the host waits for results
    assert seconds == {"propose": 4, "encode": 6}
    assert waited == [10, 10]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_work_on_a_gpu_counts_where_it_was_launched():
    big = torch.randn(8192, 8192, device="cuda")
    with measure("rest") as seconds:
        with timed("encode"):
            for _ in range(20):
                big @ big
        torch.cuda.synchronize()
    assert seconds["encode"] > 10 * seconds["rest"]
