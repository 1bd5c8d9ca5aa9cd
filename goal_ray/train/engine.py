"""The DeepSpeed engine around a GoalModel."""

from collections import defaultdict
from typing import Any

import torch
from torch import nn

from goal_ray.losses import GoalModel
from goal_ray.model import image_tower, text_tower
from goal_ray.train.config import OptimizerConfig, TrainConfig

BUCKET = 5 * 10**7
"""Elements of gradients reduced at a time at stages 1 to 3, 0.2 GB; DeepSpeed's default is ten times that."""


def freeze_tower(clip: nn.Module, which: str) -> None:
    """Keeps a tower ("image", "text" or "none") from learning; the logit scale always learns."""
    if which == "none":
        return
    for parameter in image_tower(clip).parameters() if which == "image" else text_parameters(clip):
        parameter.requires_grad_(False)


def text_parameters(clip: nn.Module) -> set[nn.Parameter]:
    """The text tower's parameters, which in `open_clip.CLIP` lie beside those of the whole."""
    tower = text_tower(clip)
    modules = (tower.token_embedding, tower.transformer, tower.ln_final)
    inside = {parameter for module in modules for parameter in module.parameters()}
    projection = set() if tower.projection_DE is None else {tower.projection_DE}
    return inside | projection | {tower.positional_embedding}


def layer_scales(clip: nn.Module, decay: float) -> dict[nn.Parameter, float]:
    """The share of the learning rate of every parameter below the top of its tower; parameters at the top are left out.

    A tower of n blocks has n + 2 layers: embeddings, blocks, and the final LayerNorm with the projection at the top.
    Source: layer-wise decay as in ELECTRA (arXiv 2003.10555) and BEiT (arXiv 2106.08254).
    """
    scales: dict[nn.Parameter, float] = {}
    visual, text = image_tower(clip), text_tower(clip)
    image_top = {*visual.ln_post.parameters(), *([] if visual.proj is None else [visual.proj])}
    text_top = {*text.ln_final.parameters(), *([] if text.projection_DE is None else [text.projection_DE])}
    for blocks, every, top in (
        (visual.transformer.resblocks, set(visual.parameters()), image_top),
        (text.transformer.resblocks, text_parameters(clip), text_top),
    ):
        depth = len(blocks)
        scales |= dict.fromkeys(every - top, decay ** (depth + 1))
        for number, block in enumerate(blocks):
            scales |= dict.fromkeys(block.parameters(), decay ** (depth - number))
    return scales


def parameter_groups(model: GoalModel, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Optimizer groups with their "lr_scale": matrices are decayed, vectors and scalars (gains, biases) are not."""
    scales = layer_scales(model.clip, config.layer_decay) if config.layer_decay < 1 else {}
    groups: defaultdict[tuple[bool, float], list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2, scales.get(parameter, 1.0)].append(parameter)
    return [
        {"params": parameters, "weight_decay": config.weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), parameters in groups.items()
    ]


def build_engine(model: GoalModel, config: TrainConfig, workers: int) -> Any:
    """A DeepSpeed engine where the model is; the process group must exist. Precision is the model's own affair.

    A lone worker has nothing to shard: its engine is of stage 0, whatever `zero_stage` is, unless it offloads.
    AdamW starts at learning rate 0, since ZeRO-3's dry first step must move nothing; the loop sets the rate.
    """
    import deepspeed

    for parameter in model.parameters():
        if parameter.ndim == 0:  # DeepSpeed cannot broadcast scalars
            parameter.data = parameter.data.reshape(1)
    chunks, adam = config.chunks(workers), config.optimizer
    stage = config.zero_stage if workers > 1 or config.offload != "none" else 0
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        # By default parameters stay that are used again within 10⁹ elements: all of a ViT-L.
        zero |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 2 * BUCKET}
    place = {"device": "cpu", "pin_memory": next(model.parameters()).is_cuda}
    if config.offload != "none":
        zero["offload_optimizer"] = place
    if config.offload == "parameters":
        zero["offload_param"] = place
    settings = {
        "train_micro_batch_size_per_gpu": -(-config.worker_batch(workers) // chunks),
        "gradient_accumulation_steps": config.accumulate * chunks,
        "gradient_clipping": adam.clip_norm if stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before and after every micro-batch
    }
    # False would also turn off PyTorch's default on GPUs, one kernel for many parameters.
    fused = config.step.fused_adamw or None
    optimizer = torch.optim.AdamW(parameter_groups(model, adam), lr=0.0, betas=adam.betas, eps=adam.eps, fused=fused)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    if stage == 0:

        def clip(*_: Any) -> None:
            # DeepSpeed's own clipping forgets the norm, and takes it tensor by tensor.
            engine._global_grad_norm = nn.utils.clip_grad_norm_(model.parameters(), adam.clip_norm or torch.inf)

        optimizer.register_step_pre_hook(clip)
        engine.enable_backward_allreduce = workers > 1  # alone, it would copy all gradients to add nothing to them
    if stage == 3:
        register_direct_parameters(model)
    return engine


def register_direct_parameters(model: GoalModel) -> None:
    """Tells ZeRO-3 which parameters GoalModel reads without calling the module that owns them."""
    import deepspeed

    visual, text = image_tower(model.clip), text_tower(model.clip)
    owners = [model.clip, visual, visual.ln_post, text.module, text.ln_final]
    for parameter in {p for owner in owners for p in owner.parameters(recurse=False)}:
        deepspeed.zero.register_external_parameter(model, parameter)


def set_learning_rate(engine: Any, lr: float) -> None:
    """Sets the rate of the next optimizer step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
