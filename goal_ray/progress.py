"""How far work is, for people: a bar on a terminal, elsewhere whole lines now and then, none between JSON lines."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from goal_ray.events import wants_json

LINE_EVERY_S = 30.0


class PlainLines:
    """Prints to stderr the latest of what it is told, at most every LINE_EVERY_S seconds, the first time after that.

    On a terminal, where a bar says it, and where logs are JSON lines, which it would break, it prints nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.silent = sys.stderr.isatty() or wants_json()
        self.due = clock() + LINE_EVERY_S
        self.held = self.printed = ""

    def tell(self, text: str, at_once: bool = False) -> None:
        """Takes how things stand now."""
        self.held = text
        if at_once or self.clock() >= self.due:
            self.flush()

    def flush(self) -> None:
        """Prints what was told last, unless it is printed already."""
        if self.held != self.printed and not self.silent:
            print(self.held, file=sys.stderr, flush=True)
            self.due = self.clock() + LINE_EVERY_S
        self.printed = self.held


class Progress:
    """How far a piece of work is. A context manager, at whose end all is done unless an error ends it.

    unit   what is counted, as one; "B" for bytes
    total  how many there are; None where that is not known
    done   how many are behind
    """

    def __init__(self, title: str, unit: str, total: int | None = None, clock: Callable[[], float] = time.monotonic):
        self.title, self.unit, self.total, self.clock, self.began = title, unit, total, clock, clock()
        self.done, self.note = 0, ""
        hidden = True if wants_json() else None  # `None`: not where stderr is no terminal
        scaled = unit == "B"
        self.bar = tqdm(desc=title, total=total, unit=unit, unit_scale=scaled, dynamic_ncols=True, disable=hidden)
        self.lines = PlainLines(clock)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is None and self.total is not None:
            self.bar.update(self.total - self.done)
        self.bar.close()

    def add(self, amount: int, note: str | None = None) -> None:
        """So much more is done; `note` replaces what was told beside it."""
        self.done += amount
        if note is not None:
            self.note = note
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        self.lines.tell(self._line())

    def _line(self) -> str:
        parts = []
        if self.total is not None:
            parts.append(f"{100 * self.done // max(1, self.total)} %")
        if self.unit != "B":
            of_all = f" of {self.total:,}" if self.total is not None else ""
            parts.append(f"{self.done:,}{of_all} {self.unit}s")
        parts.append(self.note)
        if self.total is not None:
            left_s = (self.clock() - self.began) * (self.total - self.done) / max(1, self.done)
            parts.append(f"{tqdm.format_interval(left_s)} left")
        return f"{self.title}: {', '.join(filter(None, parts))}"
