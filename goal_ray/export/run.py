"""One export: find the checkpoint, write the model, write its card."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from goal_ray.checkpoints import refuse_damaged
from goal_ray.errors import StageError
from goal_ray.export.card import CARD_FILE, write_card
from goal_ray.export.hf import save_hf
from goal_ray.model import LoadedModel, load_model, save_model
from goal_ray.run_folder import EXPORT_FOLDER, best_checkpoint, run_of
from goal_ray.settings import ModelConfig


def save_open_clip(folder: Path, loaded: LoadedModel) -> None:
    """Writes a folder that plain open_clip loads as `local-dir:FOLDER`."""
    save_model(folder, loaded, loaded.clip.state_dict())


FORMATS: dict[str, Callable[[Path, LoadedModel], None]] = {"open_clip": save_open_clip, "hf": save_hf}


def export(source: str, layout: str = "open_clip", out: str | None = None) -> Path:
    """Writes a model and its card to a new folder, and returns that.

    source  a run folder (its best checkpoint, or its newest), a checkpoint or a folder with a model
    layout  a key of FORMATS
    out     the folder; default RUN/export/LAYOUT, RUN being the run of `source`

    Raises GoalRayError for a source without a model, a damaged checkpoint, a model that the layout cannot express, and
    a folder that is there already; nothing is left behind then.
    """
    checkpoint = best_checkpoint(Path(source))
    run_dir = run_of(Path(source).absolute())
    if out is None and run_dir is None:
        raise StageError(f"{source} is no run folder and no checkpoint of one; say with --out where the model goes")
    target = Path(out) if out is not None else Path(run_dir or "", EXPORT_FOLDER, layout)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StageError(f"{target} is there already; delete it, or choose another place with --out")
    refuse_damaged(checkpoint)
    loaded = load_model(ModelConfig(str(checkpoint)))
    partial = target.absolute().with_name(f".{target.absolute().name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        FORMATS[layout](partial, loaded)
        write_card(partial / CARD_FILE, layout, loaded, checkpoint, run_dir)
        for file in partial.iterdir():
            shutil.copymode(partial / CARD_FILE, file)  # safetensors keeps its files from all but their owner
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
