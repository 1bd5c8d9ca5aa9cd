"""The Ray Data pipeline: read and decode (CPU tasks) → propose (actors) → match (actors), in no fixed order.

What travels is a group: a few consecutive samples of one shard, as one row of the dataset and one block of its own.
Which samples are batched together therefore depends on the shard alone, not on actors, timing or an earlier
interruption, and so do the last digits of floats; and a group is small enough to bound the memory of every stage.
"""

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from goal_ray.errors import CaptionError, GoalRayError, ShardError, StageError
from goal_ray.images import decode_image, shrink
from goal_ray.lism.config import LismConfig
from goal_ray.lism.matching import Matcher, MatchTask
from goal_ray.lism.strikes import GROUP_DEATHS, START_DEATHS, AnyStrikes, ReadingWatch, SharedStrikes, fatal
from goal_ray.lism.time_limit import run_within
from goal_ray.lism.work import Work
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.ray_session import quiet_ray_data
from goal_ray.regions import Regions, usable
from goal_ray.tars import Sample, shard_name, stream_samples
from goal_ray.text import split_sentences
from goal_ray.timing import measure

GROUP_BYTES = 128 * 2**20  # of pixels; a block holds one group


class WorkerLost(StageError):
    """A process of the pipeline died: killed for memory, crashed in native code, gone with its node."""


@dataclass(frozen=True)
class Problem:
    """Why a sample cannot be used: the stage that found out, and the reason for people."""

    stage: str
    reason: str


@dataclass(frozen=True)
class Item:
    """A sample on its way; one with a problem passes every later stage untouched.

    number       counts the samples of the shard from 0
    key          its key, printable
    size_bytes   of its members in the tar
    sentences    character offsets into the caption
    size         (W, H) of the stored picture
    picture_HW3  the working picture, RGB uint8, from decoding to matching
    regions      on the working picture, from proposing to matching
    record       pairs.json, in the end
    """

    number: int
    key: str
    size_bytes: int = 0
    problem: Problem | None = None
    caption: str = ""
    sentences: tuple[tuple[int, int], ...] = ()
    size: tuple[int, int] = (0, 0)
    picture_HW3: np.ndarray | None = None
    regions: Regions | None = None
    record: bytes = b""

    def failed(self, stage: str, error: Exception) -> "Item":
        """The item as the quarantine will record it."""
        return Item(self.number, self.key, self.size_bytes, Problem(stage, describe(error)))


def describe(error: Exception) -> str:
    """An error for people: its message, with its type unless that is one of ours."""
    return str(error) if isinstance(error, GoalRayError) else f"{type(error).__name__}: {error}"


Stage = Callable[[list[Item]], list[Item]]


@dataclass(frozen=True)
class Group:
    """Consecutive samples of shard number `shard`.

    count    of all its samples, in its last group
    failure  what makes the whole run impossible (storage fails, a model does not load). It travels here, since Ray Data
             would bury it in tracebacks, and start the actor again.
    work     what the stages took for it so far; no part of what the group is
    """

    shard: int
    items: list[Item]
    count: int | None = None
    failure: str = ""
    work: tuple[Work, ...] = field(default=(), compare=False)

    def to_row(self) -> dict[str, bytes]:
        """The group as a row of a dataset."""
        return {"group": pickle.dumps(self, protocol=5)}

    @staticmethod
    def from_row(row: dict[str, bytes]) -> "Group":
        """The group in a row."""
        return pickle.loads(row["group"])


@dataclass(frozen=True)
class Selection:
    """Samples of a shard: those with one of these numbers, and all from a number on."""

    numbers: frozenset[int]
    onwards: float = math.inf

    def __contains__(self, number: int) -> bool:
        return number in self.numbers or number >= self.onwards


ALL = Selection(frozenset(), 0)


