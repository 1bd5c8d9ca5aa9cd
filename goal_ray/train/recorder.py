"""What a run leaves behind while it trains: its log, its quarantine, its TensorBoard, and one progress line."""

import json
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from goal_ray.train.scan import QUARANTINE_FILE

METRICS_FILE = "metrics.jsonl"
NO_CURVE = ("step", "total_steps", "seconds")


class ProgressLine(tqdm):
    """The one line that a run shows; its total is known once the data are scanned."""

    def __init__(self, name: str):
        self.live = sys.stderr.isatty()
        interval_s = 0.1 if self.live else 10.0  # a log file needs no animation
        super().__init__(desc=f"train {name}", unit="step", dynamic_ncols=True, mininterval=interval_s)

    def begin(self, first_step: int, total_steps: int) -> None:
        """Sets where the line starts and ends."""
        self.initial, self.n, self.total = first_step, first_step, total_steps

    def show(self, doing: str) -> None:
        """Says what goes on before the first step."""
        self.set_postfix_str(doing, refresh=self.live)

    def tick(self) -> None:
        """Moves the clock."""
        if self.live:
            self.refresh()


class RunRecorder:
    """Writes a run's metrics (JSONL and TensorBoard) and quarantine, and moves its progress line.

    seconds  wall time of the run up to the last record, earlier calls included
    bad      every unusable sample met, by (shard, key)
    """

    def __init__(self, run_dir: Path, first_step: int, line: ProgressLine, began: float):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        kept = keep_steps(run_dir / METRICS_FILE, first_step)
        self.seconds = kept[-1]["seconds"] if kept else 0.0
        self.since = began
        self.bad = {(record["shard"], record["key"]): record for record in read_records(run_dir / QUARANTINE_FILE)}
        self.metrics: TextIO = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.line = line

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.board.close()

    def record(self, message: dict[str, Any]) -> None:
        """Takes one record from a worker: a log line, bad samples, or what it is doing before the first step."""
        if "bad" in message:
            self.quarantine(message["bad"])
        elif "doing" in message:
            self.line.show(message["doing"])
        else:
            self.log(message)

    def log(self, message: dict[str, Any]) -> None:
        """Takes a log line."""
        self.count_time()
        message = {**message, "seconds": round(self.seconds, 2)}
        self.metrics.write(json.dumps(message) + "\n")
        self.metrics.flush()
        for name, value in message.items():
            if name not in NO_CURVE and value is not None:
                self.board.add_scalar(f"train/{name}", value, message["step"])
        self.line.set_postfix_str(describe_step(message), refresh=False)
        self.line.update(message["step"] - self.line.n)

    def count_time(self) -> None:
        """Adds the time since the last call to the run's."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now

    def quarantine(self, records: list[dict[str, str]]) -> None:
        """Appends samples that were not met before to the run's quarantine."""
        with (self.run_dir / QUARANTINE_FILE).open("a", encoding="utf-8") as file:
            for record in records:
                if (record["shard"], record["key"]) not in self.bad:
                    self.bad[record["shard"], record["key"]] = record
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file that a killed run may have left in the middle of a line; none where it is missing."""
    # Bytes: a key may hold a sign that str.splitlines takes for a line's end, and a torn line may end inside a sign.
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def keep_steps(path: Path, last_step: int) -> list[dict[str, Any]]:
    """Drops log lines beyond a step, which will be logged again, and returns the others."""
    kept = [record for record in read_records(path) if record["step"] <= last_step]
    path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    return kept


def describe_step(record: dict[str, Any]) -> str:
    """The progress line's tail: the loss and its terms, rate and speed."""
    labels = {"loss_global": "global", "loss_local": "local", "loss_tsl_image": "tsl", "loss_tsl_text": "txt"}
    terms = " ".join(f"{label} {record[name]:.3f}" for name, label in labels.items() if record[name])
    return f"loss {record['loss']:.3f} ({terms}) lr {record['lr']:.1e} {record['images_per_s']:.1f} img/s"
