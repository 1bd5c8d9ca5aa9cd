"""The settings of a training run; the class docstrings are the documentation that --help prints."""

import math
from dataclasses import dataclass, field
from typing import Literal

from goal_ray.config import strict
from goal_ray.geometry import ResizeConfig
from goal_ray.losses import LossConfig
from goal_ray.model import ModelConfig


@strict
@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches.

    shards: folder, file, glob or brace pattern of tars; paired (from `goal-ray lism`) unless the loss is global only
    pairs_per_image: local pairs per picture, the most similar first; 1 is the paper
    resize: how pictures become the model's square
    crop_mode: how region crops do
    shuffle_shards: samples are mixed over this many shards at a time
    max_bad_share: the run fails when more than this share of the samples is unreadable; they are listed either way
    """

    shards: str
    pairs_per_image: int = 1
    resize: ResizeConfig = field(default_factory=ResizeConfig)
    crop_mode: Literal["shortest", "squash"] = "shortest"
    shuffle_shards: int = 16
    max_bad_share: float = 0.01

    def __post_init__(self) -> None:
        if self.pairs_per_image < 1:
            raise ValueError("pairs_per_image must be at least 1; for no local pairs set the loss weights to 0")
        if self.shuffle_shards < 1:
            raise ValueError("shuffle_shards must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError("max_bad_share must be between 0 and 1")


@strict
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warmup and cosine decay to 0. Gains, biases and the logit scale are not decayed.

    lr: peak learning rate
    weight_decay: AdamW's decoupled decay
    betas: AdamW's averaging factors
    eps: AdamW's epsilon
    warmup_steps: steps of linear warmup
    clip_norm: largest norm of the gradient over all parameters; 0 clips nothing
    """

    lr: float = 5e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: int = 100
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError("lr must be a positive number")
        if self.warmup_steps < 0 or self.clip_norm < 0 or self.weight_decay < 0:
            raise ValueError("warmup_steps, clip_norm and weight_decay must not be negative")

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate that step `step` (from 0) uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@strict
@dataclass(frozen=True)
class TrainConfig:
    """A GOAL training run. Defaults are the published settings.

    model: the CLIP to start from
    data: what is read
    loss: the terms of the loss
    optimizer: AdamW and its schedule
    batch_per_worker: pictures per worker and micro-batch
    accumulate: micro-batches per optimizer step; contrastive negatives come from one micro-batch
    epochs: passes over the data
    max_steps: stop (and end the schedule) after this many optimizer steps, if that comes first; empty is no limit
    precision: bf16 or fp32 parameters and activations; bf16 keeps fp32 master weights
    zero_stage: DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too
    workers: Ray Train workers; one GPU each on GPUs
    device: auto takes a GPU where the cluster has one
    storage_path: folder for runs, seen by every worker
    name: this run's folder inside storage_path
    checkpoint_every: optimizer steps between checkpoints; the last step always makes one
    log_every: optimizer steps between log lines
    seed: fixes random weights, data order and random crops
    """

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch_per_worker: int = 16
    accumulate: int = 1
    epochs: int = 10
    max_steps: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    workers: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    storage_path: str = "runs"
    name: str = "goal"
    checkpoint_every: int = 500
    log_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_per_worker", "accumulate", "epochs", "workers", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError("max_steps must be at least 1, or empty for no limit")
        if self.batch_per_worker * self.workers < 2:
            raise ValueError("a contrastive loss needs at least 2 samples per step: raise batch_per_worker or workers")
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError("name is one folder name; set the path with storage_path")
        if "://" in self.storage_path:
            raise ValueError("storage_path must be a mounted folder that every worker sees; URLs are not supported")

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step."""
        return self.batch_per_worker * self.accumulate * self.workers

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)
