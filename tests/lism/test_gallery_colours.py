"""Whether what OUT/gallery.html writes in a region's colour can be read."""

import re

import pytest

from goal_ray.lism.counts import ShardCounts, summary
from goal_ray.lism.gallery import draw_gallery
from goal_ray.lism.output import OutputFolder
from goal_ray.pages.colours import PALETTE


def luminance(colour: str) -> float:
    """Relative luminance of `#rgb` or `#rrggbb`, as WCAG defines it."""
    digits = re.findall("..", colour[1:]) if len(colour) == 7 else [digit * 2 for digit in colour[1:]]
    parts = [int(pair, 16) / 255 for pair in digits]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def mixed(one: str, other: str, share: float) -> str:
    """What CSS's color-mix in sRGB makes of `share` of one colour and the rest of another."""
    pairs = zip(re.findall("..", one[1:]), re.findall("..", other[1:]), strict=True)
    return "#" + "".join(f"{round(int(a, 16) * share + int(b, 16) * (1 - share)):02x}" for a, b in pairs)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("colour", PALETTE)
def test_numbers_in_a_region_s_colour_can_be_read_on_a_card(tmp_path, scheme, colour):
    draw_gallery(OutputFolder(str(tmp_path)), summary([ShardCounts()], 1.0, 0))
    style = (tmp_path / "gallery.html").read_text("utf-8")
    card, ink = (re.findall(rf"--{name}: (#\w+)", style)[scheme] for name in ("card", "ink"))
    share = int(re.search(r"\.said b \{ color: color-mix\(in srgb, var\(--c, [^%]*?(\d+)%, var\(--ink\)\)", style)[1])
    assert contrast(mixed(colour, ink, share / 100), card) >= 4.5
