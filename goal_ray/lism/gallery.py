"""OUT/gallery.html: what came out of a run, on one page that loads nothing: its numbers, and pairs as pictures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from goal_ray.atomic import write_bytes
from goal_ray.config import to_text
from goal_ray.errors import ShardError
from goal_ray.events import say
from goal_ray.lism.counts import Bar, describe_quantiles, histogram_bars
from goal_ray.lism.groups import describe, storable_key
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.picks import ORDERS, Pick
from goal_ray.pages.pictures import Picture, draw_picture
from goal_ray.pages.render import render_page
from goal_ray.pairs import read_pairs
from goal_ray.storage import join
from goal_ray.tar_places import read_part

GALLERY_FILE = "gallery.html"
TITLES = {"random": "Random pairs", "best": "Most similar pairs", "worst": "Least similar pairs"}
KINDS_SHOWN = 20
# Of the histogram, on a screen too narrow for more: labels, and the signs of all bars' counts side by side.
LABELS_SHOWN = 7
SIGNS_SIDE_BY_SIDE = 50


@dataclass(frozen=True)
class Card:
    """A pair as shown: its picture, with its one sentence, and what made it, by its record; or else the problem."""

    pick: Pick
    picture: Picture | None = None
    made_by: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def draw_gallery(folder: OutputFolder, result: Mapping[str, Any]) -> str | None:
    """Writes the page about a run from its summary and the pairs to show, and returns its file name.

    What keeps it from being written is said on stderr, and is no error.
    """
    try:
        bars = histogram_bars(result["similarity_histogram"])
        cards = {name: [draw_card(folder, Pick(**pick)) for pick in result["picks"][name]] for name in ORDERS}
        page = render_page(
            "lism/gallery.html.j2",
            folder=folder.url,
            result=result,
            sections=[(name, TITLES[name], cards[name]) for name in ORDERS],
            made_by=all_values([card.made_by for shown in cards.values() for card in shown]),
            wall_time=timedelta(seconds=round(result["seconds"])),
            bars=bars,
            labelled=labelled(bars),
            upright=len(bars) * longest_count(bars) > SIGNS_SIDE_BY_SIDE,
            longest_count=longest_count(bars),
            quantiles=describe_quantiles(result),
            kinds=sorted(result["reasons"].items(), key=lambda item: (-item[1], item[0])),
            kinds_shown=KINDS_SHOWN,
        )
        write_bytes(join(folder.url, GALLERY_FILE), page)
    # The run is done, and its result must not be lost over a page, whatever the storage or a picture does to it.
    except Exception as error:
        say("lism", folder.url, f"no {GALLERY_FILE}: {describe(error)}")
        return None
    return GALLERY_FILE


def draw_card(folder: OutputFolder, pick: Pick) -> Card:
    """Reads and draws one pair."""
    try:
        sample = read_part(folder.tar(pick.shard), pick.offset_bytes, pick.size_bytes)
        if storable_key(sample.key) != pick.key:
            raise ShardError(f"{folder.tar(pick.shard)}: sample {sample.key!r} lies where {pick.key!r} was written")
        picture = draw_picture(sample, pick.shard, only=(pick.sentence, pick.region))
        return Card(pick, picture, dotted(read_pairs(sample, pick.shard).provenance))
    # Every storage has errors of its own; the other pairs can still be shown.
    except Exception as error:
        return Card(pick, problem=describe(error))


def dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Settings as a command line gives them: matcher.model.name -> ViT-L-14-336."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": to_text(value)}
    return found


def all_values(settings: Iterable[Mapping[str, str]]) -> dict[str, list[str]]:
    """Each setting with its values, in the order in which they first appear."""
    found: dict[str, list[str]] = {}
    for each in settings:
        for key, value in each.items():
            if value not in found.setdefault(key, []):
                found[key].append(value)
    return found


def labelled(bars: list[Bar]) -> list[bool]:
    """Which bars keep their label where only some LABELS_SHOWN have room: those that begin at a round number."""
    every = next((every for every in (1, 2) if len(bars) <= every * LABELS_SHOWN), 5)
    return [round(bar.low / (bar.high - bar.low)) % every == 0 for bar in bars]


def longest_count(bars: list[Bar]) -> int:
    """The signs of the longest count over a bar."""
    return max((len(f"{bar.count:,}") for bar in bars), default=0)
