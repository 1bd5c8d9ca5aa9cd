"""Progress where stderr is no terminal: whole lines now and then, not one that changes."""

import sys
import time
from collections.abc import Callable

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
