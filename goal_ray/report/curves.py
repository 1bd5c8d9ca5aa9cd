"""Curves over the steps, as SVG for inlining: one figure per quantity, one line per run."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.figure import Figure

from goal_ray.pages.colours import colour
from goal_ray.report.records import RunRecords
from goal_ray.settings import TERMS

PANELS = {
    "loss": "loss, weighted sum",
    **{f"loss_{term}": f"{term.replace('_', ' ').replace('tsl', 'TSL')} term, unweighted" for term in TERMS},
    "lr": "learning rate",
    "images_per_s": "images per second",
}
MAX_POINTS = 400
# A colour that no line has; in the page it becomes the text's, which is dark on light or light on dark.
INK = "#0a0b0c"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "goal_ray",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.limits": (-3, 5),
}


@dataclass(frozen=True)
class Curves:
    """svg: the drawing · latest: (run's number, last value) of the runs drawn."""

    title: str
    svg: Markup
    latest: list[tuple[int, str]]


def draw_curves(runs: Sequence[RunRecords]) -> list[Curves]:
    """A drawing of every quantity that is not zero all along, with the runs that have it."""
    found = []
    for key, title in PANELS.items():
        lines = {
            number: (steps, values)
            for number, run in enumerate(runs)
            for steps, values in [read_curve(run, key)]
            if values.any()
        }
        if lines:
            latest = [(number, f"{values[-1]:.4g}") for number, (_, values) in lines.items()]
            found.append(Curves(title, draw(title, lines), latest))
    return found


def read_curve(run: RunRecords, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one quantity; records without it are left out."""
    points = [(record["step"], record[key]) for record in run.metrics if record.get(key) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return steps, values


def draw(title: str, lines: dict[int, tuple[np.ndarray, np.ndarray]]) -> Markup:
    """SVG, named by the title, of steps against values for each run's number. A gap stands for NaN or infinity."""
    with style.context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True)
        axes.set_xlabel("step")
        for place, (number, points) in enumerate(lines.items()):
            steps, values = (thin(column) for column in points)
            finite = np.where(np.isfinite(values), values, np.nan)
            # A line that a later one covers all along, as equal learning rates do, still shows at its edges.
            width = 1.4 + 1.6 * (len(lines) - 1 - place) / len(lines)
            axes.plot(steps, finite, color=colour(number), linewidth=width, marker="o" if len(steps) == 1 else "")
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline(file.getvalue(), title)


def thin(column: np.ndarray) -> np.ndarray:
    """Means of neighbouring points, so that at most MAX_POINTS are left: a long run's page stays small."""
    return np.array([part.mean() for part in np.array_split(column, min(len(column), MAX_POINTS))])


def inline(svg: str, title: str) -> Markup:
    """Matplotlib's file as an element of a page: no prologue, size from the page, ink in the page's text colour."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, tail = svg.split(">", 1)
    head = re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(title)}">' + tail.replace(INK, "currentColor"))
