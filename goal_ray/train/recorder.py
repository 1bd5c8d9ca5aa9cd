"""What a run leaves behind while it trains: its log, its quarantine, its TensorBoard, and one progress line."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from goal_ray.atomic import write_bytes
from goal_ray.events import event, say, wants_json
from goal_ray.jsonl import append_records, read_records
from goal_ray.progress import PlainLines
from goal_ray.run_folder import METRICS_FILE, QUARANTINE_FILE
from goal_ray.shard_urls import shard_name
from goal_ray.train.cost import Cost
from goal_ray.train.loggers import Logger
from goal_ray.train.metrics import Metrics

NO_CURVE = ("step", "total_steps", "seconds")
TERMS = {"loss_global": "global", "loss_local": "local", "loss_tsl_image": "TSL image", "loss_tsl_text": "TSL text"}
OF_A_WINDOW = ("window_steps", "window_seconds", "images", "flops", "energy_joules")


class ProgressLine:
    """The one line that a run shows on a terminal; elsewhere it is a plain line now and then. A context manager.

        train goal 12% 30/240, 03:25 left, loss 2.32: global .87 local .95 TSL image .28 TSL text .22, 61.0 img/s

    What matters most stands first, and a narrow terminal leaves out the parts at the end that do not fit.

    run  its folder
    """

    def __init__(self, run: str, clock: Callable[[], float] = time.monotonic):
        self.run, self.name, self.clock = run, Path(run).name, clock
        self.step = self.total_steps = 0
        self.latest: list[str] = []
        self.since: tuple[float, int] | None = None
        self.done_at: float | None = None
        self.lines = PlainLines(clock)
        # A bar between JSON lines would break them.
        self.bar = tqdm(
            desc=f"train {self.name}", bar_format="{desc}", dynamic_ncols=True, disable=True if wants_json() else None
        )

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(self, *_: object) -> None:
        self.lines.flush()
        self.bar.close()

    def begin(self, first_step: int, total_steps: int) -> None:
        """Sets where the run starts and ends, once that is known."""
        self.total_steps = total_steps
        self.rewind(first_step)

    def rewind(self, step: int) -> None:
        """Goes back, or on, to a step; how fast steps are is to be seen anew."""
        self.step, self.since, self.done_at = step, None, None

    def show(self, doing: str) -> None:
        """Says what goes on between steps."""
        self.lines.flush()
        self.latest, self.done_at = [f"{', ' if self.total_steps else ': '}{doing}"], None
        self._draw(at_once=True)

    def took(self, record: dict[str, Any]) -> None:
        """Shows a step, by its log record; the first and the last one in any case."""
        now, self.step, self.total_steps = self.clock(), record["step"], record["total_steps"]
        first = self.since is None
        began, first_step = self.since = self.since or (now, self.step)
        if self.step > first_step:
            self.done_at = now + (now - began) / (self.step - first_step) * (self.total_steps - self.step)
        self.latest = describe_step(record)
        self._draw(at_once=first or self.step == self.total_steps)

    def say(self, text: str) -> None:
        """Says something above this line."""
        say("train", self.run, text)

    def tick(self) -> None:
        """Moves the clock."""
        if not self.bar.disable:
            self._draw(at_once=False)

    def _draw(self, at_once: bool) -> None:
        parts = self.parts()
        self.lines.tell("".join(parts), at_once)
        self.bar.set_description_str(fitting(parts, self.bar.format_dict["ncols"]))

    def parts(self) -> list[str]:
        """The line, what matters most first."""
        found = [f"train {self.name}"]
        if self.total_steps:
            share = f" {100 * self.step // self.total_steps}% " if not self.bar.disable else ": step "
            found.append(f"{share}{self.step}/{self.total_steps}")
        if self.done_at is not None and self.step < self.total_steps:
            found.append(f", {tqdm.format_interval(max(0, self.done_at - self.clock()))} left")
        return found + self.latest


def fitting(parts: Sequence[str], columns: int | None) -> str:
    """The parts one behind the other, without those at the end for which a line of so many columns has no room."""
    lines = list(accumulate(parts))
    return max((line for line in lines if columns is None or len(line) <= columns), key=len, default=parts[0])


class RunRecorder:
    """Writes a run's metrics (JSONL and the loggers), its cost and its quarantine, and moves its progress line.

    seconds  wall time of the run up to the last record, earlier calls included
    bad      every unusable sample met in this call, by `bad_sample`; those of earlier calls may have been mended
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
        self.bad: dict[tuple[str, str], dict[str, str]] = {}
        self.listed = {bad_sample(record) for record in read_records(run_dir / QUARANTINE_FILE)}
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
        self.line.rewind(step)

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
        self.line.took(record)

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
        """Takes unusable samples; those that the run's quarantine does not list yet are appended to it."""
        met = {bad_sample(record): record for record in records}
        self.bad |= met
        new = {sample: record for sample, record in met.items() if sample not in self.listed}
        append_records(self.run_dir / QUARANTINE_FILE, new.values())
        self.listed |= new.keys()
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
    if path.exists():
        write_bytes(str(path), "".join(json.dumps(record) + "\n" for record in kept).encode())
    return kept


def describe_step(record: dict[str, Any]) -> list[str]:
    """The progress line's parts of a step: the loss, its terms that are not off, the speed."""
    shown = [f"{label} {short(record[name])}" for name, label in TERMS.items() if record[name]]
    terms = [f"{mark} {term}" for mark, term in zip((":", "", "", ""), shown, strict=False)]
    return [f", loss {short(record['loss'])}", *terms, f", {record['images_per_s']:.1f} img/s"]


def short(value: float) -> str:
    """A loss in few characters: 13.16, .87."""
    return f"{value:.2f}".lstrip("0")
