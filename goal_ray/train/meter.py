"""Energy of a GPU, where its driver counts it."""

import torch


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
