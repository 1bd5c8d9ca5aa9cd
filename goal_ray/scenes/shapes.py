"""Outlines of the shapes, in units of the shape's size: what is drawn, and how much room it takes.

An outline is a list of rings of (x, y) points, y downwards; the second ring, where there is one, is a hole.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ring = NDArray[np.float64]


def regular(corners: int, start_deg: float = -90.0, radii: tuple[float, ...] = (1.0,)) -> Ring:
    """A polygon whose corners lie on circles, taking `radii` in turn."""
    angles = np.radians(start_deg) + np.arange(corners) * (2 * math.pi / corners)
    radius = np.resize(np.asarray(radii), corners)
    return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)


def heart() -> Ring:
    t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def crescent() -> Ring:
    outer = np.radians(np.linspace(50, 310, 60))
    tip_x, tip_y = math.cos(outer[0]), math.sin(outer[0])
    inner_centre = 0.52
    inner_radius = math.hypot(tip_x - inner_centre, tip_y)
    reach = math.atan2(tip_y, tip_x - inner_centre)
    inner = np.linspace(2 * math.pi - reach, reach, 60)
    arc = np.stack([inner_centre + inner_radius * np.cos(inner), inner_radius * np.sin(inner)], axis=1)
    return np.concatenate([np.stack([np.cos(outer), np.sin(outer)], axis=1), arc])


def drop() -> Ring:
    t = np.linspace(0, 2 * math.pi, 72, endpoint=False)
    return np.stack([0.9 * np.sin(t) * np.sin(t / 2) ** 1.6, -np.cos(t)], axis=1)


def cross() -> Ring:
    a, b = 0.34, 1.0
    corners = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (b, -a),
        (b, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-b, a),
        (-b, -a),
        (-a, -a),
    ]
    return np.array(corners)


def arrow() -> Ring:
    return np.array([(-1, -0.3), (0.05, -0.3), (0.05, -0.85), (1, 0), (0.05, 0.85), (0.05, 0.3), (-1, 0.3)])


# Per shape: its rings, and by how many degrees it may be turned before it could be taken for something else.
SHAPES: dict[str, tuple[list[Ring], float]] = {
    "circle": ([regular(64)], 180),
    "square": ([regular(4, start_deg=45)], 14),
    "triangle": ([regular(3)], 25),
    "star": ([regular(10, radii=(1.0, 0.45))], 36),
    "cross": ([cross()], 16),
    "ring": ([regular(64), regular(64, radii=(0.52,))], 180),
    "hexagon": ([regular(6)], 30),
    "diamond": ([regular(4) * [0.78, 1.0]], 10),
    "heart": ([heart()], 18),
    "crescent": ([crescent()], 25),
    "arrow": ([arrow()], 180),
    "drop": ([drop()], 20),
}


def outline(shape: str, turn_rad: float) -> list[Ring]:
    """The shape's rings, turned, then moved and scaled so that the bounding box has area 1 and its centre at (0, 0)."""
    cos, sin = math.cos(turn_rad), math.sin(turn_rad)
    rings = [ring @ np.array([[cos, sin], [-sin, cos]]) for ring in SHAPES[shape][0]]
    low, high = rings[0].min(axis=0), rings[0].max(axis=0)
    scale = 1 / math.sqrt(np.prod(high - low))
    return [(ring - (low + high) / 2) * scale for ring in rings]
