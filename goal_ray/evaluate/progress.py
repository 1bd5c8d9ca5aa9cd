"""How far an evaluation is, for people."""

import time
from collections.abc import Callable

from tqdm import tqdm

from goal_ray.events import wants_json
from goal_ray.plain_lines import PlainLines


class Progress:
    """How far a pass over so many bytes is: a bar on a terminal, elsewhere a line now and then. A context manager."""

    def __init__(self, title: str, total_bytes: int, clock: Callable[[], float] = time.monotonic):
        self.title, self.total_bytes, self.clock, self.began = title, total_bytes, clock, clock()
        hidden = True if wants_json() else None  # a bar between JSON lines would break them
        self.bar = tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, dynamic_ncols=True, disable=hidden)
        self.lines = PlainLines(clock)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None:  # what lies behind the last usable sample
            self.bar.update(self.total_bytes - self.bar.n)
        self.bar.close()

    def reached(self, done_bytes: int, samples: int) -> None:
        """So much is behind."""
        self.bar.set_postfix_str(f"{samples} samples", refresh=False)
        self.bar.update(done_bytes - self.bar.n)
        left_s = (self.clock() - self.began) * (self.total_bytes - done_bytes) / max(1, done_bytes)
        share = 100 * done_bytes // max(1, self.total_bytes)
        self.lines.tell(f"{self.title}: {share} %, {samples} samples, {tqdm.format_interval(left_s)} left")
