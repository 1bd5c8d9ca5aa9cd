"""What actors do with groups: propose regions, match sentences; and finding the sample that breaks them."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from goal_ray.lism import gpu
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item, describe
from goal_ray.lism.strikes import GROUP_DEATHS, START_DEATHS, AnyStrikes, fatal
from goal_ray.lism.time_limit import run_within
from goal_ray.lism.work import Work
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.regions import build_proposer, usable
from goal_ray.timing import measure

if TYPE_CHECKING:
    from goal_ray.lism.matching import MatchTask

Stage = Callable[[list[Item]], list[Item]]


class StageActor:
    """Actor: applies one or more stages, made where it lives, to the groups that reach it."""

    def __init__(self, *stages: "Callable[[], StageWorker]"):
        self.stages = [make() for make in stages]

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        group = Group.from_row(row)
        for stage in self.stages:
            group = stage(group)
        return group.to_row()


class StageWorker:
    """Applies a stage to groups, inside an actor, and finds out which of their samples it cannot work on.

    stage    its name in the quarantine
    build    loads what it needs; where that fails the actor stands, and fails its groups (see `Group.failure`)
    limit_s  seconds for each sample
    strikes  knows which work was fatal to the worker before
    """

    def __init__(self, stage: str, build: Callable[[], Stage], limit_s: float, strikes: AnyStrikes):
        self.stage = stage
        self.limit_s = limit_s
        self.strikes = strikes
        self.failure = ""
        start = f"start to {stage}", strikes.place
        fatal_before = strikes.begin(*start)
        try:
            if fatal_before > START_DEATHS:
                raise fatal()
            self.work = build()
        except Exception as error:
            # Such as a GPU that another process fills: no reason to end the run, in which other actors may work well.
            if gpu.is_gpu_error(error) and fatal_before < START_DEATHS:
                gpu.end_process(f"cannot start to {stage}: {describe(error)}")
            self.failure = f"cannot start to {stage}: {gpu.explained(error)}"
        strikes.end(*start)

    def __call__(self, group: Group) -> Group:
        with measure(self.stage) as seconds:
            failure = group.failure or self.failure
            if failure:
                return Group(group.shard, [], failure=failure)
            good = [item for item in group.items if item.problem is None]
            done = {item.number: item for item in (self.apply(group.shard, good) if good else [])}
        items = [done.get(item.number, item) for item in group.items]
        work = (*group.work, Work.done_here(self.stage, len(good), seconds))
        return replace(group, items=items, work=work)

    def apply(self, shard: int, items: list[Item]) -> list[Item]:
        """The stage's work on all items; where that was fatal, on one after the other, to find the culprit."""
        work = self.stage, shard, items[0].number
        fatal_before = self.strikes.begin(*work)
        try:
            if fatal_before >= GROUP_DEATHS:
                return [self.apply_alone(shard, item) for item in items]
            return self.apply_to(items)
        finally:
            self.strikes.end(*work)

    def apply_alone(self, shard: int, item: Item) -> Item:
        """The stage's work on an item of a group that was fatal: registered, and left out where it is the culprit."""
        work = f"{self.stage} alone", shard, item.number
        fatal_before = self.strikes.begin(*work)
        done = item.failed(self.stage, fatal()) if fatal_before else self.apply_to([item])[0]
        self.strikes.end(*work)
        return done

    def apply_to(self, items: list[Item]) -> list[Item]:
        """The stage's work on items; where it fails, on fewer of them, down to the one to leave out.

        Where the GPU is full the stage's model takes less at once, and goes on so where that helped.
        This is the one place that catches everything: a sample that breaks a model must not break the run. Nor must
        one too large for the GPU's memory: an error of the run would come back each time that it is tried again, while
        the quarantine says what to change, and `--retry-quarantined` does it then.
        """
        model: Any = getattr(self.work, "model", self.work)  # a stage may be a plain function
        before = getattr(model, "at_once", ())
        for at_once in halvings(before):
            model.at_once = at_once
            try:
                done = run_within(self.limit_s * len(items), partial(self.work, items))
            except Exception as error:
                problem = gpu.explained(error)
                full = gpu.is_out_of_memory(error)
            else:
                if at_once != before:
                    text = f"{self.stage}: out of GPU memory, with less at once from now on"
                    print(text, file=sys.stderr, flush=True)
                return done
            # Out here, since the error's traceback holds all tensors of the failed attempt.
            gpu.recover(self.limit_s)
            if not full:
                break
        # One picture that never fits must not slow down all that come after it.
        model.at_once = before
        fewer = (len(items) + 1) // 2 if full else 1
        if len(items) == 1:
            return [items[0].failed(self.stage, problem)]
        parts = (items[start : start + fewer] for start in range(0, len(items), fewer))
        return [done for part in parts for done in self.apply_to(part)]


