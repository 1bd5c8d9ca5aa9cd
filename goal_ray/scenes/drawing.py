"""Turns a `Scene` into pixels, and says where each object's pixels are.

Masks are drawn at SUPERSAMPLE times the resolution and averaged down; colours are mixed at the final resolution, which
is what makes it fast.
"""

import math
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from goal_ray.scenes.layout import BACKGROUNDS, COLOURS, Box, Scene, SceneObject
from goal_ray.scenes.shapes import outline

SUPERSAMPLE = 4
# Height of the full scene that a crop is thought to be cut from: a small object's crop is as soft as the real one's.
CROPPED_SCENE_PX = 128
MIN_CROP_PX = 20
# Of a blurred mask, only what is fully inside stays.
EROSION = [0] * 254 + [255] * 2

Floats = NDArray[np.floating[Any]]


def render(scene: Scene, rng: Generator) -> tuple[Image.Image, list[Box]]:
    """The RGB picture and each object's tight box (x0, y0, x1, y1) in its pixels, from the mask that was drawn."""
    canvas = render_background(scene, rng)
    boxes = [paint(canvas, thing, rng) for thing in scene.objects]
    width, height = scene.size_px
    if scene.zoom != 1:
        native = max(MIN_CROP_PX, round(CROPPED_SCENE_PX / scene.zoom))
        if native < height:
            canvas = soften(canvas, native / height)
    canvas += rng.normal(0, 2.0, (height, width, 1)).astype(np.float32)
    return Image.fromarray(to_bytes(canvas)), boxes


def object_mask(thing: SceneObject) -> tuple[Image.Image, tuple[int, int]]:
    """The object's mask at SUPERSAMPLE times the resolution (mode L, 0 or 255), and its top left corner in image px.

    The patch measures whole image pixels and has an empty margin of at least one.
    """
    ring = outline(thing.shape, thing.turn_rad) * thing.side_px + np.array(thing.centre_px)
    low = np.floor(ring.min(axis=0)).astype(int) - 1
    high = np.ceil(ring.max(axis=0)).astype(int) + 1
    width, height = ((high - low) * SUPERSAMPLE).tolist()
    mask = Image.new("L", (width, height))
    # PIL paints every pixel whose centre lies on the outline or inside: half a pixel moves centres to corners.
    points = [tuple(point) for point in ((ring - low) * SUPERSAMPLE - 0.5).tolist()]
    ImageDraw.Draw(mask).polygon(points, fill=255)
    return mask, (int(low[0]), int(low[1]))


def paint(canvas: Floats, thing: SceneObject, rng: Generator) -> Box:
    """Draws one object with a soft shadow onto canvas (H, W, 3), 0-255, in place. Returns its tight box in px."""
    mask, (left, top) = object_mask(thing)
    edge = ImageChops.subtract(
        mask, mask.filter(ImageFilter.BoxBlur(0.028 * thing.side_px * SUPERSAMPLE)).point(EROSION)
    )
    second = Image.fromarray(pattern_field(thing, mask.size, rng).astype(np.uint8) * 255)
    alpha = shares(mask)
    edge_share = np.minimum(shares(edge), alpha)
    second_share = np.minimum(shares(ImageChops.multiply(second, mask)), alpha - edge_share)

    drop_shadow(canvas, mask, left, top, thing.side_px)
    main, other, dark = tones(thing, rng)
    height, width = alpha.shape
    light = 1.06 - 0.12 * np.add.outer(np.linspace(0, 1, height), np.linspace(0, 1, width)).astype(np.float32) / 2
    mixed = main * (alpha - edge_share - second_share)[..., None]
    mixed += other * second_share[..., None] + dark * edge_share[..., None]
    colour = mixed / np.maximum(alpha, 1e-6)[..., None] * light[..., None]
    blend(canvas, alpha[..., None], colour, left, top)
    return tight_box(mask, left, top)


def drop_shadow(canvas: Floats, mask: Image.Image, left: int, top: int, side_px: float) -> None:
    """Darkens the canvas softly to the lower right of the mask, in place."""
    blurred = mask.reduce(SUPERSAMPLE).filter(ImageFilter.GaussianBlur(0.025 * side_px + 0.6))
    alpha = np.asarray(blurred, np.float32)[..., None] / 255 * 0.3
    offset = max(1, round(0.03 * side_px))
    blend(canvas, alpha, np.zeros_like(alpha), left + offset, top + offset)


def tight_box(mask: Image.Image, left: int, top: int) -> Box:
    """The box of the mask's filled pixels, in px of the image, for a mask whose corner is at (left, top)."""
    bounds = mask.getbbox()
    assert bounds is not None  # every outline has an area
    x0, y0, x1, y1 = (bound / SUPERSAMPLE for bound in bounds)
    return left + x0, top + y0, left + x1, top + y1


