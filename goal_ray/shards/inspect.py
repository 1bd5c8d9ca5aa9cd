"""What is in shards, told from the headers of the tars, and of a sample of captions and pictures."""

import textwrap
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from typing import Any

import numpy as np

from goal_ray.ahead import read_ahead
from goal_ray.cli import printable
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.images import format_name, open_picture, upright_size
from goal_ray.shard_urls import expand_shards, shard_name
from goal_ray.shards.workers import map_shards
from goal_ray.storage import read_range, size_bytes
from goal_ray.tar_places import SampleIndex, index_shard
from goal_ray.tars import CAPTION_EXTENSION, PAIRS_EXTENSION, Sample, image_extension

_SAMPLE = 300
_EXAMPLES = 3
_HEADER_BYTES = 65_536


@dataclass
class Contents:
    """What the headers of one tar tell; of a damaged one, only that."""

    shard: str
    size_bytes: int
    samples: int = 0
    paired: int = 0
    members: Counter[str] = field(default_factory=Counter)
    damage: str | None = None
    drawn: list[tuple[float, str, SampleIndex]] = field(default_factory=list)


@dataclass(frozen=True)
class Read:
    """What was read of one sample: its caption, and its picture's size in pixels; None for what cannot be read."""

    key: str
    caption: str | None
    size_px: tuple[int, int] | None


def shard_contents(shard: str) -> Contents:
    """Counts what is in a tar, and draws samples of which a part of the whole draw may come."""
    found = Contents(shard_name(shard), size_bytes(shard))
    try:
        index = index_shard(shard)
    except ShardError as error:
        found.damage = str(error).removeprefix(f"{shard}: ")
        return found
    found.samples = len(index)
    for sample in index:
        found.members.update([*sample.members, *sample.repeated])
        found.paired += PAIRS_EXTENSION in sample.members
    lots = np.random.default_rng(zlib.crc32(found.shard.encode("utf-8", "surrogatepass"))).random(len(index))
    found.drawn = [(lots[row], shard, index[row]) for row in np.argsort(lots)[:_SAMPLE]]
    return found


def read_drawn(drawn: tuple[float, str, SampleIndex]) -> Read:
    """Reads a sample's caption and as much of its picture as its size takes."""
    _, shard, entry = drawn
    caption = size = None
    if CAPTION_EXTENSION in entry.members:
        data = read_range(shard, *entry.members[CAPTION_EXTENSION])
        try:
            caption = Sample(entry.key, {CAPTION_EXTENSION: data}).caption()
        except CaptionError:
            caption = None
    try:
        offset, length = entry.members[image_extension(entry.key, entry.members, entry.repeated)]
        size = picture_size(shard, offset, length)
    except (ShardError, ImageError):
        size = None
    return Read(entry.key, caption, size)


def picture_size(shard: str, offset: int, length: int) -> tuple[int, int]:
    """The picture's size in pixels, from its first bytes where these are enough. Raises ImageError."""
    some = min(length, _HEADER_BYTES)
    head = read_range(shard, offset, some)
    # EXIF that stands behind a PNG's pixels is only found by decoding them.
    if format_name(head) == "PNG" and b"eXIf" in read_range(shard, offset + length - some, some):
        return open_picture(read_range(shard, offset, length)).size
    try:
        return upright_size(head)
    except ImageError:
        if length <= _HEADER_BYTES:
            raise
        return upright_size(read_range(shard, offset, length))


def inspect_shards(spec: str, workers: int | None) -> dict[str, Any]:
    """All that `goal-ray shards inspect` shows, as plain values; damaged tars are named and not counted.

    Raises ShardError where there are no shards.
    """
    rows, drawn = [], list[tuple[float, str, SampleIndex]]()
    for _, contents in map_shards(shard_contents, expand_shards(spec), workers, "headers"):
        drawn = nsmallest(_SAMPLE, [*drawn, *contents.drawn], key=lambda lot: lot[:2])
        contents.drawn = []
        rows.append(contents)
    read = list(read_ahead(read_drawn, sorted(drawn, key=lambda lot: (lot[1], lot[2].key)), ahead=32))
    captions = [one.caption for one in read if one.caption is not None]
    sizes = [one.size_px for one in read if one.size_px is not None]
    members = sum((row.members for row in rows), Counter[str]())
    return {
        "shards": [
            {name: value for name, value in vars(row).items() if name != "drawn"} | {"members": dict(row.members)}
            for row in rows
        ],
        "total": {
            "shards": len(rows),
            "damaged": sum(row.damage is not None for row in rows),
            "samples": sum(row.samples for row in rows),
            "paired": sum(row.paired for row in rows),
            "size_bytes": sum(row.size_bytes for row in rows),
            "members": dict(members),
        },
        "sampled": len(read),
        "caption_chars": spread_of([len(caption) for caption in captions]),
        "caption_words": spread_of([len(caption.split()) for caption in captions]),
        "picture_width_px": spread_of([width for width, _ in sizes]),
        "picture_height_px": spread_of([height for _, height in sizes]),
        "examples": [{"key": one.key, "caption": one.caption} for one in read if one.caption is not None][:_EXAMPLES],
    }


def spread_of(values: Sequence[int]) -> dict[str, float] | None:
    """Count, least, 5 %, median, mean, 95 % and most of some numbers; None for none."""
    if not values:
        return None
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "count": len(values),
        "min": min(values),
        "p5": float(low),
        "median": float(middle),
        "mean": float(np.mean(values)),
        "p95": float(high),
        "max": max(values),
    }


def print_contents(found: dict[str, Any]) -> None:
    """Prints what `inspect_shards` found as a table for people."""
    total = found["total"]
    rows = [(row["shard"], row) for row in found["shards"]] + [(f"all {total['shards']}", total)]
    width = max(len(printable(name)) for name, _ in rows)
    print(f"{'shard':<{width}} {'samples':>9} {'MB':>9} {'paired':>9}  members")
    for name, row in rows:
        damage = row.get("damage")
        members = ", ".join(f"{extension} {count}" for extension, count in sorted(row["members"].items()))
        counts = f"{row['samples']:>9} {row['size_bytes'] / 1e6:>9.1f} {row['paired']:>9}"
        print(f"{printable(name):<{width}} {counts}  {members if damage is None else 'DAMAGED: ' + damage}")
    if total["damaged"]:
        print(f"{total['damaged']} damaged, not counted: `goal-ray shards validate` tells more")
    share = "all" if found["sampled"] == total["samples"] else f"{found['sampled']} drawn at random"
    print(f"\nof {total['samples']} samples, {share}:")
    titles = {
        "caption_chars": "caption, characters",
        "caption_words": "caption, words",
        "picture_width_px": "picture, width px",
        "picture_height_px": "picture, height px",
    }
    print(f"{'':<20} {'read':>6} {'least':>7} {'5 %':>7} {'median':>7} {'mean':>7} {'95 %':>7} {'most':>7}")
    for name, title in titles.items():
        if found[name] is not None:
            count, *values = found[name].values()
            print(f"{title:<20} {count:>6} {' '.join(f'{value:>7.0f}' for value in values)}")
    for example in found["examples"]:
        start = textwrap.shorten(example["caption"], 90, placeholder=" …")
        print(f"\n{printable(example['key'])}\n  {printable(start)}")
