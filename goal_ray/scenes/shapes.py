"""Outlines of the shapes, in units of the shape's size: what is drawn, and how much room it takes.

An outline is a ring of (x, y) points, y downwards.
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


# Per shape: its ring, and by how many degrees it may be turned before it could be taken for something else.
# Few and unlike: a small CLIP must learn to tell them apart within the demo's minutes.
SHAPES: dict[str, tuple[Ring, float]] = {
    "circle": (regular(64), 180),
    "square": (regular(4, start_deg=45), 14),
    "triangle": (regular(3), 25),
    "star": (regular(10, radii=(1.0, 0.45)), 36),
    "cross": (cross(), 16),
    "heart": (heart(), 18),
}


def outline(shape: str, turn_rad: float) -> Ring:
    """The shape's ring, turned, then moved and scaled so that the bounding box has area 1 and its centre at (0, 0)."""
    cos, sin = math.cos(turn_rad), math.sin(turn_rad)
    ring = SHAPES[shape][0] @ np.array([[cos, sin], [-sin, cos]])
    low, high = ring.min(axis=0), ring.max(axis=0)
    return (ring - (low + high) / 2) / math.sqrt(np.prod(high - low))
