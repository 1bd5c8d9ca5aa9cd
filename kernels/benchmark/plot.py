"""The picture of a benchmark. matplotlib is imported on use: a bare GPU box may lack it."""

from pathlib import Path
from typing import Any


def plot(results: dict[str, Any], path: Path) -> Path:
    """Forward + backward over the batch, per shape, at the most boxes and the first dtype measured. Returns path."""
    from matplotlib.figure import Figure

    rows = results["cases"]
    dtype, regions = rows[0]["dtype"], max(row["regions"] for row in rows)
    chosen = [row for row in rows if (row["dtype"], row["regions"]) == (dtype, regions)]
    shapes = list(dict.fromkeys(row["shape"] for row in chosen))
    figure = Figure(figsize=(4 * len(shapes), 4), layout="constrained")
    for axis, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        here = [row for row in chosen if row["shape"] == shape]
        for name in dict.fromkeys(name for row in here for name in row["times"]):
            points = [(row["batch"], 1e6 * row["times"][name]["both"]) for row in here if name in row["times"]]
            axis.loglog(*zip(*points, strict=True), marker="o", label=name)
        axis.loglog(
            [row["batch"] for row in here], [1e6 * row["floor_s"] for row in here], "k:", label="copy bandwidth"
        )
        axis.set(title=f"{shape}, {regions} boxes, {dtype}", xlabel="samples", ylabel="forward + backward, µs")
    axis.legend(fontsize="small")
    figure.suptitle(results["versions"]["device"])
    figure.savefig(path, dpi=120)
    return path
