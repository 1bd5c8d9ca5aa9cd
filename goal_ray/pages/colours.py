"""Colours that hold on white and on black, and under white letters."""

import colorsys

PALETTE = (
    "#2f78d0",
    "#d9542b",
    "#1f9a63",
    "#a64fc4",
    "#b8860b",
    "#d63f83",
    "#1797a8",
    "#6d7f1a",
    "#7a66e0",
    "#a0623a",
)
GOLDEN = 0.618034


def colour(number: int) -> str:
    """The colour of run or region `number`, from 0; no two numbers share one."""
    if number < len(PALETTE):
        return PALETTE[number]
    red, green, blue = colorsys.hls_to_rgb(number * GOLDEN % 1, 0.47, 0.6)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"
