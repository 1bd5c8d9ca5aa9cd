"""Pictures with the regions of their sentences, ready for a page: `pictures.html.j2` shows them."""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from goal_ray.errors import ShardError
from goal_ray.images import decode_image, shrink
from goal_ray.pages.colours import colour
from goal_ray.pairs import best_pairs, read_pairs
from goal_ray.tars import Sample

MAX_SIDE_PX = 560
VIEW_SIDE = 1000.0
LABEL_RADIUS = 26.0
WHOLE_IMAGE = "image"

Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Box:
    """A region as drawn, in units of the view: x, y, width, height · number, from 1, and the centre of its label."""

    x: float
    y: float
    width: float
    height: float
    number: int
    label: tuple[float, float]
    colour: str


@dataclass(frozen=True)
class Line:
    """A sentence · similarity to its region, None without a pair · box, None without a pair or for the whole image."""

    text: str
    similarity: float | None
    box: Box | None


@dataclass(frozen=True)
class Picture:
    """A sample as drawn: width, height of the view, whose longer side is VIEW_SIDE · uri: the shrunk picture itself."""

    key: str
    shard: str
    width: float
    height: float
    uri: str
    boxes: list[Box]
    lines: list[Line]


def draw_picture(sample: Sample, shard: str, only: tuple[int, int] | None = None) -> Picture:
    """One sample. Regions are numbered and coloured in the order in which the caption speaks of them.

    only  (sentence, region) of the one pair to show; else every sentence is shown, with its best pair

    Raises GoalRayError for a sample that breaks the contract, or lacks the pair.
    """
    image, caption, where = decode_image(sample.image_bytes()), sample.caption(), f"{shard}: {sample.key}"
    record = read_pairs(sample, shard, image.size)
    pairs = best_pairs(record, len(record.sentences))
    if only is not None:
        pairs = [pair for pair in record.pairs if (pair.sentence, pair.region) == only]
        if not pairs:
            raise ShardError(f"{where}: sentence {only[0]} and region {only[1]} are no pair; was the tar changed?")
    scale = VIEW_SIDE / max(image.size)
    view = (image.width * scale, image.height * scale)
    pair_of = {pair.sentence: pair for pair in pairs}
    boxes: dict[int, Box] = {}
    lines = []
    for number, (start, end) in enumerate(record.sentences):
        pair = pair_of.get(number)
        if pair is None and only is not None:
            continue
        if pair is not None and record.regions[pair.region].source != WHOLE_IMAGE and pair.region not in boxes:
            x0, y0, x1, y1 = (edge * scale for edge in record.regions[pair.region].box)
            label = place_label((x0, y0, x1, y1), view, [box.label for box in boxes.values()])
            boxes[pair.region] = Box(x0, y0, x1 - x0, y1 - y0, len(boxes) + 1, label, colour(len(boxes)))
        similarity, box = (None, None) if pair is None else (pair.similarity, boxes.get(pair.region))
        lines.append(Line(caption[start:end], similarity, box))
    jpeg = io.BytesIO()
    shrink(image, MAX_SIDE_PX).save(jpeg, "JPEG", quality=82)
    return Picture(
        sample.key,
        shard,
        *view,
        "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(),
        sorted(boxes.values(), key=lambda box: -box.width * box.height),
        lines,
    )


def place_label(box: Corners, view: tuple[float, float], taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The centre of a box's label: at the first corner where it covers no other label, else at the first of all.

    box   x0, y0, x1, y1 in units of the view
    view  its width and height
    A label lies inside its corner, or outside where it would hide a small box.
    """
    x0, y0, x1, y1 = box
    inset = LABEL_RADIUS if min(x1 - x0, y1 - y0) > 3 * LABEL_RADIUS else -LABEL_RADIUS
    corners = [
        (min(max(x, LABEL_RADIUS), view[0] - LABEL_RADIUS), min(max(y, LABEL_RADIUS), view[1] - LABEL_RADIUS))
        for y in (y0 + inset, y1 - inset)
        for x in (x0 + inset, x1 - inset)
    ]
    free = (corner for corner in corners if all(math.dist(corner, other) > 2 * LABEL_RADIUS for other in taken))
    return next(free, corners[0])
