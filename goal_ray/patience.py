"""Asking a storage again that fails for a while, for GOAL_RAY_STORAGE_PATIENCE_S seconds (600) each time.

What fails for good (no such file, no rights, no room, refused by a server) is raised at once.
"""

import errno
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event
from typing import TypeVar

import tenacity

PATIENCE_S = float(os.environ.get("GOAL_RAY_STORAGE_PATIENCE_S", "600"))
LASTING_NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EOPNOTSUPP),
)
NETWORK_LIBRARIES = (
    "aiohttp",
    "botocore",
    "gcsfs",
    "google",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
)
PASSING_REFUSALS = (408, 425, 429)  # too slow, too early, too many requests
Result = TypeVar("Result")
log = logging.getLogger(__name__)
_at_most_s: ContextVar[float] = ContextVar("_at_most_s", default=math.inf)
_over: ContextVar[Event] = ContextVar("_over", default=Event())  # noqa: B039 (nobody sets the default)


class FileReplaced(OSError):
    """A file is another one than when its reading began."""


LASTING = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    FileReplaced,
)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if is_refused(error):
        return False
    if isinstance(error, OSError):
        return not isinstance(error, LASTING) and error.errno not in LASTING_NUMBERS
    lasting = isinstance(error, ValueError) or re.search("Credential|Validation", type(error).__name__)
    return is_storage_error(error) and not lasting


def is_storage_error(error: BaseException) -> bool:
    """Whether a network library raised it, whose errors are no OSErrors."""
    return type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES


def is_refused(error: BaseException) -> bool:
    """Whether a network library raised it for a server's answer that stays the same (HTTP 4xx, but for a few)."""
    answer = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(answer, "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_REFUSALS
    return refused and is_storage_error(error)


def patiently(request: Callable[[], Result], url: str) -> Result:
    """What a request to a storage returns, asked again while it fails with what may pass; raises what lasts.

    The pauses are random and grow to half a minute, so that a thousand workers do not come back at the same moment.
    """
    patience_s, over = min(PATIENCE_S, _at_most_s.get()), _over.get()

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        left_s = max(0.0, patience_s - (state.seconds_since_start or 0))
        log.warning("%s: %s: %s; trying again for %.0f s", url, type(error).__name__, error, left_s)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        stop=tenacity.stop_any(tenacity.stop_after_delay(patience_s), tenacity.stop_when_event_set(over)),
        sleep=tenacity.sleep_using_event(over),
        before_sleep=say,
        reraise=True,
    )(request)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """A block that can do without what it asks for: its requests, in this thread, are repeated for so long at most."""
    token = _at_most_s.set(seconds)
    try:
        yield
    finally:
        _at_most_s.reset(token)


@contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests. Where the block ends, those that wait for a failing storage give up, and no more begin."""
    over = Event()
    pool = ThreadPoolExecutor(number, initializer=_over.set, initargs=(over,))
    try:
        yield pool
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)
