"""Files of weights: finding, checking and reading them, without executing anything from them."""

import hashlib
import os
import pickle
import re
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from goal_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FOLDER = "GOAL_RAY_WEIGHTS"
DOWNLOADS = "https://dl.fbaipublicfiles.com/segment_anything"
# sha256 of SAM's official checkpoints.
OFFICIAL = {
    "sam_vit_b_01ec64.pth": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "sam_vit_l_0b3195.pth": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "sam_vit_h_4b8939.pth": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
# torchvision's own checkpoints carry the beginning of their sha256 in the name.
TORCHVISION_NAME = re.compile(r"-([0-9a-f]{8})\.pth$")
SAM_ADVICE = f"download one of {', '.join(f'{DOWNLOADS}/{name}' for name in OFFICIAL)}"
DETECTOR_ADVICE = "download weights of this model (torchvision's documentation links them)"


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


def torchvision_sum(path: Path) -> str | None:
    """The beginning of the checksum that a file named as torchvision names its own promises."""
    named = TORCHVISION_NAME.search(path.name)
    return named[1] if named else None


def read_state(path: Path) -> "dict[str, Tensor]":
    """The tensors of a .pth, .pt or .safetensors file, on the CPU. Raises ModelError for anything else."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, EOFError, OSError, RuntimeError) as error:
        reason = textwrap.shorten(str(error), 200)  # torch explains at length
        raise ModelError(f"{path}: damaged, or not a weights file: {reason}; download it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise ModelError(f"{path}: holds no plain state dict of tensors")
    return state
