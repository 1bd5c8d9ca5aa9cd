"""The report's tables, as plain values for the template."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from goal_ray.bad_samples import kind_of
from goal_ray.errors import StageError
from goal_ray.metric_names import METRICS, is_rank
from goal_ray.report.records import RANKINGS, Evaluation, Ranking, Retrieval, RunRecords, metric_title
from goal_ray.run_folder import COST_FILE
from goal_ray.settings import TERMS, Weight


def side_by_side(columns: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """(what, its value in every run) of a table with a column for each run; a dash where a run has no value."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def settings(run: RunRecords) -> dict[str, str]:
    """A run's key settings, those that decide how it turns out, and how far it got, in words."""
    config = run.config
    weights = zip(TERMS, config.loss.configured, strict=True)
    last = run.metrics[-1] if run.metrics else None
    shown = {
        "model": config.model.name + (f" ({config.model.weights})" if config.model.weights else ""),
        "text positions": str(config.model.context_length or "the model's own"),
        "data": config.data.shards,
        "pairs per image": str(config.data.pairs_per_image) if config.loss.needs_pairs else "none",
        "loss weights": " · ".join(f"{name} {describe_weight(weight)}" for name, weight in weights if weight),
        "batch": f"{config.global_batch:,} (per worker {config.batch_per_worker}, workers {config.workers}, "
        f"accumulate {config.accumulate})",
        "steps": f"{last['step']:,} of {last['total_steps']:,}" if last else "none logged yet",
        "learning rate": f"{config.optimizer.lr:g}, warmup {config.optimizer.warmup_steps} steps, then cosine",
        "weight decay": f"{config.optimizer.weight_decay:g}",
        "precision": config.precision,
        "ZeRO stage": f"{config.zero_stage} (0 for one worker)" if config.zero_stage else "0",
        "seed": str(config.seed),
    }
    if config.evaluation.shards is not None:
        shown["held-out shards"] = config.evaluation.shards
    if run.best is not None:
        step, value = run.best
        shown["best"] = f"step {step:,} ({metric_title(config.evaluation.metric)} {value:.2f})"
    return shown


def cost(run: RunRecords) -> dict[str, str]:
    """What a run has cost, as far as cost.json tells. Raises StageError for numbers that are none."""
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "device": ("device", str),
        "workers": ("workers", lambda count: f"{count:,}"),
        "seconds": ("time", lambda seconds: f"{seconds / 3600:.3g} h" if seconds >= 3600 else f"{seconds:.0f} s"),
        "gpu_hours": ("GPU hours", lambda hours: f"{hours:.3g}"),
        "worker_hours": ("worker hours", lambda hours: f"{hours:.3g}"),
        "flops": ("FLOPs", lambda count: f"{count:.2e}"),
        "mfu": ("MFU", lambda share: f"{share:.1%}"),
        "images_per_s": ("pictures per second", lambda rate: f"{rate:,.1f}"),
        "peak_memory_bytes": ("peak memory", lambda size: f"{size / 2**30:.2f} GiB"),
        "energy_joules": ("energy", lambda joules: f"{joules / 3.6e6:.3g} kWh"),
    }
    try:
        return {title: show(run.cost[key]) for key, (title, show) in shown.items() if run.cost.get(key) is not None}
    except (TypeError, ValueError) as error:
        raise StageError(f"{run.folder / COST_FILE}: {error}; delete the file to go on without it") from None


@dataclass(frozen=True)
class MetricsRow:
    """run: number of the run · model: its folder's name · cells: (text, is the best of the column), for METRICS."""

    run: int
    model: str
    cells: list[tuple[str, bool]]


@dataclass(frozen=True)
class MetricsTable:
    """What was measured of one ranking on the same shards.

    sizes       how many pairs were ranked and how many samples skipped, in words
    directions  direction in words -> a row for each evaluation
    """

    shards: str
    title: str
    sizes: str
    directions: dict[str, list[MetricsRow]]


Measured = tuple[int, Evaluation, Retrieval]


def metrics_tables(runs: Sequence[RunRecords]) -> list[MetricsTable]:
    """A table for each ranking and precision of each evaluated shards, in the order in which they come."""
    groups: dict[tuple[str, str, str], list[Measured]] = {}
    for number, run in enumerate(runs):
        for evaluation in run.evaluations:
            for name, retrieval in evaluation.rankings.items():
                key = evaluation.shards.rstrip("/"), name, evaluation.precision
                groups.setdefault(key, []).append((number, evaluation, retrieval))
    return [
        metrics_table(runs, group, shards, RANKINGS[name], precision)
        for (shards, name, precision), group in groups.items()
    ]


def metrics_table(
    runs: Sequence[RunRecords], group: Sequence[Measured], shards: str, ranking: Ranking, precision: str
) -> MetricsTable:
    """The table of one group of evaluations; sizes are told run by run only where they differ."""
    sizes = [f"{found.count:,} pairs, {len(evaluation.skipped):,} skipped" for _, evaluation, found in group]
    if len(set(sizes)) > 1:
        sizes = [f"{runs[number].name}: {size}" for (number, *_), size in zip(group, sizes, strict=True)]
    directions = {
        ranking.text_to_image: metrics_rows(group, [found.text_to_image for *_, found in group]),
        ranking.image_to_text: metrics_rows(group, [found.image_to_text for *_, found in group]),
    }
    title = ranking.title + (f", in {precision}" if precision != "fp32" else "")
    return MetricsTable(shards, title, "; ".join(dict.fromkeys(sizes)), directions)


def metrics_rows(group: Sequence[Measured], values: Sequence[Mapping[str, float]]) -> list[MetricsRow]:
    """Rows of one direction; the best value of a column is marked where there is a choice."""
    best = {name: best_of([shares.get(name) for shares in values], name) for name in METRICS}
    return [
        MetricsRow(
            number,
            os.path.basename(evaluation.model.rstrip("/")),
            [
                (to_text(shares.get(name), name), len(group) > 1 and name in shares and shares[name] == best[name])
                for name in METRICS
            ],
        )
        for (number, evaluation, _), shares in zip(group, values, strict=True)
    ]


def best_of(column: Sequence[float | None], name: str) -> float | None:
    """The highest share, the lowest rank; None in an empty column."""
    known = [value for value in column if value is not None]
    return (min if is_rank(name) else max)(known, default=None)


def to_text(value: float | None, name: str) -> str:
    """A share with two digits; a dash where there was none, as there are no more than K to choose from."""
    if value is None:
        return "–"
    return f"{value:g}" if is_rank(name) else f"{value:.2f}"


def kinds_of_reasons(records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Stage and kind of reason of quarantined samples -> how many."""
    return Counter(kind_of(record) for record in records)


def describe_weight(weight: Weight) -> str:
    """A weight, or a schedule's points as share of the run: weight."""
    if not isinstance(weight, tuple):
        return f"{weight:g}"
    return " → ".join(f"{share:.0%}: {value:g}" for share, value in weight)
