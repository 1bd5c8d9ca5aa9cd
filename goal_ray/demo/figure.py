"""`python -m goal_ray.demo.figure PAIRED OUT.svg`: pictures with their regions and sentences as one figure."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from goal_ray.cli import parser, run_main
from goal_ray.errors import ConfigError, StageError
from goal_ray.pages.pictures import Line, Picture, draw_picture
from goal_ray.pages.render import render_page
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import PAIRS_EXTENSION, stream_samples

DESCRIPTION = """Draw the first samples of paired tars as an SVG that loads nothing: each picture with its regions, and
beside it its sentences, with the similarity to their region."""
LETTERS = 66
LINE_PX, GAP_PX, PICTURE_PX = 21, 12, 330


@dataclass(frozen=True)
class Sentence:
    """A sentence in lines that fit · the top of its first line in its row, in pixels."""

    line: Line
    rows: list[str]
    top: int


@dataclass(frozen=True)
class Row:
    """A picture with its sentences · its top and height, in pixels of the figure."""

    picture: Picture
    sentences: list[Sentence]
    top: int
    height: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, draws, writes."""
    example = "python -m goal_ray.demo.figure demo/seed-0/paired pairs.svg"
    places = {"PAIRED": "paired tars, or their folder", "OUT": "SVG file"}
    command = parser("figure", DESCRIPTION, example, places, prog="python -m goal_ray.demo.figure")
    command.add_argument("--samples", type=int, default=2, help="how many (default: %(default)s)")
    options = command.parse_args(arguments)
    if options.samples < 1:
        raise ConfigError(f"--samples must be at least 1, not {options.samples}")
    url = expand_shards(options.paired)[0]
    samples = [each for each in islice(stream_samples(url), options.samples) if PAIRS_EXTENSION in each.members]
    if not samples:
        raise StageError(f"{url}: no pairs in its first samples; give tars that `goal-ray lism` wrote")
    pictures = [draw_picture(sample, url) for sample in samples]
    Path(options.out).write_bytes(draw_figure(pictures))


def draw_figure(pictures: Sequence[Picture]) -> bytes:
    """The SVG file."""
    rows: list[Row] = []
    for picture in pictures:
        top = GAP_PX + (rows[-1].top + rows[-1].height if rows else 0)
        sentences: list[Sentence] = []
        end = 0
        for line in picture.lines:
            wrapped = textwrap.wrap(line.text, LETTERS) or [""]
            sentences.append(Sentence(line, wrapped, end))
            end += LINE_PX * len(wrapped) + GAP_PX
        drawn_px = round(PICTURE_PX * picture.height / picture.width)
        rows.append(Row(picture, sentences, top, max(end, drawn_px)))
    return render_page(
        "demo/figure.svg.j2",
        rows=rows,
        height=rows[-1].top + rows[-1].height + GAP_PX,
        line_px=LINE_PX,
        gap_px=GAP_PX,
        picture_px=PICTURE_PX,
    )


if __name__ == "__main__":
    run_main(main)
