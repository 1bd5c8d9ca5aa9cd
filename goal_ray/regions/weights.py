"""Files of weights: finding, checking and reading them, without executing anything from them."""

import hashlib
import os
import pickle
import textwrap
from pathlib import Path

import torch
from torch import Tensor

from goal_ray.errors import ModelError

WEIGHTS_FOLDER = "GOAL_RAY_WEIGHTS"


def find_checkpoint(checkpoint: Path, advice: str) -> Path:
    """The file itself, or the one of that name in GOAL_RAY_WEIGHTS. Raises ModelError, with advice, for neither."""
    folder = os.environ.get(WEIGHTS_FOLDER)
    places = [checkpoint] if folder is None else [checkpoint, Path(folder) / checkpoint]
    for place in places:
        if place.is_file():
            return place
    raise ModelError(
        f"no checkpoint at {' or '.join(map(str, places))}; {advice} and set checkpoint to its path, "
        f"or put it into a folder that the environment variable {WEIGHTS_FOLDER} names"
    )


def check_sum(path: Path, sha256: str | None) -> None:
    """Raises ModelError where a checksum, or the beginning of one, is wanted and the file has another."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(sha256.lower()):
        raise ModelError(f"{path}: sha256 is {found}, not {sha256.lower()}; download it again")


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .pth, .pt or .safetensors file, on the CPU. Raises ModelError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200)  # torch explains at length
        raise ModelError(f"{path}: damaged, or not a weights file: {reason}; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: holds no plain state dict of tensors")
    return state
