"""The live view of a LISM run: how fast it is, when it will be done, and which stage holds it up.

    42%|▍| 12.4 img/s 1:02:10 left, 12/100 tars 3 bad, bottleneck propose 97% (match 41 read 8 write 1)

On a terminal it is one line that changes, elsewhere a line every LINE_EVERY_S, as a log record where those are wanted
(see goal_ray.events). Speed and the stages' percentages are
those of the last WINDOW_S, or longer where a single group takes longer. A stage's percentage is the share of that time
in which its workers worked; workers that reported nothing in it do not count. The bottleneck is the busiest stage.
"""

import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence

from tqdm import tqdm

from goal_ray.events import event, wants_json
from goal_ray.lism.metrics import Metrics
from goal_ray.lism.work import Work

WINDOW_S = 30.0
LINE_EVERY_S = 30.0
BEAT_S = 5.0  # Ray forgets a gauge that is not set again
SETTLED_S = 2.0  # before, a single report would decide the speed


class Meter:
    """What workers reported lately; several threads may ask."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.began: float | None = None
        self.reports: deque[tuple[float, Work]] = deque()
        self.lock = threading.Lock()

    def add(self, work: Work) -> None:
        """Takes one report; it is of now."""
        now = self.clock()
        start = now - sum(work.seconds.values())
        with self.lock:
            self.began = start if self.began is None else min(self.began, start)
            self.reports.append((now, work))
            while self.reports[0][0] < now - self._window_s():
                self.reports.popleft()

    def _window_s(self) -> float:
        longest = max((sum(work.seconds.values()) for _, work in self.reports), default=0.0)
        return max(WINDOW_S, 2 * longest)

    def _recent(self) -> tuple[float, list[Work]]:
        """The seconds looked at, and the reports in them; none before SETTLED_S."""
        now = self.clock()
        with self.lock:
            running_s = 0.0 if self.began is None else now - self.began
            span_s = min(self._window_s(), running_s)
            if running_s < SETTLED_S:
                return span_s, []
            return span_s, [work for at, work in self.reports if at > now - span_s]

    def images_per_s(self) -> float:
        """Images that came through the pipeline, those for the quarantine too; 0 before that can be told."""
        span_s, recent = self._recent()
        return sum(work.images for work in recent if work.stage == "read") / max(span_s, SETTLED_S)

    def busy(self) -> dict[str, float]:
        """Stage -> share of the time in which its workers worked, of 1; the busiest stage first."""
        span_s, recent = self._recent()
        seconds: dict[str, float] = defaultdict(float)
        workers: dict[str, set[str]] = defaultdict(set)
        for work in recent:
            seconds[work.stage] += sum(work.seconds.values())
            workers[work.stage].add(work.worker)
        shares = {stage: min(1.0, busy / (len(workers[stage]) * span_s)) for stage, busy in seconds.items()}
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def left_s(self, done: int, total: int) -> float | None:
        """Seconds until all is done, at the speed since the first report."""
        if self.began is None or not done:
            return None
        return (self.clock() - self.began) * (total - done) / done


class Progress:
    """Takes what comes out of the pipeline; shows it, and counts it in Ray's metrics. A context manager.

    run  its output folder
    """

    def __init__(
        self, run: str, total_bytes: int, shards: int, metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ):
        self.run, self.total_bytes, self.shards, self.metrics, self.clock = run, total_bytes, shards, metrics, clock
        self.meter = Meter(clock)
        self.done_bytes = self.images = self.bad = self.shards_done = 0
        # `None`: not where stderr is no terminal. The bar takes the columns that the text leaves.
        hidden = True if wants_json() else None
        self.bar = tqdm(
            total=total_bytes, disable=hidden, dynamic_ncols=True, bar_format="{percentage:3.0f}%|{bar}| {desc}"
        )
        self.bar.set_description_str("starting")
        self.line_due = clock() + LINE_EVERY_S
        self.over = threading.Event()
        self.heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> "Progress":
        self.heart.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self.heart.join()
        self.metrics.speed(0.0)
        self.bar.close()

    def _beat(self) -> None:
        """Tells how fast the run is, most of all when nothing comes out of it."""
        while True:
            self.metrics.speed(self.meter.images_per_s())
            if self.over.wait(BEAT_S):
                return

    def passed(self, images: int, size_bytes: int, bad_stages: Sequence[str], work: Sequence[Work]) -> None:
        """A group is through.

        size_bytes  of its members in the tar
        bad_stages  for every sample left out, the stage that found out
        """
        self.images += images
        self.bad += len(bad_stages)
        for each in work:
            self.meter.add(each)
        self.metrics.group(images, bad_stages, work)
        self._advance(size_bytes)

    def finished(self, pairs: int, work: Work) -> None:
        """A shard is written."""
        self.shards_done += 1
        self.meter.add(work)
        self.metrics.shard(pairs, work)
        self._advance(0)

    def skipped(self, size_bytes: int) -> None:
        """Bytes of a tar that hold no sample are behind: headers and padding, what lies behind its damage."""
        self._advance(size_bytes)

    def all_done(self) -> None:
        """The last line."""
        text = f"{self.images} images, {self.shards_done} shards, {self.bad} bad"
        if wants_json():
            event("lism", self.run, "all shards paired", **self._counts())
        elif self.bar.disable:
            print(f"lism: {text}", file=sys.stderr)
        self.bar.set_description_str(text)

    def _counts(self) -> dict[str, int]:
        return {"images": self.images, "quarantined": self.bad, "shards_done": self.shards_done, "shards": self.shards}

    def _advance(self, size_bytes: int) -> None:
        self.done_bytes += size_bytes
        if not self.bar.disable:
            self.bar.set_description_str(self.text(), refresh=False)
            self.bar.update(size_bytes)
        elif self.clock() >= self.line_due:
            self.line_due = self.clock() + LINE_EVERY_S
            share = self.done_bytes / max(1, self.total_bytes)
            if wants_json():
                busy = {stage: round(each, 3) for stage, each in self.meter.busy().items()}
                speed = round(self.meter.images_per_s(), 3)
                event(
                    "lism", self.run, "pairing", share=round(share, 4), images_per_s=speed, busy=busy, **self._counts()
                )
            else:
                print(f"lism: {100 * share:.0f} %, {self.text()}", file=sys.stderr, flush=True)

    def text(self) -> str:
        """The state in words, what matters most first, as a narrow terminal cuts off the end."""
        counts = f"{self.shards_done}/{self.shards} tars {self.bad} bad"
        left_s = self.meter.left_s(self.done_bytes, self.total_bytes)
        busy = [f"{stage} {100 * share:.0f}" for stage, share in self.meter.busy().items()]
        if left_s is None or not busy:
            return counts
        others = f" ({' '.join(busy[1:])})" if busy[1:] else ""
        speed = f"{self.meter.images_per_s():.1f} img/s {tqdm.format_interval(left_s)} left"
        return f"{speed}, {counts}, bottleneck {busy[0]}%{others}"
