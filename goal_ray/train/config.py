"""The settings of a training run; the class docstrings are the documentation that --help prints."""

import math
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from goal_ray.config import check_custom_resources, strict
from goal_ray.metric_names import DIRECTIONS, METRICS, RANKINGS, dotted, is_rank
from goal_ray.settings import LossConfig, ModelConfig, ResizeConfig, StepConfig


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
    layer_decay: each layer below the top of a tower learns this many times as fast as the one above it; 1 is off
    freeze: the tower that keeps its weights
    weight_decay: AdamW's decoupled decay
    betas: AdamW's averaging factors
    eps: AdamW's epsilon
    warmup_steps: steps of linear warmup
    clip_norm: largest norm of the gradient over all parameters; 0 clips nothing
    """

    lr: float = 5e-6
    layer_decay: float = 1.0
    freeze: Literal["none", "image", "text"] = "none"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: int = 100
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise ValueError("lr must be a positive number")
        if not 0 < self.layer_decay <= 1:
            raise ValueError("layer_decay must be in (0, 1]; 1 is off")
        if self.warmup_steps < 0:
            raise ValueError("warmup_steps must not be negative")
        if not 0 < self.eps < math.inf:
            raise ValueError("eps must be a positive number; at 0 an embedding row that no text uses becomes NaN")
        for name in ("clip_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number, and not negative")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError("betas must be in [0, 1)")

    def lr_factor(self, step: int, total_steps: int) -> float:
        """Share of the peak learning rate that step `step` (from 0) uses."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@strict
@dataclass(frozen=True)
class EvaluationConfig:
    """Retrieval on held-out shards: every checkpoint is evaluated beside the training, which does not wait.

    shards: held-out tars, as `goal-ray evaluate` takes them; empty evaluates nothing
    pairs: local pairs per picture that are measured too; the shards then need `goal-ray lism`
    metric: what the best checkpoint is best in: [local. | joint.]text_to_image.NAME or image_to_text.NAME, where NAME
        is R@1, R@5, R@25, R@50, mAP or median_rank
    patience: the run ends after so many evaluations without a better one; empty never ends it early
    cpus: CPUs of the evaluation, beside those of the workers; one is for small models and few pictures
    gpus: GPUs of the evaluation, beside those of the workers; 0 evaluates on its CPUs
    """

    shards: str | None = None
    pairs: int = 0
    metric: str = "text_to_image.R@1"
    patience: int | None = None
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        rankings = {dotted(*each): each[0] for each in product(RANKINGS, DIRECTIONS, METRICS)}
        if self.metric not in rankings:
            raise ValueError(f"metric {self.metric!r} is unknown; it is [local.|joint.]text_to_image.R@1 or the like")
        if rankings[self.metric] and not self.pairs:
            raise ValueError(f"metric {self.metric} needs pairs; set pairs to 1 or more")
        if self.pairs < 0 or self.cpus < 1 or self.gpus < 0:
            raise ValueError("pairs and gpus must not be negative, cpus at least 1")
        if self.patience is not None and self.patience < 1:
            raise ValueError("patience must be at least 1, or empty")
        if self.patience is not None and self.shards is None:
            raise ValueError("patience needs held-out shards; set shards")

    @property
    def lower_is_better(self) -> bool:
        """Whether the best checkpoint has the lowest value of `metric`."""
        return is_rank(self.metric)

    @property
    def bundle(self) -> dict[str, float]:
        """What one holds of Ray's resources."""
        return {"CPU": float(self.cpus), **({"GPU": float(self.gpus)} if self.gpus else {})}

    @property
    def needs(self) -> str:
        """The same in words."""
        return f"{self.cpus} CPUs and {self.gpus} GPUs"


