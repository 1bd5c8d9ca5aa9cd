"""What a run leaves behind while it trains: its log, its quarantine, its TensorBoard, and one progress line."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from goal_ray.events import event, wants_json
from goal_ray.jsonl import append_records, read_records
from goal_ray.shard_urls import shard_name
from goal_ray.storage import write_bytes
from goal_ray.train.cost import Cost
from goal_ray.train.loggers import Logger
from goal_ray.train.metrics import Metrics
from goal_ray.train.scan import QUARANTINE_FILE

METRICS_FILE = "metrics.jsonl"
NO_CURVE = ("step", "total_steps", "seconds")
OF_A_WINDOW = ("window_steps", "window_seconds", "images", "flops", "energy_joules")


class ProgressLine(tqdm):
    """The one line that a run shows; its total is known once the data are scanned."""

    def __init__(self, name: str):
        self.live = sys.stderr.isatty()
        interval_s = 0.1 if self.live else 10.0  # a log file needs no animation
        # A bar between JSON lines would break them.
        super().__init__(
            desc=f"train {name}", unit="step", dynamic_ncols=True, mininterval=interval_s, disable=wants_json()
        )

    def begin(self, first_step: int, total_steps: int) -> None:
        """Sets where the line starts and ends."""
        self.initial, self.n, self.total = first_step, first_step, total_steps

    def show(self, doing: str) -> None:
        """Says what goes on before the first step."""
        self.set_postfix_str(doing, refresh=self.live)

    def say(self, text: str) -> None:
        """Prints a line above this one."""
        self.write(text, file=sys.stderr)

    def tick(self) -> None:
        """Moves the clock."""
        if self.live:
            self.refresh()


class RunRecorder:
    """Writes a run's metrics (JSONL and the loggers), its cost and its quarantine, and moves its progress line.

    seconds  wall time of the run up to the last record, earlier calls included
    bad      every unusable sample met, by `bad_sample`
    workers  how many are at work now
    prometheus  the run's metrics, for who has more to count
    """

    def __init__(self, run_dir: Path, line: ProgressLine, loggers: Sequence[Logger], metrics: Metrics, began: float):
        self.run_dir = run_dir
        self.line = line
        self.loggers = loggers
        self.prometheus = metrics
        self.since = began
        self.workers = 0
        self.cost = Cost.read(run_dir)
        self.bad = {bad_sample(record): record for record in read_records(run_dir / QUARANTINE_FILE)}
        self.metrics: TextIO | None = None

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.count_time()
        self.cost.write(self.run_dir)
        if self.metrics is not None:
            self.metrics.close()
        for logger in self.loggers:
            logger.close()

    def rewind(self, step: int, saved: Sequence[dict[str, Any]]) -> None:
        """Goes on behind `step`, the newest checkpoint's: log lines beyond it are dropped, since they come again.

        saved  the log records that the checkpoint holds; those that a driver that died had not written are logged now
        """
        self.prometheus.set("checkpoint_step", step)
        if self.metrics is not None:
            self.metrics.close()
        path = self.run_dir / METRICS_FILE
        kept = keep_steps(path, step)
        self.metrics = path.open("a", encoding="utf-8")
        for logger in self.loggers:
            logger.rewind(step)
        for record in saved:
            if record["step"] > (kept[-1]["step"] if kept else 0):
                self.log(record)
        self.line.n = step
        self.line.refresh()

    def log(self, message: dict[str, Any]) -> None:
        """Takes a log line."""
        self.count_time()
        self.prometheus.logged(message)
        self.cost.add(message)
        self.cost.write(self.run_dir)
        record = {name: value for name, value in message.items() if name not in OF_A_WINDOW}
        record["seconds"] = round(self.seconds, 2)
        assert self.metrics is not None
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        shown = {name: record[name] for name in ("step", "total_steps", "loss", "images_per_s", "data_wait_share")}
        event("train", str(self.run_dir), "trained", **shown)
        curves = {f"train/{name}": value for name, value in record.items() if name not in NO_CURVE}
        self.draw(record["step"], {name: value for name, value in curves.items() if value is not None})
        self.line.set_postfix_str(describe_step(record), refresh=False)
        self.line.update(record["step"] - self.line.n)

    def describe(self, message: dict[str, Any]) -> None:
        """Takes what the workers run on."""
        self.cost.device, self.cost.gpus = message["device"], message["gpus"]
        self.cost.workers, self.cost.peak_flops = message["workers"], message["peak_flops"]

    def draw(self, step: int, values: dict[str, float]) -> None:
        """Gives numbers to the loggers."""
        for logger in self.loggers:
            logger.log(step, values)

    def evaluated(self, step: int, numbers: dict[str, float]) -> None:
        """Takes the results of the checkpoint after `step` steps, by name."""
        self.prometheus.evaluated(numbers)
        event("train", str(self.run_dir), "checkpoint evaluated", step=step, results=numbers)
        self.draw(step, {f"evaluation/{name}": value for name, value in numbers.items()})

    @property
    def seconds(self) -> float:
        """Wall time of the run, earlier calls included, as of the last count."""
        return self.cost.seconds

    def count_time(self) -> None:
        """Adds the time since the last call to the run's."""
        now = time.perf_counter()
        passed, self.since = now - self.since, now
        self.cost.add_time(passed, self.workers)
        self.prometheus.set("workers", self.workers)
        self.prometheus.refresh()

    def quarantine(self, records: list[dict[str, str]]) -> None:
        """Appends samples that were not met before to the run's quarantine."""
        new = {bad_sample(record): record for record in records if bad_sample(record) not in self.bad}
        append_records(self.run_dir / QUARANTINE_FILE, new.values())
        self.bad |= new
        for record in new.values():
            self.prometheus.count("quarantined")
            sample = {name: record[name] for name in ("shard", "key", "reason")}
            event("train", str(self.run_dir), "sample quarantined", logging.WARNING, **sample)


def bad_sample(record: dict[str, str]) -> tuple[str, str]:
    """Which sample a quarantine's record is of, wherever its shard lies."""
    return shard_name(record["shard"]), record["key"]


def keep_steps(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops log lines beyond a step, which will be logged again, and returns the others."""
    kept = [record for record in read_records(path) if record["step"] <= last_step]
    write_bytes(str(path), "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def describe_step(record: dict[str, Any]) -> str:
    """The progress line's tail: the loss and its terms, rate and speed."""
    labels = {"loss_global": "global", "loss_local": "local", "loss_tsl_image": "tsl", "loss_tsl_text": "txt"}
    terms = " ".join(f"{label} {record[name]:.3f}" for name, label in labels.items() if record[name])
    return f"loss {record['loss']:.3f} ({terms}) lr {record['lr']:.1e} {record['images_per_s']:.1f} img/s"
