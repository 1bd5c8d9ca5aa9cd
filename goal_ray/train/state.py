"""The engine's state into checkpoints and back: full fp32 tensors in safetensors, whatever the ZeRO stage and the
number of workers were. Loading runs no code from the file, and any stage or worker count can go on.
"""

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from goal_ray.checkpoints import OPTIMIZER_FILE, STATE_FILE, checkpoint_folder, file_mark
from goal_ray.errors import StageError
from goal_ray.model import LoadedModel, save_model

AVERAGES = ("exp_avg", "exp_avg_sq")
SCALARS = ("logit_scale", "logit_bias")


class CheckpointWriter:
    """Saves checkpoints in the background: the step waits while the tensors are copied to the host, not for the disk.

    saved  called with the step once a checkpoint is complete, on the lead rank
    """

    def __init__(self, run_dir: Path, saved: Callable[[int], None]):
        self.run_dir = run_dir
        self.saved = saved
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.writing: Future[None] | None = None

    def save(self, engine: Any, loaded: LoadedModel, step: int, log: list[dict[str, Any]]) -> None:
        """Saves the state after `step` steps; every rank must call it. The folder appears complete or not at all.

        log  the last log records, for a driver that died before it had written them

        Waits for the checkpoint before it, and raises what that one met.
        """
        self.wait()
        tensors = gather_state(engine, loaded)
        if tensors is not None:
            self.writing = self.pool.submit(self._write, loaded, *tensors, {"step": step, "log": log})

    def wait(self) -> None:
        """Waits until the last checkpoint is complete; raises what it met."""
        if self.writing is not None:
            self.writing.result()
            self.writing = None

    def _write(
        self,
        loaded: LoadedModel,
        weights: dict[str, torch.Tensor],
        averages: dict[str, torch.Tensor],
        state: dict[str, Any],
    ) -> None:
        step = state["step"]
        broken = [name for name, tensor in {**weights, **averages}.items() if not tensor.isfinite().all()]
        if broken:
            raise StageError(
                f"after step {step} {broken[0]} and {len(broken) - 1} more tensors hold NaN or infinite values; no "
                "checkpoint was made of them; lower optimizer.lr, then go on with --resume"
            )
        final = checkpoint_folder(self.run_dir, step)
        partial = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._store(loaded, weights, averages, state, partial, final)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)  # it may hold the last of the room
            raise StageError(
                f"the checkpoint after step {step} cannot be written to {final.parent}: {error}; make room, or mend "
                "the storage, then go on with --resume"
            ) from error
        self.saved(step)

    def _store(
        self,
        loaded: LoadedModel,
        weights: dict[str, torch.Tensor],
        averages: dict[str, torch.Tensor],
        state: dict[str, Any],
        partial: Path,
        final: Path,
    ) -> None:
        save_model(partial, loaded, weights)
        save_file(averages, partial / OPTIMIZER_FILE)
        files = {path.name: file_mark(path) for path in sorted(partial.iterdir())}
        (partial / STATE_FILE).write_text(json.dumps({**state, "files": files}), encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)


def gather_state(engine: Any, loaded: LoadedModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
    """Weights (buffers with them) and averages, full fp32 tensors on the host, on rank 0; None on the others.

    Every rank must call it.
    """
    lead = not dist.is_initialized() or dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}
    averages: dict[str, torch.Tensor] = {}
    for name, parameter in loaded.clip.named_parameters():
        keys = (None, *AVERAGES) if parameter.requires_grad else (None,)
        for key in keys:
            full = _full_tensor(engine, parameter, key)  # collective: on every rank, in the same order
            if lead:
                target = weights if key is None else averages
                shape = () if name in SCALARS and not loaded.model_cfg.get("nonscalar_logit_scale") else full.shape
                copied = full.detach().to("cpu", torch.float32, copy=True)
                target[name if key is None else f"{key}.{name}"] = copied.reshape(shape)
    if not lead:
        return None
    buffers = {name: b.detach().cpu().clone() for name, b in loaded.clip.state_dict().items() if name not in weights}
    return {**weights, **buffers}, averages


def load_averages(folder: Path, engine: Any, clip: torch.nn.Module) -> None:
    """Puts AdamW's averages of a checkpoint into the engine's allocated state; every rank must call it."""
    averages = load_file(folder / OPTIMIZER_FILE)
    for name, parameter in clip.named_parameters():
        for key in AVERAGES if parameter.requires_grad else ():
            _set_average(engine, parameter, key, averages[f"{key}.{name}"].to(engine.device))


def allocate_averages(engine: Any, step: int) -> None:
    """Makes AdamW's state, zero averages after `step` steps; call it once, before the first step.

    Torch and ZeRO 1-2 would make it in the first step, where ZeRO links it to the parameters group by group and misses
    all groups but the first; ZeRO-3 makes it in a dry step, which counts as one.
    """
    optimizer, stage = engine.basic_optimizer, engine.zero_optimization_stage()
    if stage == 3:
        tensors = engine.optimizer.fp32_partitioned_groups_flat
    else:
        tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    fused = optimizer.defaults["fused"]
    for tensor in tensors:
        # Where AdamW wants it: unless it is fused, it would wait for a GPU's.
        count = torch.tensor(float(step), device=tensor.device if fused else "cpu")
        optimizer.state[tensor] = {"step": count, **{key: torch.zeros_like(tensor) for key in AVERAGES}}
    if stage in (1, 2):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _full_tensor(engine: Any, parameter: torch.nn.Parameter, key: str | None) -> torch.Tensor:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        return parameter if key is None else engine.basic_optimizer.state[parameter][key]
    if not parameter.requires_grad:
        with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
            return parameter.detach().clone()
    return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)


def _set_average(engine: Any, parameter: Any, key: str, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    stage = engine.zero_optimization_stage()
    if stage == 0:
        engine.basic_optimizer.state[parameter][key].copy_(value.reshape(parameter.shape))
    elif stage == 3:  # its own setter cannot cut a tensor whose size the number of ranks does not divide
        size = parameter.ds_tensor.numel()
        padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded.split(size)[dist.get_rank()], key)
    else:
        safe_set_full_optimizer_state(parameter, value, key)
