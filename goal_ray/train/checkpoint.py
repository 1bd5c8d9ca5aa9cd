"""Checkpoints: full fp32 tensors in safetensors, whatever the ZeRO stage and the number of workers were.

`RUN/checkpoints/step-00000100/` holds an open_clip model folder (plain open_clip loads it as `local-dir:`), the AdamW
averages by parameter name, and the step. Loading runs no code from the file, and any stage or worker count can go on.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from goal_ray.errors import StageError
from goal_ray.model import CONFIG_FILE, WEIGHTS_FILE, LoadedModel, save_model

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
AVERAGES = ("exp_avg", "exp_avg_sq")
SCALARS = ("logit_scale", "logit_bias")


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step-*/{STATE_FILE}"))


def resolve_checkpoint(path: Path) -> Path:
    """A model folder: `path` itself, or a run's newest checkpoint. Raises StageError where there is neither."""
    if not path.is_dir():
        raise StageError(f"{path}: no such folder")
    if (path / "checkpoints").is_dir():
        folders = checkpoint_folders(path)
        if not folders:
            raise StageError(f"{path}: the run has no complete checkpoint yet")
        return folders[-1]
    return path


def read_step(folder: Path) -> int:
    """The optimizer steps done when a checkpoint was made."""
    return int(json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["step"])


def check_checkpoint(folder: Path) -> None:
    """Raises StageError for a checkpoint that lost a file or the end of one, from headers and sizes alone."""
    try:
        read_step(folder)
        json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        for name in (WEIGHTS_FILE, OPTIMIZER_FILE):
            with safe_open(folder / name, "pt"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StageError(
            f"{folder} is damaged ({error}); delete this folder to go on from the checkpoint before it"
        ) from None


def save_checkpoint(run_dir: Path, engine: Any, loaded: LoadedModel, step: int) -> Path:
    """Saves the state after `step` steps; every rank must call it. The folder appears complete or not at all."""
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
                target[name if key is None else f"{key}.{name}"] = full.detach().float().cpu().reshape(shape).clone()
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    if lead:
        buffers = {name: b for name, b in loaded.clip.state_dict().items() if name not in weights}
        partial = final.with_name(f".{final.name}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        save_model(partial, loaded, {**weights, **buffers})
        save_file(averages, partial / OPTIMIZER_FILE)
        (partial / STATE_FILE).write_text(json.dumps({"step": step}), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    if dist.is_initialized():
        dist.barrier()
    return final


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
    for tensor in tensors:
        count = torch.tensor(float(step), device=tensor.device)  # where the fused AdamW wants it
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