def shares(mask: Image.Image) -> Floats:
    """Covered share of each final pixel, 0-1."""
    return np.asarray(mask.reduce(SUPERSAMPLE), np.float32) / 255


def blend(canvas: Floats, alpha: Floats, colour: Floats, left: int, top: int) -> None:
    """canvas = canvas (1 - alpha) + colour alpha, for a patch at (left, top) of which only the part inside counts."""
    height, width = alpha.shape[:2]
    y0, y1 = max(0, top), min(canvas.shape[0], top + height)
    x0, x1 = max(0, left), min(canvas.shape[1], left + width)
    alpha = alpha[y0 - top : y1 - top, x0 - left : x1 - left]
    colour = colour[y0 - top : y1 - top, x0 - left : x1 - left]
    view = canvas[y0:y1, x0:x1]
    view += (colour - view) * alpha


def tones(thing: SceneObject, rng: Generator) -> tuple[Floats, Floats, Floats]:
    """The object's main colour, its accent and its rim, each (3,) in 0-255."""
    main = np.array(COLOURS[thing.colour], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
    accent = main if thing.accent is None else np.array(COLOURS[thing.accent], np.float32)
    return main, accent, main * 0.55


def pattern_field(thing: SceneObject, size: tuple[int, int], rng: Generator) -> NDArray[np.bool_]:
    """Where the pattern's second colour goes, (H, W) of the mask, in a frame turned at random around its centre."""
    turn = thing.turn_rad + rng.choice([0, 45, 90, 135]) / 180 * math.pi + rng.uniform(-0.2, 0.2)
    phase_u, phase_v = rng.uniform(0, 1, 2)
    width, height = size
    unit = thing.side_px * SUPERSAMPLE
    x = ((np.arange(width) - width / 2) / unit).astype(np.float32)[None, :]
    y = ((np.arange(height) - height / 2) / unit).astype(np.float32)[:, None]
    u, v = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)
    match thing.pattern:
        case "striped":
            return (u / 0.26 + phase_u) % 1 < 0.45
        case "dotted":
            return ((u / 0.25 + phase_u) % 1 - 0.5) ** 2 + ((v / 0.25 + phase_v) % 1 - 0.5) ** 2 < 0.095
        case "checkered":
            return (np.floor(u / 0.19 + phase_u) + np.floor(v / 0.19 + phase_v)) % 2 == 0
        case "two-tone":
            return u > 0
    return np.zeros((height, width), bool)


def render_background(scene: Scene, rng: Generator) -> Floats:
    """The background alone, (H, W, 3) float32, 0-255."""
    width, height = scene.size_px
    base = np.array(BACKGROUNDS[scene.background], np.float32) + rng.uniform(-5, 5, 3).astype(np.float32)
    x = (np.arange(width, dtype=np.float32) / height)[None, :] / scene.zoom + rng.uniform(0, 1)
    y = (np.arange(height, dtype=np.float32) / height)[:, None] / scene.zoom + rng.uniform(0, 1)
    field = texture_field(scene.texture, x, y, rng)
    # Paper-like shading from corner to corner keeps even a plain background from being one flat number.
    field = field + 3 * (x + y - x.mean() - y.mean())
    return base + np.broadcast_to(field, (height, width)).astype(np.float32)[..., None] * np.ones(3, np.float32)


def texture_field(texture: str, x: Floats, y: Floats, rng: Generator) -> Floats:
    """Brightness to add, broadcastable to (H, W), for coordinates x (1, W) and y (H, 1) in heights of a full scene."""
    match texture:
        case "fading":
            angle = rng.uniform(0, 2 * math.pi)
            slope = math.cos(angle) * (x - x.mean()) + math.sin(angle) * (y - y.mean())
            return 46 * slope
        case "cloudy":
            waves = [rng.normal(0, 5.5, 2) for _ in range(5)]
            return sum(6.5 * np.sin(fx * x + fy * y + rng.uniform(0, 6)) for fx, fy in waves)
        case "ruled":
            lines = y if rng.random() < 0.5 else x
            return np.where((lines / 0.085) % 1 < 0.14, -17.0, 3.0)
        case "tiled":
            return np.where((np.floor(x / 0.125) + np.floor(y / 0.125)) % 2 == 0, 6.0, -6.0)
        case "grainy":
            return rng.normal(0, 9, (y.shape[0], x.shape[1]))
    return np.zeros((1, 1), np.float32)


def soften(canvas: Floats, scale: float) -> Floats:
    """The picture as it looks when only `scale` of its resolution was there."""
    height, width = canvas.shape[:2]
    small = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(to_bytes(canvas)).resize(small, Image.Resampling.BOX)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float32).copy()


def to_bytes(canvas: Floats) -> NDArray[np.uint8]:
    """Rounded to 0-255."""
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
