"""Where the time goes: code marks its phases with `timed`, and who wants to know runs it under `measure`.

    with measure("propose") as seconds:
        regions = proposer.propose(pictures)     # inside, somewhere: with timed("encode"): …
    seconds                                      # {"propose": 1.9, "encode": 4.2}: a phase without those inside it

On CUDA the work of a phase is still under way when its block ends. There a mark is a pair of events in the stream,
which cost microseconds and are read once, at the end of `measure`. Without `measure` a mark does nothing.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class _Mark:
    """A phase and its begin and end: seconds of the host's clock, or events on the device."""

    phase: str
    inside: "_Mark | None"
    began: "float | torch.cuda.Event"
    ended: "float | torch.cuda.Event | None" = None

    def seconds(self) -> float:
        """Its length, with the marks inside it."""
        if isinstance(self.began, float):
            assert isinstance(self.ended, float)
            return self.ended - self.began
        assert self.ended is not None
        assert not isinstance(self.ended, float)
        self.ended.synchronize()
        return self.began.elapsed_time(self.ended) / 1000


@dataclass
class _Stopwatch:
    """All marks since it started, and the one that is open."""

    marks: list[_Mark] = field(default_factory=list)
    open: _Mark | None = None


_stopwatch: ContextVar[_Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def measure(phase: str) -> Iterator[dict[str, float]]:
    """Measures the block; after it, also where it raised, the dictionary holds the seconds of every phase.

    phase  what the block is, apart from the phases marked inside it
    The block's own length is the host's: it should end with its results on the host, as all of ours do. An own
    `measure` inside the block measures for itself.
    """
    seconds: dict[str, float] = {}
    watch = _Stopwatch()
    token = _stopwatch.set(watch)
    whole = _Mark(phase, None, time.perf_counter())
    try:
        yield seconds
    finally:
        _stopwatch.reset(token)
        # A block that was interrupted from outside may have left a mark without its end.
        inner = [(mark, mark.seconds()) for mark in watch.marks if mark.ended is not None]
        whole.ended = time.perf_counter()
        seconds[phase] = whole.seconds()
        for mark, length in inner:
            seconds[mark.phase] = seconds.get(mark.phase, 0.0) + length
            outer = phase if mark.inside is None else mark.inside.phase
            seconds[outer] = seconds.get(outer, 0.0) - length


@contextmanager
def timed(phase: str) -> Iterator[None]:
    """Marks the block as a phase, if somebody measures; nests, and the same phase may come again."""
    watch = _stopwatch.get()
    if watch is None:
        yield
        return
    mark = _Mark(phase, watch.open, _now())
    watch.marks.append(mark)
    watch.open = mark
    try:
        yield
    finally:
        # On the clock of its begin, should the block have been the first to use CUDA.
        mark.ended = time.perf_counter() if isinstance(mark.began, float) else _now()
        watch.open = mark.inside


def _now() -> "float | torch.cuda.Event":
    """This moment: of the device's current stream where CUDA is in use, else of the host."""
    if "torch" in sys.modules:  # else CUDA is not in use, and this module is no reason to load torch
        import torch

        if torch.cuda.is_initialized():
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event
    return time.perf_counter()
