"""The floating-point formats that a frozen model may run in."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype(precision: Precision) -> "torch.dtype":
    """The format as torch knows it."""
    import torch

    found: torch.dtype = getattr(torch, NAMES[precision])
    return found


def full_fp32() -> None:
    """Has fp32 mean fp32: torch lets convolutions on GPUs use TF32 by default, and matrix products
    where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 is set.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def autocast(device: "torch.device", precision: Precision) -> "torch.autocast":
    """A block in which the model's matrix products run in `precision`; fp32 changes nothing."""
    import torch

    return torch.autocast(device.type, dtype(precision), enabled=precision != "fp32")
