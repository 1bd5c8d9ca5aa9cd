"""Curves over the steps, as SVG for inlining: one figure per quantity, one line per run."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from goal_ray.metric_names import DIRECTIONS, dotted
from goal_ray.pages.colours import colour
from goal_ray.report.records import RANKINGS, RunRecords, metric_title
from goal_ray.settings import TERMS

PANELS = {
    "loss": "loss, weighted sum",
    **{f"loss_{term}": f"{term.replace('_', ' ').replace('tsl', 'TSL')} term, unweighted" for term in TERMS},
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_s": "images per second",
    "data_wait_share": "share of time waiting for data",
}
FIRST_HITS = [dotted(ranking, direction, "R@1") for ranking in RANKINGS for direction in DIRECTIONS]
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


class Line(NamedTuple):
    """Values of one run over its steps · best: the step to mark, if any."""

    steps: np.ndarray
    values: np.ndarray
    best: int | None = None


@dataclass(frozen=True)
class Curves:
    """svg: the drawing · latest: (run's number, last value) of those drawn · notes: what to know before comparing."""

    title: str
    svg: Markup
    latest: list[tuple[int, str]]
    notes: list[str]


def draw_curves(runs: Sequence[RunRecords]) -> list[Curves]:
    """A drawing of every quantity of the log that is not zero all along, with the runs that have it."""
    weights = {run.config.loss.configured for run in runs}
    notes = {"loss": "The runs weigh the terms differently: compare the terms instead."} if len(weights) > 1 else {}
    found = []
    for key, title in PANELS.items():
        read = {number: read_line(run.metrics, key) for number, run in enumerate(runs)}
        lines = {number: line for number, line in read.items() if line.values.any()}
        if lines:
            found.append(draw_panel(title, lines, notes.get(key, "")))
    return found


def draw_held_out(runs: Sequence[RunRecords]) -> list[Curves]:
    """A drawing of `evaluation.metric` and of every R@1 of the checkpoints evaluated during the training."""
    found = []
    for key in dict.fromkeys((*(run.config.evaluation.metric for run in runs), *FIRST_HITS)):
        lines, measured = {}, set()
        for number, run in enumerate(runs):
            line = read_line(run.history, key)
            if len(line.steps):
                lines[number] = line._replace(best=run.best[0] if run.best else None)
                pairs = run.config.evaluation.pairs if key.startswith(("local.", "joint.")) else 0
                measured.add((run.config.evaluation.shards, pairs))
        if lines:
            note = "The runs were evaluated on different shards or pairs." if len(measured) > 1 else ""
            found.append(draw_panel(metric_title(key), lines, note, points=True))
    return found


def read_line(records: Sequence[Mapping[str, Any]], key: str) -> Line:
    """Steps and values of one quantity; records without it are left out."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return Line(steps, values)


def draw_panel(title: str, lines: Mapping[int, Line], note: str, points: bool = False) -> Curves:
    """The drawing of one quantity, by runs' numbers, and what stands beside it."""
    values = np.concatenate([line.values for line in lines.values()])
    strange = int((~np.isfinite(values)).sum())
    gaps = f"{strange:,} of {len(values):,} values are NaN or infinite, and not drawn." if strange else ""
    latest = [(number, f"{line.values[-1]:.4g}") for number, line in lines.items()]
    return Curves(title, draw(title, lines, points), latest, [text for text in (note, gaps) if text])


def draw(title: str, lines: Mapping[int, Line], points: bool) -> Markup:
    """SVG, named by the title, of the lines by runs' numbers; with `points` every value has its mark."""
    with style.context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        axes.grid(True)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 2.5, 5, 10]))
        for place, (number, line) in enumerate(lines.items()):
            steps, mean, low, high = thin(line)
            # A line that a later one covers all along, as equal learning rates do, still shows at its edges.
            width = 1.4 + 1.6 * (len(lines) - 1 - place) / len(lines)
            mark = "o" if points or len(steps) == 1 else ""
            axes.plot(steps, mean, color=colour(number), linewidth=width, marker=mark, markersize=4)
            if (high > low).any():
                # The edge shows a spike of one step, whose band is narrower than any line.
                pale, edge = (to_rgba(colour(number), alpha) for alpha in (0.25, 0.6))
                axes.fill_between(steps, low, high, facecolor=pale, edgecolor=edge, linewidth=0.6)
            best = np.flatnonzero(line.steps == line.best)[-1:]
            axes.scatter(line.steps[best], line.values[best], s=100, facecolors="none", edgecolors=colour(number))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return inline(file.getvalue(), title)


def thin(line: Line) -> tuple[np.ndarray, ...]:
    """Step, mean, least and greatest value of neighbouring points, MAX_POINTS at most: a long run's page stays small.

    Without NaN and infinities; all three are NaN, for a gap in the line, where there is nothing else.
    """
    parts = []
    for at in np.array_split(np.arange(len(line.steps)), min(len(line.steps), MAX_POINTS)):
        known = line.values[at][np.isfinite(line.values[at])]
        values = (known.mean(), known.min(), known.max()) if len(known) else (np.nan,) * 3
        parts.append((line.steps[at].mean(), *values))
    return tuple(np.array(parts).T)


def inline(svg: str, title: str) -> Markup:
    """Matplotlib's file as an element of a page: no prologue, size from the page, ink in the page's text colour."""
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # Hundredths of a point are finer than any screen, and half the bytes.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    head, tail = svg.split(">", 1)
    head = re.sub(r' (width|height|xmlns|xmlns:xlink|version)="[^"]*"', "", head)
    return Markup(f'{head} role="img" aria-label="{escape(title)}">' + tail.replace(INK, "currentColor"))
