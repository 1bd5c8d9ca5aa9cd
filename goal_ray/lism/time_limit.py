"""A limit on the time that one call may take, in any thread: actors of Ray Data do not work in the main one."""

import ctypes
import faulthandler
import threading
from collections.abc import Callable
from typing import TypeVar

from goal_ray.errors import StageError

T = TypeVar("T")
GRACE_S = 60.0
STDERR = 2


class TimeLimitError(StageError):
    """A call took longer than it may."""


class _TimeIsUp(BaseException):
    """What strikes the call; no Exception, so that the code it meets there does not take it for an error of its own."""


class _Alarm:
    """Raises _TimeIsUp in the thread that made it, unless it is switched off within `limit_s` seconds."""

    def __init__(self, limit_s: float):
        self.thread = ctypes.c_ulong(threading.get_ident())
        self.lock = threading.Lock()
        self.off = False
        self.timer = threading.Timer(limit_s, self.ring)
        self.timer.daemon = True
        self.timer.start()

    def ring(self) -> None:
        with self.lock:
            if not self.off:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(self.thread, ctypes.py_object(_TimeIsUp))

    def switch_off(self) -> None:
        """Takes back what has not struck yet: nothing strikes after this."""
        self.timer.cancel()
        with self.lock:
            self.off = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(self.thread, None)


def run_within(limit_s: float, work: Callable[[], T]) -> T:
    """The result of `work()`, which is interrupted after `limit_s` seconds.

    That happens between two steps of Python. A single call into native code that goes on for GRACE_S longer ends the
    process, with a traceback on stderr. Raises TimeLimitError, and never strikes after it has returned.
    """
    faulthandler.dump_traceback_later(limit_s + GRACE_S, exit=True, file=STDERR)
    try:
        alarm = _Alarm(limit_s)
        try:
            return work()
        finally:
            alarm.switch_off()
    except _TimeIsUp:
        raise TimeLimitError(f"it took longer than {limit_s:g} s; raise max_seconds_per_image if it may") from None
    finally:
        faulthandler.cancel_dump_traceback_later()