@strict
@dataclass(frozen=True)
class TrainConfig:
    """A GOAL training run. Defaults are the published settings.

    model: the CLIP to start from
    data: what is read
    loss: the terms of the loss
    optimizer: AdamW and its schedule
    step: how a step computes
    evaluation: held-out shards, the best checkpoint, early stopping
    batch_per_worker: pictures per worker and micro-batch; contrastive negatives come from a micro-batch of all workers
    chunk: pictures that go through the towers at a time (GradCache): micro-batches larger than memory, for one more
        forward pass; empty takes the micro-batch at once
    accumulate: micro-batches per optimizer step; unlike chunks, they do not see each other's negatives
    epochs: passes over the data
    max_steps: stop (and end the schedule) after this many optimizer steps, if that comes first; empty is no limit
    precision: fp32, or bf16, which computes in bfloat16 (autocast) with fp32 parameters, gradients and optimizer
    zero_stage: DeepSpeed ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too;
        one worker has nothing to shard, and its stage is 0 unless it offloads
    offload: optimizer keeps its states and the update on the CPU (zero_stage 1 to 3), parameters them too (3)
    workers: Ray Train workers, one GPU each on GPUs; [min, max] takes as many as the cluster has at every (re)start,
        with the same micro-batches: batch_per_worker is meant for max, fewer workers take more, in chunks
    worker_resources: custom Ray resources that each worker holds, such as {train: 1}: it goes to nodes that have them,
        and an autoscaler starts those
    device: auto takes a GPU where the cluster has one now; say cuda where it first has to start nodes with them
    wait_for_nodes_s: on a cluster that was there before, how long the run asks and waits for nodes before it fails
    storage_path: folder for runs, seen by every worker
    name: this run's folder inside storage_path
    checkpoint_every: optimizer steps between checkpoints; the last step always makes one
    keep_checkpoints: how many of the newest checkpoints stay, beside the best
    max_failures: how often in a row workers may die without a new checkpoint before the run fails
    log_every: optimizer steps between log lines
    wandb: Weights & Biases project to log to, beside TensorBoard and JSONL; empty is none
    seed: fixes random weights, data order and random crops
    """

    model: ModelConfig
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    step: StepConfig = field(default_factory=StepConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    batch_per_worker: int = 16
    chunk: int | None = None
    accumulate: int = 1
    epochs: int = 10
    max_steps: int | None = None
    precision: Literal["bf16", "fp32"] = "bf16"
    zero_stage: Literal[0, 1, 2, 3] = 1
    offload: Literal["none", "optimizer", "parameters"] = "none"
    workers: int | tuple[int, int] = 1
    worker_resources: dict[str, float] = field(default_factory=dict)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    wait_for_nodes_s: float = 1800.0
    storage_path: str = "runs"
    name: str = "goal"
    checkpoint_every: int = 500
    keep_checkpoints: int = 3
    max_failures: int = 3
    log_every: int = 10
    wandb: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("batch_per_worker", "accumulate", "epochs", "checkpoint_every", "keep_checkpoints", "log_every")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not 1 <= self.min_workers <= self.max_workers:
            raise ValueError("workers must be at least 1, or [min, max] with 1 <= min <= max")
        check_custom_resources("worker_resources", self.worker_resources)
        if self.max_failures < 0 or self.seed < 0:
            raise ValueError("max_failures and seed must not be negative")
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError("max_steps must be at least 1, or empty for no limit")
        if self.chunk is not None and self.chunk < 2:
            raise ValueError("chunk must be at least 2 pictures, or empty for the micro-batch at once")
        if self.batch_per_worker * self.max_workers < 2:
            raise ValueError("a contrastive loss needs at least 2 samples per step: raise batch_per_worker or workers")
        if "/" in self.name or self.name in ("", ".", ".."):
            raise ValueError("name is one folder name; set the path with storage_path")
        if "://" in self.storage_path:
            raise ValueError("storage_path must be a mounted folder that every worker sees; URLs are not supported")
        if self.step.compile and self.zero_stage == 3:
            raise ValueError("step.compile cannot see through zero_stage=3, which gathers parameters block by block")
        if (self.offload == "optimizer" and self.zero_stage == 0) or (
            self.offload == "parameters" and self.zero_stage != 3
        ):
            raise ValueError("offload=optimizer needs zero_stage 1, 2 or 3, offload=parameters 3")

    @property
    def min_workers(self) -> int:
        """The fewest workers the run goes on with."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The workers that batch_per_worker is meant for."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    def worker_bundle(self, use_gpu: bool) -> dict[str, float]:
        """What each worker holds of Ray's resources."""
        return {"GPU" if use_gpu else "CPU": 1.0, **self.worker_resources}

    @property
    def global_batch(self) -> int:
        """Pictures per optimizer step."""
        return self.batch_per_worker * self.accumulate * self.max_workers

    @property
    def worker_counts(self) -> tuple[int, ...]:
        """How many workers the run may go on with: those that share a micro-batch evenly, fewest first."""
        every = range(self.min_workers, self.max_workers + 1)
        return tuple(count for count in every if self.batch_per_worker * self.max_workers % count == 0)

    def worker_batch(self, workers: int) -> int:
        """Pictures per worker and micro-batch when so many workers share it."""
        return self.batch_per_worker * self.max_workers // workers

    def chunks(self, workers: int) -> int:
        """Parts that a worker's micro-batch is cut into when so many workers share it."""
        most = self.chunk or self.batch_per_worker
        return -(-self.worker_batch(workers) // max(2, most))

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        steps = self.epochs * steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)
