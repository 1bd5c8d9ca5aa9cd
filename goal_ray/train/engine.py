"""The DeepSpeed engine around a GoalModel."""

from typing import Any

import torch
from torch import nn

from goal_ray.losses import GoalModel
from goal_ray.model import image_tower, text_tower
from goal_ray.train.config import OptimizerConfig, TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: matrices are decayed, vectors and scalars (gains, biases, logit scale) are not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW at learning rate 0: the loop sets the rate before every step, and ZeRO-3's dry first step moves nothing."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def build_engine(model: GoalModel, config: TrainConfig) -> Any:
    """A DeepSpeed engine where the model is; the process group must exist. Precision is the model's own affair."""
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": config.batch_per_worker,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.optimizer.clip_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    for parameter in model.parameters():
        if parameter.ndim == 0:  # DeepSpeed cannot broadcast scalars
            parameter.data = parameter.data.reshape(1)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=build_optimizer(model, config.optimizer),
        config=settings,
        dist_init_required=False,
    )
    if config.zero_stage == 3:
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
        group["lr"] = lr
