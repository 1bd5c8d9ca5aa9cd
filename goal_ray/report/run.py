"""One report: read the runs, draw, render, write."""

from collections.abc import Sequence
from dataclasses import dataclass

from goal_ray.atomic import write_bytes
from goal_ray.errors import StageError
from goal_ray.metric_names import METRICS
from goal_ray.pages.render import render_page
from goal_ray.patience import patience
from goal_ray.report.curves import draw_curves, draw_held_out
from goal_ray.report.gallery import Gallery, draw_gallery
from goal_ray.report.records import PATIENCE_S, RunRecords, read_lism_summary, read_runs
from goal_ray.report.tables import cost, kinds_of_reasons, metrics_tables, settings, side_by_side

REPORT_FILE = "report.html"
TEMPLATE = "report/report.html.j2"
KINDS_SHOWN = 20


@dataclass(frozen=True)
class Page:
    """What was written · pictures: how many it shows · note: why there are none."""

    url: str
    size_bytes: int
    pictures: int
    note: str


def write_report(
    folders: Sequence[str], out: str | None = None, shards: str | None = None, images: int = 12, seed: int = 0
) -> Page:
    """Writes the page about one or more runs.

    out     the page; default: report.html in the last run
    shards  paired shards to show pictures of; default: those of the last run that was trained on local pairs
    images  pictures at most; the seed draws others

    Raises GoalRayError for a folder that is no run, a damaged file, `shards` that are not there, an unwritable page.
    """
    if images < 0:
        raise StageError(f"--images must be 0 or more, not {images}")
    runs = read_runs(folders)
    gallery, note = find_gallery(runs, shards, images, seed)
    data = render_page(
        TEMPLATE,
        runs=runs,
        settings=side_by_side([settings(run) for run in runs]),
        curves=draw_curves(runs),
        held_out=draw_held_out(runs),
        cost=side_by_side([cost(run) for run in runs]),
        columns=METRICS,
        metrics=metrics_tables(runs),
        left_out=[kinds_of_reasons(run.quarantine) for run in runs],
        lism={shards: read_lism_summary(shards) for shards in dict.fromkeys(run.config.data.shards for run in runs)},
        kinds_shown=KINDS_SHOWN,
        gallery=gallery,
        note=note,
    )
    url = out or str(runs[-1].folder / REPORT_FILE)
    try:
        write_bytes(url, data)
    except OSError as error:
        raise StageError(f"{url}: cannot be written ({error}); choose another place with --out") from None
    return Page(url, len(data), len(gallery.pictures), note)


def find_gallery(runs: Sequence[RunRecords], shards: str | None, images: int, seed: int) -> tuple[Gallery, str]:
    """The pictures, and where there are none the reason why.

    Raises GoalRayError for `shards` that are not there; a run's shards may have gone since.
    """
    if shards is not None:
        gallery = draw_gallery(shards, images, seed)
    else:
        paired = [run for run in runs if run.config.loss.needs_pairs]
        if not paired:
            return Gallery(""), "no run was trained on local pairs; choose paired shards with --shards"
        try:
            with patience(PATIENCE_S):
                gallery = draw_gallery(paired[-1].config.data.shards, images, seed)
        except Exception as error:  # the run's storage may be out of reach from here, or lack its driver
            return Gallery(paired[-1].config.data.shards), f"{error}; choose paired shards with --shards"
    if gallery.pictures or images == 0:
        return gallery, "" if gallery.pictures else "--images 0"
    first = f"; the first problem: {gallery.skipped[0]}" if gallery.skipped else ""
    return gallery, f"{gallery.shards}: none of the samples can be shown{first}"
