"""What actors do about their GPU: keep to their share of its memory, and end where it is lost."""

import os
import sys
from typing import NoReturn

from goal_ray.errors import StageError
from goal_ray.lism.groups import describe
from goal_ray.lism.time_limit import run_within

# What a process takes beside its tensors, and torch's limit does not count: context, kernels, libraries' handles.
CONTEXT_BYTES = 1.5 * 2**30
# cuBLAS and the driver report a full GPU by errors that have no type of their own.
FULL = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
MORE_MEMORY = (
    "raise gpus_per_actor, so that fewer actors share a GPU; or, for a new output folder, lower matcher.batch, "
    "proposer.images_per_batch and proposer.points_per_batch, or set precision to bf16"
)


def limit_memory(device: str, share: float) -> None:
    """Keeps this process's tensors within its share of the device, so that no actor takes its neighbour's part."""
    if device.startswith("cuda") and share < 1:
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(max(share / 2, share - CONTEXT_BYTES / total))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU has too little memory left for what was tried."""
    import torch

    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in FULL)
    )


def is_gpu_error(error: Exception) -> bool:
    """Whether it is the GPU that failed, or is full: on another one, or later, the same may succeed."""
    import torch

    return is_out_of_memory(error) or isinstance(error, torch.AcceleratorError)


def explained(error: Exception) -> StageError:
    """An error for people, with what to do where memory lacks; without its traceback, which holds on to tensors."""
    if is_out_of_memory(error):
        return StageError(f"out of GPU memory ({str(error).splitlines()[0]}): {MORE_MEMORY}")
    return StageError(describe(error))


def recover(limit_s: float) -> None:
    """Gives free memory back, for another attempt; ends the process where its GPU does not answer in `limit_s`.

    After a bad address, a failed assertion in a kernel or an ECC error, every call to the GPU fails at once: an actor
    that went on would draw all groups to itself and blame their pictures. A new process has a GPU again, and `Strikes`
    finds the picture that costs it again and again.
    """
    import torch

    if not torch.cuda.is_initialized():
        return
    try:
        run_within(limit_s, torch.cuda.synchronize)
    except Exception as error:
        end_process(f"the GPU is lost: {describe(error)}")
    torch.cuda.empty_cache()


def end_process(reason: str) -> NoReturn:
    """Ends this actor as a crash would, so that Ray starts it again."""
    print(f"{reason}; starting again", file=sys.stderr, flush=True)
    os._exit(1)
