"""What is in a scene and where: everything is decided here; `drawing` and `captions` only render it."""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from goal_ray.scenes.shapes import SHAPES, outline

Rgb = tuple[int, int, int]
Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in px of the image

COLOURS: dict[str, Rgb] = {
    "red": (214, 45, 49),
    "orange": (240, 134, 32),
    "yellow": (247, 209, 45),
    "green": (52, 156, 70),
    "turquoise": (40, 190, 188),
    "blue": (42, 92, 208),
    "purple": (128, 62, 176),
    "pink": (241, 120, 176),
    "brown": (124, 76, 42),
    "white": (248, 247, 243),
    "black": (30, 30, 34),
}
PATTERNS = ("solid", "striped", "dotted", "checkered", "two-tone")
BACKGROUNDS: dict[str, Rgb] = {
    "cream": (243, 233, 208),
    "sand": (217, 192, 150),
    "mint": (190, 224, 203),
    "lavender": (206, 199, 231),
    "sky blue": (186, 214, 236),
    "rose": (238, 207, 209),
    "silver": (200, 204, 208),
    "olive": (114, 118, 72),
    "slate": (96, 108, 122),
    "charcoal": (60, 62, 68),
    "navy": (34, 46, 82),
}
TEXTURES = ("plain", "fading", "cloudy", "ruled", "tiled", "grainy")
ROWS = ("top", "centre", "bottom")
COLUMNS = ("left", "centre", "right")

# Side of a square as large as the object's bounding box, in image heights. The gaps keep the words truthful.
SIDES = {"small": (0.165, 0.205), "medium": (0.26, 0.32), "large": (0.40, 0.48)}
CROP_FILL = (0.42, 0.94)
MAX_OBJECTS = 9
MIN_CONTRAST = 100.0


@dataclass(frozen=True)
class SceneObject:
    """One object: its words, and its geometry in px of the image.

    accent   the pattern's second colour; None for a solid object
    side_px  root of the bounding box's area
    """

    shape: str
    colour: str
    pattern: str
    accent: str | None
    size: str
    place: str
    centre_px: tuple[float, float]
    side_px: float
    turn_rad: float


@dataclass(frozen=True)
class Scene:
    """One picture to be. `zoom`: how much larger than in its full scene a crop shows things; 1 is a full scene."""

    size_px: tuple[int, int]
    background: str
    texture: str
    objects: tuple[SceneObject, ...]
    zoom: float = 1.0


class Spot(NamedTuple):
    """Room for one object: its size word, its cell of the 3×3 grid (row * 3 + column), and the geometry in px."""

    size: str
    cell: int
    side_px: float
    centre_px: tuple[float, float]


def place_name(row: int, column: int) -> str:
    """The word for a cell of the 3×3 grid: "top left" … "centre" … "bottom right"."""
    return "centre" if row == column == 1 else f"{ROWS[row]} {COLUMNS[column]}"


def full_scene(rng: Generator, height_px: int, count: int) -> Scene:
    """Several objects, each in a cell of its own of the 3×3 grid, hardly overlapping, no two alike."""
    width_px = round(height_px * rng.uniform(1.0, 1.25))
    background, texture = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(TEXTURES))
    looks = draw_looks(rng, background, count)
    turns = [draw_turn(rng, look.shape) for look in looks]
    extents = [np.ptp(outline(look.shape, turn), axis=0) for look, turn in zip(looks, turns, strict=True)]
    objects = tuple(
        SceneObject(*look, spot.size, place_name(*divmod(spot.cell, 3)), spot.centre_px, spot.side_px, turn)
        for look, turn, spot in zip(looks, turns, arrange(rng, extents, width_px, height_px), strict=True)
    )
    return Scene((width_px, height_px), background, texture, objects)


def crop_scene(rng: Generator, height_px: int) -> Scene:
    """A single object as a region crop shows it. `size` and `place` are those in the full scene it is cut from."""
    width_px = round(height_px * rng.uniform(1.0, 1.25))
    background, texture = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(TEXTURES))
    look = draw_looks(rng, background, 1)[0]
    turn = draw_turn(rng, look.shape)
    extent = np.ptp(outline(look.shape, turn), axis=0)
    room = np.array([width_px, height_px]) - 2.0
    side = min(math.sqrt(rng.uniform(*CROP_FILL) * width_px * height_px), *(room / extent).tolist())
    slack = (room - side * extent) / 2
    x, y = np.array([width_px, height_px]) / 2 + rng.uniform(-1, 1, 2) * slack
    size = str(rng.choice(list(SIDES)))
    zoom = side / (height_px * rng.uniform(*SIDES[size]))
    place = place_name(*(int(index) for index in rng.integers(3, size=2)))
    thing = SceneObject(*look, size, place, (float(x), float(y)), side, turn)
    return Scene((width_px, height_px), background, texture, (thing,), zoom)