def halvings(at_once: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """What to try in turn on a GPU that may be full: all, then half of the first number, down to one, then the next."""
    yield at_once
    for place in range(len(at_once)):
        while at_once[place] > 1:
            at_once = (*at_once[:place], at_once[place] // 2, *at_once[place + 1 :])
            yield at_once


class ProposeRegions:
    """Stage: adds `regions`, filtered by area."""

    def __init__(self, config: LismConfig, device: str):
        # `usable` takes it: loaded here, its seconds are no picture's, in the summary or against the limit.
        import torchvision.ops  # noqa: F401

        gpu.limit_memory(device, config.gpus_per_actor)
        self.limits = config.min_area, config.max_area
        self.model = build_proposer(config.proposer, device)

    def __call__(self, items: list[Item]) -> list[Item]:
        pictures = [item.picture_HW3 for item in items if item.picture_HW3 is not None]
        found = zip(items, pictures, self.model.propose(pictures), strict=True)
        return [
            replace(item, regions=usable(regions, (picture.shape[1], picture.shape[0]), *self.limits))
            for item, picture, regions in found
        ]


class MatchSentences:
    """Stage: replaces picture and regions by the record; all crops and sentences go through the model together."""

    def __init__(self, config: LismConfig, provenance: dict[str, Any], device: str):
        # Here, where the model lives: the driver and the proposers have no use for open_clip.
        from goal_ray.lism.matching import Matcher

        gpu.limit_memory(device, config.gpus_per_actor)
        self.provenance = provenance
        self.model = Matcher(config.matcher, device)

    def __call__(self, items: list[Item]) -> list[Item]:
        matched = zip(items, self.model.match([as_task(item) for item in items]), strict=True)
        return [item.done(self.record(item, pairs)) for item, pairs in matched]

    def record(self, item: Item, pairs: list[Pair]) -> bytes:
        """The pairs.json of an item, its boxes in pixels of the stored picture."""
        assert item.picture_HW3 is not None
        assert item.regions is not None
        (width, height), (shown_height, shown_width) = item.size, item.picture_HW3.shape[:2]
        scale = (width / shown_width, height / shown_height)
        whole = Region((0.0, 0.0, float(width), float(height)), 1.0, "image")
        found = (item.regions.boxes_px, item.regions.scores, item.regions.sources)
        regions = [
            Region(scale_box(box, scale, item.size), score, source)
            for box, score, source in zip(*(array.tolist() for array in found), strict=True)
        ]
        return PairRecord(item.size, item.sentences, (whole, *regions), tuple(pairs), self.provenance).to_bytes()


def as_task(item: Item) -> "MatchTask":
    """What the matcher sees of an item: the whole picture is the first of its candidates."""
    from goal_ray.lism.matching import MatchTask

    assert item.picture_HW3 is not None
    assert item.regions is not None
    height, width = item.picture_HW3.shape[:2]
    boxes_px_R4 = np.concatenate([np.array([[0, 0, width, height]], np.float32), item.regions.boxes_px])
    return MatchTask(item.picture_HW3, boxes_px_R4, [item.caption[start:end] for start, end in item.sentences])


def scale_box(
    box: Sequence[float], scale: tuple[float, float], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """A box on the working picture, in pixels of the stored one."""
    x0, y0, x1, y1 = box
    return (x0 * scale[0], y0 * scale[1], min(x1 * scale[0], size[0]), min(y1 * scale[1], size[1]))
