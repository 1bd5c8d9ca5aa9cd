"""A sample of paired pictures with the region of every sentence."""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from goal_ray.errors import GoalRayError
from goal_ray.pages.pictures import Picture, draw_picture
from goal_ray.shard_urls import expand_shards, shard_name
from goal_ray.train.scan import ShardIndex, read_sample, scan_shard


@dataclass
class Gallery:
    """shards: where the pictures are from · skipped: reasons of the samples that were met but cannot be shown."""

    shards: str
    pictures: list[Picture] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


def draw_gallery(shards: str, images: int, seed: int) -> Gallery:
    """Draws `images` pictures of paired shards, fewer where there are not as many. Only those drawn are read.

    Raises ShardError where no shard is found; whatever is wrong with a shard or a sample is listed as skipped.
    """
    gallery = Gallery(shards)
    source = draw_samples(expand_shards(shards), random.Random(seed), gallery.skipped)
    while len(gallery.pictures) < images and (drawn := next(source, None)):
        url, index, number = drawn
        try:
            gallery.pictures.append(draw_picture(read_sample(url, index, number), shard_name(url)))
        except (GoalRayError, OSError) as error:
            gallery.skipped.append(str(error))
    return gallery


def draw_samples(urls: Sequence[str], rng: random.Random, skipped: list[str]) -> Iterator[tuple[str, ShardIndex, int]]:
    """Paired samples by tar and number, in a random order, one of each tar in turn: its headers are read then.

    Samples that cannot be used, and tars that cannot be read, go to `skipped`.
    """

    def shuffled(url: str) -> Iterator[tuple[str, ShardIndex, int]]:
        try:
            index = scan_shard(url, needs_pairs=True)
        except (GoalRayError, OSError) as error:
            skipped.append(str(error))
            return
        skipped.extend(f"{shard_name(url)}: {record['reason']}" for record in index.bad)
        yield from ((url, index, number) for number in rng.sample(range(len(index)), len(index)))

    waiting = deque(shuffled(url) for url in rng.sample(urls, len(urls)))
    while waiting:
        current = waiting.popleft()
        drawn = next(current, None)
        if drawn is not None:
            yield drawn
            waiting.append(current)
