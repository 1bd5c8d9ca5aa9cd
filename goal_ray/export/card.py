"""The model card: a README.md of facts from the model and its run folder. What is not known is left out."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from goal_ray import __version__
from goal_ray.checkpoints import STATE_FILE
from goal_ray.metric_names import METRICS
from goal_ray.model import LoadedModel, image_tower, logit_scale, text_tower
from goal_ray.report.records import RunRecords, read_object, read_run
from goal_ray.report.tables import cost, metrics_tables, settings
from goal_ray.run_folder import MODEL_FOLDER, SHARDS_FILE, best_checkpoint
from goal_ray.settings import TERMS

CARD_FILE = "README.md"
TEMPLATE = "export/card.md.j2"


class Markdown(str):
    """Text that is Markdown already; all other values of the template are escaped."""


def write_card(path: Path, layout: str, loaded: LoadedModel, checkpoint: Path, run_dir: Path | None) -> None:
    """Writes the card of a model; with a run folder also what it was trained on, and how it turned out.

    Raises StageError or ConfigError for a damaged run folder.
    """
    values: dict[str, Any] = run_values(run_dir, checkpoint) if run_dir is not None else {"run": None}
    header = {
        "library_name": {"open_clip": "open_clip", "hf": "transformers"}[layout],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "goal", "long-captions", "image-text-retrieval"],
    }
    text = (
        _environment()
        .get_template(TEMPLATE)
        .render(
            header=Markdown(yaml.safe_dump(header, sort_keys=False)),
            title=(run_dir or checkpoint).name,
            layout=layout,
            architecture=architecture(loaded),
            context=loaded.context_length,
            squash=loaded.preprocess["resize_mode"] == "squash",
            **values,
        )
    )
    path.write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def architecture(loaded: LoadedModel) -> list[tuple[str, str]]:
    """(what, value) about the model as it is."""
    visual, text = image_tower(loaded.clip), text_tower(loaded.clip)
    rows, columns = loaded.grid_HW
    blocks = visual.transformer.resblocks, text.transformer.resblocks
    return [
        ("picture", f"{loaded.size_px} × {loaded.size_px} pixels, {rows} × {columns} patches"),
        ("text", f"up to {loaded.context_length} tokens"),
        ("embedding", f"{loaded.model_cfg['embed_dim']} numbers"),
        ("image tower", f"{len(blocks[0])} layers, width {visual.transformer.width}"),
        ("text tower", f"{len(blocks[1])} layers, width {text.transformer.width}"),
        ("activation", "QuickGELU" if loaded.model_cfg.get("quick_gelu") else "GELU"),
        ("parameters", f"{sum(parameter.numel() for parameter in loaded.clip.parameters()) / 1e6:.1f} million"),
        ("logit scale", f"{logit_scale(loaded.clip).exp().item():.2f}"),
    ]


def run_values(run_dir: Path, checkpoint: Path) -> dict[str, Any]:
    """What the template shows of a run, up to the step of the checkpoint."""
    run = read_run(run_dir, run_dir.name)
    step = read_object(checkpoint / STATE_FILE).get("step")
    logged = [record for record in run.metrics if step is None or record["step"] <= step]
    evaluations = [evaluation for evaluation in run.evaluations if is_of(evaluation.model, checkpoint, run_dir)]
    history = [record for record in run.history if step is None or record["step"] <= step]
    run = replace(run, metrics=logged, history=history, evaluations=evaluations)
    return {
        "run": run,
        "settings": settings(run),
        "fence": Markdown(fence(run.config_yaml)),
        "config_yaml": Markdown(run.config_yaml.rstrip("\n")),
        "data": data(run),
        "losses": losses(run),
        "columns": METRICS,
        "metrics": metrics_tables([run]),
        "cost": cost(run),
    }


def is_of(model: str, checkpoint: Path, run_dir: Path) -> bool:
    """Whether an evaluation is of this checkpoint; a run's model folder is its best one."""
    if Path(model).absolute() == run_dir / MODEL_FOLDER:
        return checkpoint.absolute() == best_checkpoint(run_dir).absolute()
    return Path(model).name == checkpoint.name


def data(run: RunRecords) -> list[tuple[str, str]]:
    """(what, value) about the training data."""
    rows = [("shards", run.config.data.shards)]
    counts = read_object(run.folder / SHARDS_FILE)
    if counts:
        rows.append(("samples", f"{sum(counts.values()):,} usable, in {len(counts):,} tars"))
    left_out = Counter(record["stage"] for record in run.quarantine)
    rows += [(f"left out at {stage}", f"{count:,} samples") for stage, count in left_out.most_common()]
    return rows


def losses(run: RunRecords) -> list[tuple[str, str]]:
    """(what, value) of the last log line: the loss and the terms with a weight."""
    if not run.metrics:
        return []
    last = run.metrics[-1]
    weighted = [name for name, weight in zip(TERMS, run.config.loss.configured, strict=True) if weight]
    named = {"loss": last["loss"], **{f"loss_{name}": last.get(f"loss_{name}") for name in weighted}}
    return [(name, f"{value:.4f}") for name, value in named.items() if value is not None]


def escape(value: Any) -> Any:
    """A value as text on one line that no Markdown sign can break out of; Markdown itself unchanged."""
    if isinstance(value, Markdown):
        return value
    line = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|~$&])", r"\\\1", line.encode("utf-8", "replace").decode())


def fence(text: str) -> str:
    """A code fence that no line of the text can end."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def table(rows: Iterable[tuple[str, str]]) -> Markdown:
    """A table of (what, value)."""
    lines = [f"| {escape(name)} | {escape(value)} |" for name, value in rows]
    return Markdown("\n".join(["| | |", "| --- | --- |", *lines]))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("goal_ray", ""),
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(table=table, version=__version__)
    return environment
