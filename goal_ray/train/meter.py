"""What a worker's device takes: time without data, and energy where its driver counts it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class WaitMeter:
    """Seconds in which a worker's device waits for data.

    A host that is ahead of its GPU waits for data that the GPU does not lack yet. So on CUDA the stream tells: the time
    from the end of all its work to the arrival of more.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.waits: list[tuple[Any, Any]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block that waits for data."""
        began = self._now()
        yield
        self.waits.append((began, self._now()))

    def seconds(self) -> float:
        """Of the waits since the last call; on CUDA once the last of them is over, with the work behind it queued."""
        waits, self.waits = self.waits, []
        if not self.on_gpu:
            return sum(ended - began for began, ended in waits)
        if waits:
            waits[-1][1].synchronize()
        return sum(began.elapsed_time(ended) for began, ended in waits) / 1000

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class EnergyMeter:
    """Joules that a worker's GPU has taken since the last reading; 0 on CPUs and where NVML does not tell."""

    def __init__(self, device: torch.device):
        self.handle = None
        if device.type == "cuda":
            self.handle = nvml_handle(device)
        self.last_mj = self._total_mj()

    def joules(self) -> float:
        """Energy since the last call, in joules."""
        now_mj = self._total_mj()
        used_mj, self.last_mj = now_mj - self.last_mj, now_mj
        return used_mj / 1000

    def _total_mj(self) -> int:
        if self.handle is None:
            return 0
        import pynvml

        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))


def nvml_handle(device: torch.device) -> object | None:
    """NVML's handle of a CUDA device, found by its UUID; None where NVML or its energy counter is missing."""
    try:
        import pynvml

        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (ImportError, AttributeError):
        return None
    except pynvml.NVMLError:
        return None
    return handle
