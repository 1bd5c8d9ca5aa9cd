"""`tsl_loss`: the contract of the token-similarity loss, and the choice between its implementations."""

import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from kernels.tsl.eager import tsl_eager
from kernels.tsl.reference import Mode, TslResult, tsl_reference

logger = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "eager", "triton"]

BACKENDS: dict[str, Callable[..., TslResult]] = {"reference": tsl_reference, "eager": tsl_eager}
if importlib.util.find_spec("triton") is not None:  # absent where no GPU can be, as on macOS
    from kernels.tsl.triton_cells import IS_INTERPRETED
    from kernels.tsl.triton_op import tsl_triton

    BACKENDS["triton"] = tsl_triton


def tsl_loss(
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: tuple[int, int],
    ln_weight_D: Tensor | None,
    ln_bias_D: Tensor | None,
    proj_DE: Tensor | None,
    target_ME: Tensor,
    *,
    mode: Mode = "coverage",
    eps: float = 1e-5,
    first_token: int = 0,
    backend: Backend = "auto",
) -> TslResult:
    """Mean over boxes of (1 - cosine)² between the tokens under a box, pooled and embedded, and the box's target.

    pool: weighted mean of the box's tokens → LayerNorm → projection → cosine with the target.
    Source: GOAL (arXiv 2503.17782), token similarity loss; coverage weights are this project's.

    tokens_BND        activations before the final LayerNorm, any float dtype and strides, as the tower gives them: the
                      last H·W of the N rows are the grid's cells, row by row. Samples without boxes cost nothing but
                      their zero gradient
    boxes_M4          float (x0, y0, x1, y1) in grid cells, clipped to the grid; a text span is a box (start, 0, end, 1)
                      on a 1×L grid. A box that overlaps no cell (outside, zero area, x1 < x0) is empty: cosine 0, no
                      part in the loss, zero gradients
    sample_index_M    int32 or int64 row of tokens_BND that each box belongs to, in any order
    grid              (H, W)
    ln_weight_D, ln_bias_D, proj_DE   may each be None (1, 0, identity)
    target_ME         embeddings to compare with; normalised here
    mode              coverage weighs a cell by its overlap with the box, touch counts every overlapped cell as 1
    eps               of the LayerNorm
    first_token       rows of tokens_BND before the grid's first cell, N - H·W: 1 behind a CLS token
    backend           auto takes triton on a GPU, where Triton is installed, else eager

    Arithmetic is float32, or float64 for float64 tokens, whatever the boxes' dtype, also under autocast; for bfloat16
    tokens the projection alone multiplies bfloat16, but for the reference. Gradients flow to tokens, LayerNorm,
    projection and target. Raises ValueError on wrong shapes, dtypes or settings, and, for boxes on the CPU outside of
    torch.compile, on an index out of range and on non-finite boxes; elsewhere reading those values would stall the
    device: a NaN box then gives a NaN loss.
    """
    check_shapes(tokens_BND, boxes_M4, sample_index_M, grid, first_token, ln_weight_D, ln_bias_D, proj_DE, target_ME)
    if mode not in get_args(Mode):
        raise ValueError(f"mode {mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
    if not eps > 0:
        raise ValueError(f"eps must be > 0, not {eps}")
    chosen = choose_backend(backend, tokens_BND.device.type)
    if not torch.compiler.is_compiling():
        if boxes_M4.device.type == "cpu":
            check_values(boxes_M4, sample_index_M, len(tokens_BND))
        log_once(chosen, tokens_BND.device.type)
    with torch.autocast(tokens_BND.device.type, enabled=False):
        return BACKENDS[chosen](
            tokens_BND,
            boxes_M4,
            sample_index_M,
            grid,
            ln_weight_D,
            ln_bias_D,
            proj_DE,
            target_ME,
            mode,
            eps,
            first_token,
        )


def choose_backend(backend: str, device_type: str) -> str:
    """The implementation that runs on a type of device. Raises ValueError where the one asked for cannot."""
    if backend == "auto":
        return "triton" if device_type == "cuda" and "triton" in BACKENDS else "eager"
    if backend not in BACKENDS:
        raise ValueError(f"TSL backend {backend!r} is not available; choose one of auto, {', '.join(BACKENDS)}")
    if backend == "triton" and device_type != "cuda" and not IS_INTERPRETED:
        raise ValueError(
            f"TSL backend 'triton' needs a GPU, not {device_type}; choose auto or eager, or set TRITON_INTERPRET=1 "
            "before the start to run the kernels in Triton's slow interpreter"
        )
    return backend


@functools.cache
def log_once(backend: str, device_type: str) -> None:
    """Says which implementation runs, once per device type."""
    logger.info("token-similarity loss on %s: %s backend", device_type, backend)


def check_shapes(
    tokens_BND: Tensor,
    boxes_M4: Tensor,
    sample_index_M: Tensor,
    grid: tuple[int, int],
    first_token: int,
    ln_weight_D: Tensor | None,
    ln_bias_D: Tensor | None,
    proj_DE: Tensor | None,
    target_ME: Tensor,
) -> None:
    """Raises ValueError unless shapes, dtypes and devices fit together. Reads no values."""
    if tokens_BND.dim() != 3:
        raise ValueError(f"tokens must be (B, N, D), not {tuple(tokens_BND.shape)}")
    height, width = grid
    _, rows, dim = tokens_BND.shape
    if height < 1 or width < 1 or first_token < 0 or rows != first_token + height * width:
        raise ValueError(
            f"{rows} tokens do not fill a {height}×{width} grid from token {first_token} on; "
            "mend the grid, or let first_token skip the tokens before it (1 for a CLS token)"
        )
    regions = boxes_M4.shape[0] if boxes_M4.dim() else 0
    out = target_ME.shape[-1] if proj_DE is not None and target_ME.dim() else dim
    tensors = {
        "boxes": (boxes_M4, (regions, 4)),
        "sample_index": (sample_index_M, (regions,)),
        "ln_weight": (ln_weight_D, (dim,)),
        "ln_bias": (ln_bias_D, (dim,)),
        "proj": (proj_DE, (dim, out)),
        "target": (target_ME, (regions, out)),
    }
    if sample_index_M.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"sample_index must be int32 or int64, not {sample_index_M.dtype}")
    for name, (tensor, shape) in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
        if tensor.device != tokens_BND.device:
            raise ValueError(f"{name} is on {tensor.device}, but the tokens are on {tokens_BND.device}")
        if name != "sample_index" and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a float dtype, not {tensor.dtype}")
    if not tokens_BND.is_floating_point():
        raise ValueError(f"tokens must be of a float dtype, not {tokens_BND.dtype}")


def check_values(boxes_M4: Tensor, sample_index_M: Tensor, samples: int) -> None:
    """Raises ValueError on a non-finite box or an index outside the batch."""
    if not boxes_M4.isfinite().all():
        row = int((~boxes_M4.isfinite()).any(1).nonzero()[0, 0])
        raise ValueError(f"box {row} is not finite: {boxes_M4[row].tolist()}")
    wrong_M = (sample_index_M < 0) | (sample_index_M >= samples)
    if wrong_M.any():
        row = int(wrong_M.nonzero()[0, 0])
        raise ValueError(f"sample_index[{row}] is {int(sample_index_M[row])}, but the batch has {samples} samples")
