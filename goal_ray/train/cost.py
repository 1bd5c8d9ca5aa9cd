"""What a run has cost so far: kept in cost.json over all its calls, repeated steps included."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from goal_ray.atomic import write_bytes
from goal_ray.run_folder import COST_FILE


@dataclass
class Cost:
    """A run's cost.

    seconds            wall time of all calls, from their start
    worker_seconds     wall time times workers, while there were any
    gpu_seconds        the part of it in which a worker was a GPU
    gpus               whether a worker of the last call is a GPU
    step_seconds       time of the log windows alone: that of the steps and of waiting for data
    steps, images      done, those that a failure made necessary again included
    flops              useful: forwards and backwards of the towers
    peak_flops         FLOP/s that all workers together reach at most, those of the last call; null where unknown
    possible_flops     what the workers would have done at most in the time of the steps for which that is known
    measured_flops     useful, of those steps
    peak_memory_bytes  the most that a worker held: allocated on its GPU, or resident on a CPU
    energy_joules      of the workers' GPUs during the steps; null where NVML does not tell
    """

    seconds: float = 0.0
    worker_seconds: float = 0.0
    gpu_seconds: float = 0.0
    gpus: bool = False
    device: str = ""
    workers: int = 0
    step_seconds: float = 0.0
    steps: int = 0
    images: int = 0
    flops: float = 0.0
    peak_flops: float | None = None
    possible_flops: float = 0.0
    measured_flops: float = 0.0
    peak_memory_bytes: int = 0
    energy_joules: float | None = None

    @classmethod
    def read(cls, run_dir: Path) -> "Cost":
        """The cost so far; nothing where the run has not begun."""
        place = run_dir / COST_FILE
        if not place.exists():
            return cls()
        stored = json.loads(place.read_text(encoding="utf-8"))
        return cls(**{field.name: stored[field.name] for field in fields(cls) if field.name in stored})

    def add(self, record: dict[str, Any]) -> None:
        """Adds a log record's window."""
        self.step_seconds += record["window_seconds"]
        self.steps += record["window_steps"]
        self.images += record["images"]
        self.flops += record["flops"]
        if self.peak_flops is not None:
            self.possible_flops += record["window_seconds"] * self.peak_flops
            self.measured_flops += record["flops"]
        self.peak_memory_bytes = max(self.peak_memory_bytes, record["peak_memory_bytes"])
        if record["energy_joules"] is not None:
            self.energy_joules = (self.energy_joules or 0.0) + record["energy_joules"]

    def add_time(self, seconds: float, workers: int) -> None:
        """Adds wall time in which there were so many workers."""
        self.seconds += seconds
        self.worker_seconds += seconds * workers
        self.gpu_seconds += seconds * workers * self.gpus

    @property
    def images_per_s(self) -> float:
        """Pictures per second of the steps."""
        return self.images / self.step_seconds if self.step_seconds else 0.0

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation of the steps; None where it is unknown."""
        return self.measured_flops / self.possible_flops if self.possible_flops else None

    def write(self, run_dir: Path) -> None:
        """Stores the cost and what follows from it."""
        derived = {
            "worker_hours": self.worker_seconds / 3600,
            "gpu_hours": self.gpu_seconds / 3600,
            "images_per_s": self.images_per_s,
            "mfu": self.utilisation,
        }
        write_bytes(str(run_dir / COST_FILE), json.dumps({**asdict(self), **derived}, indent=1).encode())

    def line(self) -> str:
        """The cost on one line."""
        cpu_seconds = self.worker_seconds - self.gpu_seconds
        hours = {"GPU hours": self.gpu_seconds / 3600, "CPU worker hours": cpu_seconds / 3600}
        parts = [
            *(f"{count:.3g} {name}" for name, count in hours.items() if count),
            f"{self.flops:.3g} FLOPs",
            f"{self.images_per_s:.3g} images/s",
            f"peak memory {self.peak_memory_bytes / 1e9:.2f} GB",
        ]
        if self.utilisation is not None:
            parts.append(f"MFU {self.utilisation:.0%}")
        if self.energy_joules is not None:
            parts.append(f"{self.energy_joules / 3.6e6:.3g} kWh")
        return ", ".join(parts)