def stream_groups(
    shards: Sequence[str],
    selected: Mapping[int, Selection],
    config: LismConfig,
    provenance: dict[str, Any],
    use_gpu: bool,
) -> Iterator[Group]:
    """Runs the pipeline over shards; every sample of them comes back once, with a record or a problem.

    selected  shard number -> the samples of it that are wanted, where that is not all

    Raises StageError where the run cannot go on, WorkerLost where another attempt may.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy
    from ray.exceptions import RayError
    from ray.util.annotations import RayDeprecationWarning

    quiet_ray_data(preserve_order=False)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say is in the StageError
    device = "cuda" if use_gpu else "cpu"
    resources: dict[str, Any] = {"num_gpus": config.gpus_per_actor} if use_gpu else {"num_cpus": 1}
    # Ray Data starts dead actors and tasks again without end; `Strikes` ends that for a sample that kills each of them.
    strikes = SharedStrikes.start()
    items = [{"shard": number, "url": url} for number, url in enumerate(shards)]
    reader = partial(read_rows, selected=selected, config=config, strikes=strikes)
    # Any, since `map` is typed for functions only. A task that hands the shards on one by one spares the driver a block
    # for each of them, which took it a second per thousand before anything began.
    groups: Any = ray.data.from_items(items, override_num_blocks=1).map(hand_on, num_cpus=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # The default, said, since Ray Data would read inside the first actors if all options were the same.
        groups = groups.flat_map(reader, compute=TaskPoolStrategy(config.readers), max_retries=-1)
    limit_s = config.max_seconds_per_image
    propose = partial(StageWorker, "propose", partial(ProposeRegions, config, device), limit_s, strikes)
    match = partial(StageWorker, "match", partial(MatchSentences, config, provenance, device), limit_s, strikes)
    apart = [([propose], config.proposer_actors), ([match], config.matcher_actors)]
    dataset = groups
    for stages, (least, most) in [([propose, match], config.proposer_actors)] if config.fused else apart:
        pool = ActorPoolStrategy(min_size=least, max_size=most)
        dataset = dataset.map(StageActor, fn_constructor_args=stages, compute=pool, **resources)
    dataset.context.target_max_block_size = 1  # every row fills a block
    try:
        for row in dataset.iter_rows():
            group = Group.from_row(row)
            if group.failure:
                raise StageError(f"{group.failure}; mend it and run the same command again, it goes on")
            yield group
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkerLost(f"a worker died: {reason}; run the same command again, it goes on") from error


def hand_on(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a block of its own."""
    return row


def read_rows(
    row: dict[str, Any], selected: Mapping[int, Selection], config: LismConfig, strikes: AnyStrikes
) -> Iterator[dict[str, bytes]]:
    """`read_groups`, for Ray Data."""
    groups = read_groups(row["shard"], row["url"], config, strikes, selected.get(row["shard"], ALL))
    return (group.to_row() for group in measure_reading(groups))


def read_groups(
    shard: int, url: str, config: LismConfig, strikes: AnyStrikes, selection: Selection = ALL
) -> Iterator[Group]:
    """The decoded samples of a tar: at most `images_per_batch` a group, and about GROUP_BYTES of pixels."""
    held: list[Item] = []
    held_bytes = count = 0
    watch = ReadingWatch(strikes, shard, config.images_per_batch)
    try:
        for item in read_items(url, config, watch, selection):
            if len(held) == config.images_per_batch or held_bytes > GROUP_BYTES:
                yield Group(shard, held)
                held, held_bytes = [], 0
            held.append(item)
            count += 1
            held_bytes += 0 if item.picture_HW3 is None else item.picture_HW3.nbytes
        yield Group(shard, held, count)
    # Every storage has errors of its own. None of them says anything against the tar.
    except Exception as error:
        yield Group(shard, [], failure=f"{url} cannot be read: {describe(error)}")
    finally:
        watch.end()


def measure_reading(groups: Iterator[Group]) -> Iterator[Group]:
    """The groups with the work of making each; the time in which nobody asks for one does not count."""
    while True:
        with measure("read") as seconds:
            group = next(groups, None)
        if group is None:
            return
        yield replace(group, work=(Work.done_here("read", len(group.items), seconds),))


