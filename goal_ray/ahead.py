"""Reading ahead, in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from goal_ray import patience

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    work: Callable[[Item], Result], items: Iterable[Item], ahead: int, threads: int = 16
) -> Iterator[Result]:
    """The results in the items' order; threads work on so many items ahead, which hides the time that a storage takes.

    Raises what `work` raises when the results before it are taken, and what `items` raises at once.
    """
    waiting: deque[Future[Result]] = deque()
    with patience.threads(threads) as pool:  # who takes no more need not wait for all that was begun
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
