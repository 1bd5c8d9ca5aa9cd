"""Work on many shards at once, in processes."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from goal_ray.cores import usable_cores
from goal_ray.errors import ConfigError, StageError
from goal_ray.progress import Progress

T = TypeVar("T")


def map_shards(
    work: Callable[[str], T], shards: Sequence[str], workers: int | None, title: str
) -> Iterator[tuple[str, T]]:
    """(shard, result) in the order of the shards, with a progress bar.

    work     runs in another process where there is more than one worker and one shard: it, its result and what it
             raises must be picklable
    workers  processes; None for one per core that may be used

    Raises what `work` raises, and StageError where a worker dies.
    """
    workers = min(usable_cores() if workers is None else workers, len(shards))
    if workers < 1:
        raise ConfigError("--workers must be at least 1")
    results = map(work, shards) if workers == 1 else in_processes(work, shards, workers)
    with Progress(title, "shard", len(shards)) as progress:
        for shard, result in zip(shards, results, strict=True):
            progress.add(1)
            yield shard, result


def in_processes(work: Callable[[str], T], shards: Sequence[str], workers: int) -> Iterator[T]:
    """The results in order. New processes, no forks: a fork would copy the locks of a storage's threads."""
    # Ctrl-C ends the workers, too, also those that wait for a storage, but without tracebacks.
    die = (signal.SIGINT, signal.SIG_DFL)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), signal.signal, die)
    try:
        yield from pool.map(work, shards)
    except BrokenProcessPool as error:
        raise StageError(f"a worker died, maybe for lack of memory; try fewer --workers ({error})") from None
    finally:
        pool.shutdown(cancel_futures=True)