def read_items(url: str, config: LismConfig, watch: ReadingWatch, selection: Selection) -> Iterator[Item]:
    """The selected samples of a tar, decoded; the damaged end of a tar, and an empty tar, count as a bad sample.

    Raises whatever the storage raises, and ShardError for damage where the tar was whole when the selection was made.
    """
    number = 0
    try:
        for sample in stream_samples(url, lambda number: number in selection and watch.begin(number)):
            item = Item(number, printable(sample.key), sum(map(len, sample.members.values())))
            if number in watch.left_out:
                yield item.failed("decode", fatal())
            elif number in selection:
                yield decode(item, sample, config)
            number += 1
    except ShardError as error:
        if number not in selection:
            raise
        yield Item(number, printable(error.key)).failed("read", error)
        return
    if not number:
        yield Item(0, "").failed("read", ShardError(f"{shard_name(url)} holds no sample"))


def printable(key: str) -> str:
    """A key with the bytes that are not UTF-8 (tarfile's surrogates) as escapes, so that it can be stored as text."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decode(item: Item, sample: Sample, config: LismConfig) -> Item:
    """Fills in caption, sentences and picture, or the problem."""
    try:
        return run_within(config.max_seconds_per_image, partial(decoded, item, sample, config))
    except Exception as error:
        return item.failed("decode", error)


def decoded(item: Item, sample: Sample, config: LismConfig) -> Item:
    """The item with caption, sentences and picture. Raises what is wrong with them."""
    caption = sample.caption()
    sentences = tuple(split_sentences(caption, config.language))
    if not sentences:
        raise CaptionError(f"caption of sample {item.key!r} holds no sentence, only {caption.strip()[:40]!r}")
    image = decode_image(sample.image_bytes(), config.max_pixels)
    picture_HW3 = np.asarray(shrink(image, config.max_side_px))
    return replace(item, caption=caption, sentences=sentences, size=image.size, picture_HW3=picture_HW3)


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
        try:
            if strikes.begin(*start) > START_DEATHS:
                raise fatal()
            self.work = build()
        except Exception as error:
            self.failure = f"cannot start to {stage}: {describe(error)}"
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
        """The stage's work on all items; where that fails or was fatal, on one after the other, to find the culprit.

        This is the one place that catches everything: a sample that breaks a model must not break the run.
        """
        work = self.stage, shard, items[0].number
        fatal_before = self.strikes.begin(*work)
        try:
            if fatal_before >= GROUP_DEATHS:
                return [self.apply_alone(shard, item) for item in items]
            try:
                return run_within(self.limit_s * len(items), partial(self.work, items))
            except Exception:
                return [self.apply_to_one(item) for item in items]
        finally:
            self.strikes.end(*work)

    def apply_alone(self, shard: int, item: Item) -> Item:
        """The stage's work on an item of a group that was fatal: registered, and left out where it is the culprit."""
        work = f"{self.stage} alone", shard, item.number
        fatal_before = self.strikes.begin(*work)
        done = item.failed(self.stage, fatal()) if fatal_before else self.apply_to_one(item)
        self.strikes.end(*work)
        return done

    def apply_to_one(self, item: Item) -> Item:
        """The stage's work on one item."""
        try:
            return run_within(self.limit_s, partial(self.work, [item]))[0]
        except Exception as error:
            return item.failed(self.stage, error)


class ProposeRegions:
    """Stage: adds `regions`, filtered by area."""

    def __init__(self, config: LismConfig, device: str):
        self.limits = config.min_area, config.max_area
        self.proposer = config.proposer.build(device)

    def __call__(self, items: list[Item]) -> list[Item]:
        pictures = [item.picture_HW3 for item in items if item.picture_HW3 is not None]
        found = zip(items, pictures, self.proposer.propose(pictures), strict=True)
        return [
            replace(item, regions=usable(regions, (picture.shape[1], picture.shape[0]), *self.limits))
            for item, picture, regions in found
        ]


class MatchSentences:
    """Stage: replaces picture and regions by `record`; all crops and sentences go through the model together."""

    def __init__(self, config: LismConfig, provenance: dict[str, Any], device: str):
        self.provenance = provenance
        self.matcher = Matcher(config.matcher, device)

    def __call__(self, items: list[Item]) -> list[Item]:
        matched = zip(items, self.matcher.match([as_task(item) for item in items]), strict=True)
        return [
            Item(item.number, item.key, item.size_bytes, record=self.record(item, pairs)) for item, pairs in matched
        ]

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


def as_task(item: Item) -> MatchTask:
    """What the matcher sees of an item: the whole picture is the first of its candidates."""
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
