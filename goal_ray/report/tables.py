"""The report's tables, as plain values for the template."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from goal_ray.report.records import Evaluation, Retrieval, RunRecords
from goal_ray.settings import TERMS, Weight

SHARES = ("R@1", "R@5", "R@25", "R@50", "mAP")
COLUMNS = (*SHARES, "median_rank")


def settings_table(runs: Sequence[RunRecords]) -> list[tuple[str, list[str]]]:
    """(setting, its value in every run), the settings that decide how a run turns out."""
    columns = [settings(run) for run in runs]
    return [(name, [column[name] for column in columns]) for name in columns[0]]


def settings(run: RunRecords) -> dict[str, str]:
    """A run's key settings in words."""
    config = run.config
    weights = zip(TERMS, config.loss.configured, strict=True)
    last = run.metrics[-1] if run.metrics else None
    return {
        "model": config.model.name + (f" ({config.model.weights})" if config.model.weights else ""),
        "text positions": str(config.model.context_length or "the model's own"),
        "data": config.data.shards,
        "pairs per image": str(config.data.pairs_per_image) if config.loss.needs_pairs else "none",
        "loss weights": " · ".join(f"{name} {describe_weight(weight)}" for name, weight in weights if weight),
        "batch": f"{config.global_batch} (per worker {config.batch_per_worker}, workers {config.workers}, "
        f"accumulate {config.accumulate})",
        "steps": f"{last['step']} of {last['total_steps']}" if last else "none logged yet",
        "learning rate": f"{config.optimizer.lr:g}, warmup {config.optimizer.warmup_steps} steps, then cosine",
        "weight decay": f"{config.optimizer.weight_decay:g}",
        "precision": config.precision,
        "ZeRO stage": f"{config.zero_stage} (0 for one worker)" if config.zero_stage else "0",
        "seed": str(config.seed),
        "time": f"{last['seconds']:.0f} s" if last else "–",
    }


@dataclass(frozen=True)
class MetricsRow:
    """run: number of the run · model: its folder's name · cells: (text, is the best of its shards) · count, skipped."""

    run: int
    model: str
    cells: list[tuple[str, bool]]
    count: int
    skipped: int


def metrics_tables(runs: Sequence[RunRecords]) -> dict[tuple[str, str], list[MetricsRow]]:
    """(evaluated shards, what is ranked) -> a row for each evaluation; cells are COLUMNS of both directions."""
    groups: dict[tuple[str, str], list[tuple[int, Evaluation, Retrieval]]] = {}
    for number, run in enumerate(runs):
        for evaluation in run.evaluations:
            for name, ranking in evaluation.rankings.items():
                groups.setdefault((evaluation.shards.rstrip("/"), name), []).append((number, evaluation, ranking))
    return {title: metrics_rows(group) for title, group in groups.items()}


def metrics_rows(group: Sequence[tuple[int, Evaluation, Retrieval]]) -> list[MetricsRow]:
    """Rows of rankings of the same shards; the best value of a column is marked where there is a choice."""
    values = [
        [direction.get(name) for direction in (ranking.text_to_image, ranking.image_to_text) for name in COLUMNS]
        for *_, ranking in group
    ]
    best = [best_of(column, name) for column, name in zip(zip(*values, strict=True), 2 * COLUMNS, strict=True)]
    return [
        MetricsRow(
            number,
            os.path.basename(evaluation.model.rstrip("/")),
            [
                (to_text(value, name), len(group) > 1 and value is not None and value == top)
                for value, name, top in zip(row, 2 * COLUMNS, best, strict=True)
            ],
            ranking.count,
            len(evaluation.skipped),
        )
        for row, (number, evaluation, ranking) in zip(values, group, strict=True)
    ]


def best_of(column: Sequence[float | None], name: str) -> float | None:
    """The highest share, the lowest rank; None in an empty column."""
    known = [value for value in column if value is not None]
    return (max if name in SHARES else min)(known, default=None)


def to_text(value: float | None, name: str) -> str:
    """A share with two digits; a dash where there was none, as there are no more than K to choose from."""
    if value is None:
        return "–"
    return f"{value:.2f}" if name in SHARES else f"{value:g}"


def quarantine_rows(run: RunRecords) -> list[dict[str, Any]]:
    """Per stage: how many samples were left out there, and one of the reasons."""
    counts = Counter(record["stage"] for record in run.quarantine)
    reasons = {record["stage"]: record["reason"] for record in reversed(run.quarantine)}
    return [{"stage": stage, "count": count, "reason": reasons[stage]} for stage, count in counts.most_common()]


def describe_weight(weight: Weight) -> str:
    """A weight, or a schedule's points as share of the run: weight."""
    if not isinstance(weight, tuple):
        return f"{weight:g}"
    return " → ".join(f"{share:.0%}: {value:g}" for share, value in weight)