class Look(NamedTuple):
    """What an object looks like; see SceneObject."""

    shape: str
    colour: str
    pattern: str
    accent: str | None


def draw_looks(rng: Generator, background: str, count: int) -> list[Look]:
    """The look of each object: visible on the background, and any two distinct."""
    colours = contrasting(BACKGROUNDS[background])
    looks: list[Look] = []
    while len(looks) < count:
        shape, colour = str(rng.choice(list(SHAPES))), str(rng.choice(colours))
        look = Look(shape, colour, *draw_pattern(rng, colour))
        if all(distinct(look, other) for other in looks):
            looks.append(look)
    return looks


def draw_pattern(rng: Generator, colour: str) -> tuple[str, str | None]:
    """A pattern for an object of that colour, and its accent."""
    pattern = str(rng.choice(PATTERNS))
    return pattern, None if pattern == "solid" else str(rng.choice(contrasting(COLOURS[colour])))


def contrasting(rgb: Rgb) -> list[str]:
    """The colours that are easily seen on another."""
    return [name for name, other in COLOURS.items() if np.linalg.norm(np.array(other) - np.array(rgb)) > MIN_CONTRAST]


def distinct(look: Look, other: Look) -> bool:
    """Whether two looks differ in at least two of shape, colour and pattern."""
    return sum(a == b for a, b in zip(look[:3], other[:3], strict=True)) <= 1


def look_alike(scene: Scene, rng: Generator) -> Scene:
    """The same scene but for the objects' patterns, which are drawn anew: only the details tell the two apart."""
    while True:
        patterns = [draw_pattern(rng, thing.colour) for thing in scene.objects]
        objects = tuple(
            replace(thing, pattern=pattern, accent=accent)
            for thing, (pattern, accent) in zip(scene.objects, patterns, strict=True)
        )
        looks = [Look(thing.shape, thing.colour, thing.pattern, thing.accent) for thing in objects]
        if objects != scene.objects and all(distinct(*pair) for pair in combinations(looks, 2)):
            return replace(scene, objects=objects)


def draw_turn(rng: Generator, shape: str) -> float:
    """A turn in radians that keeps the shape recognisable."""
    return math.radians(rng.uniform(-1, 1) * SHAPES[shape][1])


def arrange(rng: Generator, extents: list[np.ndarray], width_px: int, height_px: int) -> list[Spot]:
    """Spots whose boxes stay inside the image and hardly overlap, one per object.

    extents  per object, width and height of the outline's box at side 1
    Starts afresh until everything fits; the more objects, the smaller they are, so that it soon does.
    """
    count = len(extents)
    weights = np.array([count, 5, max(0, 8 - count)], float)
    cell_px = np.array([width_px, height_px]) / 3
    while True:
        sizes = [str(name) for name in rng.choice(list(SIDES), size=count, p=weights / weights.sum())]
        spots: list[Spot] = []
        boxes: list[Box] = []
        for size, cell, extent in zip(sizes, rng.permutation(9)[:count].tolist(), extents, strict=True):
            side = float(rng.uniform(*SIDES[size]) * height_px)
            corner = np.array([cell % 3, cell // 3]) * cell_px
            half = extent * side / 2
            low = np.maximum(corner + 0.06 * cell_px, half + 1)
            high = np.minimum(corner + 0.94 * cell_px, [width_px - 1, height_px - 1] - half)
            if (low >= high).any():
                break
            half_x, half_y = half.tolist()
            for x, y in rng.uniform(low, high, (8, 2)).tolist():
                box = (x - half_x, y - half_y, x + half_x, y + half_y)
                if all(overlap(box, other) < 0.03 for other in boxes):
                    boxes.append(box)
                    spots.append(Spot(size, cell, side, (x, y)))
                    break
            else:
                break
        if len(spots) == count:
            return spots


def overlap(first: Box, second: Box) -> float:
    """Shared area of two boxes as a share of the smaller one."""
    (ax0, ay0, ax1, ay1), (bx0, by0, bx1, by1) = first, second
    shared = max(0.0, min(ax1, bx1) - max(ax0, bx0)) * max(0.0, min(ay1, by1) - max(ay0, by0))
    return shared / min((ax1 - ax0) * (ay1 - ay0), (bx1 - bx0) * (by1 - by0))
