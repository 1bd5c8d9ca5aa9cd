"""Prometheus metrics of a training run, through Ray: every node's agent serves them at its metrics export port.

Prometheus shows them with Ray's prefix, and counters with an ending: `ray_goal_ray_train_images_total`. Each has the
tag `run`, the run's folder. The driver sets them at every log line, and gauges again every few seconds:

    goal_ray_train_step               optimizer steps done (a gauge)
    goal_ray_train_loss               the loss of the last log line (a gauge), and so its terms: ..._loss_global, ...
    goal_ray_train_images_per_second  of the last log line (a gauge)
    goal_ray_train_data_wait_share    share of the last log line's time in which a worker waited for data (a gauge)
    goal_ray_train_workers            at work now (a gauge)
    goal_ray_train_checkpoint_step    step of the newest checkpoint, 0 before the first (a gauge)
    goal_ray_train_evaluation         results on held-out shards (a gauge); tag `metric`
    goal_ray_train_images             pictures trained on
    goal_ray_train_quarantined        unreadable samples met
    goal_ray_train_restarts           groups of workers started again
    goal_ray_train_nonfinite_losses   losses that were NaN or infinite; each ends the run
"""

import time
from collections.abc import Mapping
from typing import Any

from goal_ray.settings import TERMS

REFRESH_S = 5.0
PREFIX = "goal_ray_train_"
GAUGES = {
    "step": "optimizer steps done",
    "loss": "loss of the last log line",
    **{f"loss_{term}": "term of the loss of the last log line" for term in TERMS},
    "images_per_second": "images per second of the last log line",
    "data_wait_share": "share of the time that a worker waited for data",
    "workers": "workers at work now",
    "checkpoint_step": "step of the newest checkpoint",
    "evaluation": "results on held-out shards",
}
COUNTERS = {
    "images": "pictures trained on",
    "quarantined": "unreadable samples met",
    "restarts": "groups of workers started again",
    "nonfinite_losses": "losses that were NaN or infinite",
}


class Metrics:
    """The metrics, in a process that is connected to Ray. run: the run's folder."""

    def __init__(self, run: str):
        from ray.util import metrics

        def make(kind: type, name: str, description: str) -> Any:
            tags = ("run", "metric") if name == "evaluation" else ("run",)
            metric = kind(PREFIX + name, description, tag_keys=tags)
            metric.set_default_tags({"run": run})
            return metric

        self.values: dict[tuple[str, str], float] = {}
        self.refreshed = 0.0
        self.gauges = {name: make(metrics.Gauge, name, text) for name, text in GAUGES.items()}
        self.counters = {name: make(metrics.Counter, name, text) for name, text in COUNTERS.items()}

    def set(self, name: str, value: float, metric: str = "") -> None:
        """Sets a gauge."""
        self.values[name, metric] = value
        self.gauges[name].set(value, {"metric": metric} if metric else None)

    def refresh(self) -> None:
        """To call often: Ray forgets a gauge that is not set again."""
        now = time.monotonic()
        if now - self.refreshed > REFRESH_S:
            self.refreshed = now
            for (name, metric), value in self.values.items():
                self.set(name, value, metric)

    def count(self, name: str, amount: float = 1) -> None:
        """Adds to a counter; Ray refuses to count nothing."""
        if amount > 0:
            self.counters[name].inc(amount)

    def logged(self, record: Mapping[str, Any]) -> None:
        """Takes a log line as the workers send it."""
        for name in ("step", "loss", *(f"loss_{term}" for term in TERMS), "data_wait_share"):
            self.set(name, record[name])
        self.set("images_per_second", record["images_per_s"])
        self.count("images", record["images"])

    def evaluated(self, numbers: Mapping[str, float]) -> None:
        """Takes an evaluation's results by name."""
        for name, value in numbers.items():
            self.set("evaluation", value, name)
