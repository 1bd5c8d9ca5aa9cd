"""Prometheus metrics of a LISM run, through Ray: every node's agent serves them at its metrics export port.

Prometheus shows them with Ray's prefix, and counters with an ending: `ray_goal_ray_lism_images_total`. Each has the tag
`output`, the output folder. They count what this run does, from 0:

    goal_ray_lism_images            samples that came through all stages, those for the quarantine too
    goal_ray_lism_quarantined       samples left out; tag `stage`: read, decode, propose, match
    goal_ray_lism_pairs             pairs in the tars written
    goal_ray_lism_shards_done       shards written
    goal_ray_lism_busy_seconds      seconds of work of all workers; tag `phase`: read, encode, propose, match, write
    goal_ray_lism_images_per_second lately, as the live view shows it (a gauge); there only while a run is on
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from goal_ray.lism.work import Work

PREFIX = "goal_ray_lism_"


class Metrics:
    """The metrics, in a process that is connected to Ray. output: the output folder."""

    def __init__(self, output: str):
        from ray.util import metrics

        def make(kind: type, name: str, description: str, *tags: str) -> Any:
            metric = kind(PREFIX + name, description, tag_keys=("output", *tags))
            metric.set_default_tags({"output": output})
            return metric

        self.images = make(metrics.Counter, "images", "samples through all stages")
        self.quarantined = make(metrics.Counter, "quarantined", "samples left out", "stage")
        self.pairs = make(metrics.Counter, "pairs", "pairs in the tars written")
        self.shards_done = make(metrics.Counter, "shards_done", "shards written")
        self.busy_seconds = make(metrics.Counter, "busy_seconds", "seconds of work of all workers", "phase")
        self.images_per_second = make(metrics.Gauge, "images_per_second", "images through all stages, lately")

    def group(self, images: int, bad_stages: Sequence[str], work: Sequence[Work]) -> None:
        """A group is through; see `Progress.passed`."""
        add(self.images, images)
        for stage, count in Counter(bad_stages).items():
            add(self.quarantined, count, stage=stage)
        for each in work:
            self._busy(each)

    def shard(self, pairs: int, work: Work) -> None:
        """A shard is written."""
        add(self.shards_done, 1)
        add(self.pairs, pairs)
        self._busy(work)

    def speed(self, images_per_s: float) -> None:
        """How fast the run is now; to be said every few seconds."""
        self.images_per_second.set(images_per_s)

    def _busy(self, work: Work) -> None:
        for phase, seconds in work.seconds.items():
            add(self.busy_seconds, seconds, phase=phase)


def add(counter: Any, amount: float, **tags: str) -> None:
    """Counts; Ray refuses to count nothing."""
    if amount > 0:
        counter.inc(amount, tags)
