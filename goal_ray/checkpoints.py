"""A run's checkpoint folders: which there are, which are whole, which may go. No torch: the driver asks.

`RUN/checkpoints/step-00000100/` holds an open_clip model folder (plain open_clip loads it as `local-dir:`), the AdamW
averages by parameter name, the step, and every file's size and checksum; `goal_ray.train.state` writes them.
"""

import json
import shutil
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from goal_ray.errors import StageError
from goal_ray.settings import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS

CHECKPOINTS_FOLDER = "checkpoints"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
CHUNK_BYTES = 1 << 24


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / CHECKPOINTS_FOLDER).glob(f"step-*/{STATE_FILE}"))


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies."""
    return run_dir / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def resolve_checkpoint(path: Path) -> Path:
    """A model folder: `path` itself, or a run's newest checkpoint. Raises StageError where there is neither."""
    if not path.is_dir():
        raise StageError(f"{path}: no such folder")
    if (path / CHECKPOINTS_FOLDER).is_dir():
        folders = checkpoint_folders(path)
        if not folders:
            raise StageError(f"{path}: the run has no complete checkpoint yet")
        return folders[-1]
    return path


def step_of(folder: Path) -> int:
    """The optimizer steps done when a checkpoint was made: by its folder's name, for its files may be damaged."""
    return int(folder.name.removeprefix("step-"))


def newest_intact(run_dir: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose files are whole. Newer ones are damaged: they are renamed, and `warn` is told.

    Raises StageError where there are checkpoints, but all are damaged.
    """
    folders = checkpoint_folders(run_dir)
    damaged: list[tuple[Path, str]] = []
    for folder in reversed(folders):
        damage = find_damage(folder)
        if damage is None:
            for bad, why in damaged:
                aside = bad.with_name(f"damaged-{bad.name}")
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
                warn(f"{bad} is damaged ({why}) and now called {aside.name}; going on from the checkpoint before it")
            return folder
        damaged.append((folder, damage))
    for folder, why in damaged:
        warn(f"{folder} is damaged ({why})")
    if folders:
        raise StageError(f"{run_dir}: every checkpoint is damaged; delete {run_dir / 'checkpoints'} to start anew")
    return None


def saved_log(folder: Path) -> list[dict[str, Any]]:
    """The last log records before a checkpoint, oldest first."""
    return json.loads((folder / STATE_FILE).read_text(encoding="utf-8")).get("log", [])


def remove_partial(run_dir: Path) -> None:
    """Deletes what a killed run left of a checkpoint that it was writing."""
    for folder in (run_dir / CHECKPOINTS_FOLDER).glob(".step-*.tmp"):
        shutil.rmtree(folder)


def refuse_damaged(folder: Path) -> None:
    """Raises StageError for a checkpoint whose model is not as it was written; other folders pass."""
    if not (folder / STATE_FILE).is_file() or (damage := find_damage(folder, model_only=True)) is None:
        return
    others = [path.parent for path in sorted(folder.parent.glob(f"step-*/{STATE_FILE}"), reverse=True)]
    whole = (other for other in others if other != folder and find_damage(other, model_only=True) is None)
    other = next(whole, None)
    raise StageError(
        f"checkpoint {folder} is damaged ({damage}); take another one"
        + (f", such as {other}" if other is not None else "; none that is whole lies beside it")
    )


def find_damage(folder: Path, model_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, by their sizes and checksums; None where nothing is.

    model_only  all but what a training goes on from: a copy may have another name, and no averages of AdamW
    """
    name = STATE_FILE
    try:
        state = json.loads((folder / name).read_text(encoding="utf-8"))
        if not model_only and state["step"] != step_of(folder):
            return f"{STATE_FILE} is of step {state['step']}"
        name = OPEN_CLIP_CONFIG
        json.loads((folder / name).read_text(encoding="utf-8"))
        for name in (OPEN_CLIP_WEIGHTS, *(() if model_only else (OPTIMIZER_FILE,))):
            with safe_open(folder / name, "np"):
                pass
        for name, expected in state.get("files", {}).items():
            if not (model_only and name == OPTIMIZER_FILE) and file_mark(folder / name) != expected:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"{name}: {error}"
    return None


def file_mark(path: Path) -> list[int]:
    """A file's size in bytes and its CRC-32."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(CHUNK_BYTES):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def prune_checkpoints(run_dir: Path, keep: int, needed: Collection[int]) -> None:
    """Deletes all checkpoints but the newest `keep` and those of the steps that are `needed`."""
    for folder in checkpoint_folders(run_dir)[:-keep]:
        if step_of(folder) not in needed:
            # Without its state file it is no checkpoint any more, should this be interrupted.
            (folder / STATE_FILE).unlink()
            shutil.rmtree(folder)
    for folder in (run_dir / CHECKPOINTS_FOLDER).glob("step-*"):
        if not (folder / STATE_FILE).exists():
            shutil.rmtree(folder)
