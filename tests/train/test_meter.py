"""How long a device waits for data, on clocks that the tests turn."""

import time

import pytest
import torch

from goal_ray.train.meter import WaitMeter


def test_a_cpu_waits_as_long_as_its_worker_does(monkeypatch):
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    meter = WaitMeter(torch.device("cpu"))
    for seconds in (1.5, 0.25):
        with meter.waiting():
            now += seconds
        now += 10.0
    assert meter.seconds() == 1.75
    assert meter.seconds() == 0.0


class Gpu:
    """A stream that does its work in order, and events on it in milliseconds, as CUDA has them."""

    def __init__(self):
        self.host_ms = self.free_ms = 0.0
        self.waited_for = []

    def launch(self, work_ms):
        self.free_ms = max(self.free_ms, self.host_ms) + work_ms

    def event(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu):
        self.gpu = gpu

    def record(self):
        self.at_ms = max(self.gpu.free_ms, self.gpu.host_ms)

    def synchronize(self):
        self.gpu.waited_for.append(self)
        self.gpu.host_ms = max(self.gpu.host_ms, self.at_ms)

    def elapsed_time(self, other):
        return other.at_ms - self.at_ms


@pytest.mark.parametrize(("work_ms", "idle_s"), [(100.0, 0.0), (10.0, 3 * 0.025)])
def test_a_gpu_waits_only_once_its_work_is_done(monkeypatch, work_ms, idle_s):
    gpu = Gpu()
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    meter = WaitMeter(torch.device("cuda", 0))
    gpu.launch(work_ms)
    for _ in range(3):
        with meter.waiting():
            gpu.host_ms += 35.0
        gpu.launch(work_ms)
    assert meter.seconds() == pytest.approx(idle_s)
    (last,) = gpu.waited_for
    assert gpu.free_ms - last.at_ms == work_ms  # the last step is queued behind it
    assert meter.seconds() == 0.0
