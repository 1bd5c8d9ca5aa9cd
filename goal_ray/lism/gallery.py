"""OUT/gallery.html: what came out of a run, on one page that loads nothing: its numbers, and pairs as pictures."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from goal_ray.errors import ShardError
from goal_ray.lism.groups import describe, printable
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.picks import ORDERS, Pick
from goal_ray.pages.pictures import Picture, draw_picture
from goal_ray.pages.render import render_page
from goal_ray.storage import join, write_bytes
from goal_ray.tar_places import read_part

GALLERY_FILE = "gallery.html"
TITLES = {"random": "Random pairs", "best": "Most similar pairs", "worst": "Least similar pairs"}
KINDS_SHOWN = 20


@dataclass(frozen=True)
class Card:
    """A pair as shown: its picture, with its one sentence, or else the problem."""

    pick: Pick
    picture: Picture | None = None
    problem: str = ""


def draw_gallery(folder: OutputFolder, result: Mapping[str, Any]) -> str | None:
    """Writes the page about a run from its summary, and returns its file name.

    What keeps it from being written is said on stderr, and is no error.
    """
    try:
        page = render_page(
            "lism/gallery.html.j2",
            folder=folder.url,
            result=result,
            sections=[
                (name, TITLES[name], [draw_card(folder, Pick(**pick)) for pick in result["picks"][name]])
                for name in ORDERS
            ],
            bars=histogram_bars(result["similarity_histogram"]),
            kinds=sorted(result["reasons"].items(), key=lambda item: (-item[1], item[0])),
            kinds_shown=KINDS_SHOWN,
        )
        write_bytes(join(folder.url, GALLERY_FILE), page)
    # The run is done, and its result must not be lost over a page, whatever the storage or a picture does to it.
    except Exception as error:
        print(f"no {GALLERY_FILE}: {describe(error)}", file=sys.stderr)
        return None
    return GALLERY_FILE


def draw_card(folder: OutputFolder, pick: Pick) -> Card:
    """Reads and draws one pair."""
    try:
        sample = read_part(folder.tar(pick.shard), pick.offset_bytes, pick.size_bytes)
        if printable(sample.key) != pick.key:
            raise ShardError(f"{folder.tar(pick.shard)}: sample {sample.key!r} lies where {pick.key!r} was written")
        return Card(pick, draw_picture(sample, pick.shard, only=(pick.sentence, pick.region)))
    # Every storage has errors of its own; the other pairs can still be shown.
    except Exception as error:
        return Card(pick, problem=describe(error))


@dataclass(frozen=True)
class Bar:
    """A bin of the histogram: from `low` to `high`, how many pairs, and the bar's height, of 1."""

    low: float
    high: float
    count: int
    height: float


def histogram_bars(histogram: list[int]) -> list[Bar]:
    """The bins from the first to the last that is not empty."""
    filled = [number for number, count in enumerate(histogram) if count]
    if not filled:
        return []
    most, width = max(histogram), 2 / len(histogram)
    return [
        Bar(-1 + number * width, -1 + (number + 1) * width, histogram[number], histogram[number] / most)
        for number in range(filled[0], filled[-1] + 1)
    ]
