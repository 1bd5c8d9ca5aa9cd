"""From a tar to groups of decoded samples."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from goal_ray.errors import CaptionError, ShardError
from goal_ray.images import decode_image, shrink
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item, describe, storable_key
from goal_ray.lism.strikes import AnyStrikes, ReadingWatch, fatal
from goal_ray.lism.time_limit import run_within
from goal_ray.lism.work import Work
from goal_ray.sentences import split_sentences
from goal_ray.shard_urls import shard_name
from goal_ray.tars import TWO_PLACES, Sample, stream_samples
from goal_ray.timing import measure

GROUP_BYTES = 128 * 2**20  # of pixels; a block holds one group


@dataclass(frozen=True)
class Selection:
    """Samples of a shard: those with one of these numbers, and all from a number on."""

    numbers: frozenset[int]
    onwards: float = math.inf

    def __contains__(self, number: int) -> bool:
        return number in self.numbers or number >= self.onwards


ALL = Selection(frozenset(), 0)


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
    # Hashes of the keys, also of samples that are not selected: what is bad does not depend on the selection.
    seen: set[int] = set()
    try:
        for sample in stream_samples(url, lambda number: number in selection and watch.begin(number)):
            key = hash(sample.key)
            item = Item(number, storable_key(sample.key), sum(map(len, sample.members.values())))
            if number in watch.left_out:
                yield item.failed("decode", fatal())
            elif number in selection:
                twice = key in seen
                yield item.failed("decode", ShardError(TWO_PLACES)) if twice else decode(item, sample, config)
            seen.add(key)
            number += 1
    except ShardError as error:
        if number not in selection:
            raise
        yield Item(number, storable_key(error.key)).failed("read", error)
        return
    if not number:
        yield Item(0, "").failed("read", ShardError(f"{shard_name(url)} holds no sample"))


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
