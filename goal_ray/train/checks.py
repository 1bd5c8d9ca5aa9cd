"""What a training refuses before any work: settings, folders, data and clusters that it cannot run with."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goal_ray.bad_samples import describe_bad
from goal_ray.checkpoints import checkpoint_folders
from goal_ray.config import load_config, to_tree
from goal_ray.errors import ConfigError, StageError
from goal_ray.jsonl import read_records
from goal_ray.ray_session import is_joined
from goal_ray.run_folder import CONFIG_FILE, HISTORY_FILE
from goal_ray.train.config import TrainConfig
from goal_ray.train.places import cluster_resources, lacking, most_workers, node_resources
from goal_ray.train.scan import scan_shard

RESUMABLE_CHANGES = {
    "data.shards",  # moved, that is: names and counts are compared
    "data.max_bad_share",
    "optimizer.lr",
    "workers",
    "worker_resources",
    "batch_per_worker",
    "chunk",
    "accumulate",
    "zero_stage",
    "offload",
    "step.sdpa",
    "step.compile",
    "step.checkpoint_activations",
    "step.channels_last",
    "step.text_multiple",
    "step.fused_adamw",
    "device",
    "wait_for_nodes_s",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "log_every",
    "wandb",
    "evaluation.metric",
    "evaluation.cpus",
    "evaluation.gpus",
    "evaluation.patience",
    "storage_path",
}
# Results on other samples, or with other pairs, are no points of the same curve.
RESUMABLE_BEFORE_EVALUATIONS = {"evaluation.shards", "evaluation.pairs"}


def check_room(run_dir: Path) -> None:
    """Raises StageError where no run folder can be made; leaves nothing behind."""
    there = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".goal_ray-", dir=there):
            pass
    except OSError as error:
        raise StageError(f"storage_path: {run_dir} cannot be made or written to: {error}; choose another") from None


def check_run(run_dir: Path, config: TrainConfig, resume: bool) -> None:
    """Raises StageError for a run that may not start or go on; writes nothing."""
    stored = run_dir / CONFIG_FILE
    if not resume:
        if stored.exists():
            raise StageError(f"{run_dir} already holds a run; add --resume to go on with it, or choose another name")
        return
    if not stored.exists():
        raise StageError(f"{run_dir} holds no run to go on with; leave out --resume, or mend storage_path and name")
    old = load_config(TrainConfig, stored)
    before, now = flatten(to_tree(old)), flatten(to_tree(config))
    resumable = RESUMABLE_CHANGES | (set() if read_records(run_dir / HISTORY_FILE) else RESUMABLE_BEFORE_EVALUATIONS)
    changed = [
        f"{key}={now.get(key)}, it was {before.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not {key, key.partition(".")[0]} & resumable
    ]
    if old.global_batch != config.global_batch:
        changed.append(f"a global batch of {config.global_batch}, it was {old.global_batch}")
    if changed and checkpoint_folders(run_dir):  # without any, nothing depends on the old ones
        raise StageError(f"{run_dir} was started with other settings ({'; '.join(changed)}); use those, or start anew")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def check_share(bad: list[dict[str, str]], samples: int, max_bad_share: float) -> None:
    """Raises StageError when too many of the samples are unusable to go on quietly."""
    if len(bad) > max_bad_share * samples:
        raise StageError(
            f"{len(bad)} of {samples} samples are unusable, more than data.max_bad_share={max_bad_share}; mend them, "
            f"or raise that; the first: {describe_bad(bad[0])}"
        )


def choose_gpu(config: TrainConfig) -> bool:
    """Whether workers run on GPUs. Raises StageError where Ray would wait forever for what a private cluster lacks."""
    available = cluster_resources()
    use_gpu = config.device == "cuda" or (config.device == "auto" and available.get("GPU", 0) > 0)
    if not is_joined() and (lack := lacking(config, use_gpu, config.worker_counts[0], available)):
        raise StageError(f"{lack}; lower `workers`" + (" or set device=cpu" if use_gpu else ""))
    return use_gpu


def check_backend(config: TrainConfig, use_gpu: bool) -> None:
    """Raises ConfigError for a TSL backend that the workers' devices cannot run."""
    if config.loss.tsl_backend != "triton":  # the others run everywhere, and the import takes seconds
        return
    from kernels.tsl import choose_backend

    try:
        choose_backend(config.loss.tsl_backend, "cuda" if use_gpu else "cpu")
    except ValueError as error:
        raise ConfigError(f"loss.tsl_backend: {error}") from None


def check_held_out(url: str, pairs: int) -> None:
    """Raises StageError for a held-out tar without a sample that can be evaluated: the first evaluation comes late."""
    index = scan_shard(url, needs_pairs=pairs > 0)
    if index.bad and not len(index):
        remedy = ", or set evaluation.pairs=0" if pairs else ""
        raise StageError(
            f"evaluation.shards: none of the {len(index.bad)} samples of {url} can be evaluated; mend them{remedy}; "
            f"the first: {describe_bad(index.bad[0])}"
        )


def check_evaluation(config: TrainConfig, use_gpu: bool, say: Callable[[str], None]) -> None:
    """Raises StageError where a private cluster lacks what an evaluation needs beside the workers: it would wait.

    A cluster that was joined may grow, so there it is only said where no node suffices.
    """
    wanted = config.evaluation
    if wanted.shards is None:
        return
    if is_joined():
        nodes = node_resources()
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.bundle.items()) for node in nodes):
            say(
                f"no node has the {wanted.needs} that an evaluation needs: evaluations wait for the cluster to grow; "
                "should it not, lower evaluation.cpus or evaluation.gpus"
            )
        return
    there = cluster_resources()
    cpus, gpus = there.get("CPU", 0), there.get("GPU", 0)
    if use_gpu:
        gpus -= most_workers(config, use_gpu, there) or 0
    if cpus < wanted.cpus or gpus < wanted.gpus:
        raise StageError(
            f"an evaluation needs {wanted.cpus:g} CPUs and {wanted.gpus:g} GPUs, and there are {cpus:g} and, beside "
            f"the workers', {gpus:g}; lower evaluation.cpus, evaluation.gpus or `workers`"
        )
