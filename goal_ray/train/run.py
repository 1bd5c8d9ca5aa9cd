"""The driver of a training run: checks everything, starts Ray Train, shows one progress line, writes the run folder."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from goal_ray.config import load_config, to_tree, to_yaml
from goal_ray.errors import ConfigError, GoalRayError, StageError
from goal_ray.model import CONFIG_FILE as MODEL_CONFIG_FILE
from goal_ray.model import WEIGHTS_FILE
from goal_ray.order import BatchOrder
from goal_ray.ray_session import ray_session
from goal_ray.tars import expand_shards, shard_name
from goal_ray.train.checkpoint import check_checkpoint, checkpoint_folders, read_step
from goal_ray.train.config import TrainConfig
from goal_ray.train.recorder import METRICS_FILE, ProgressLine, RunRecorder
from goal_ray.train.scan import QUARANTINE_FILE, describe_bad, scan_shards
from goal_ray.train.worker import worker_entry
from kernels.tsl import choose_backend

__all__ = ["CONFIG_FILE", "METRICS_FILE", "QUARANTINE_FILE", "RESULT_FILE", "TrainResult", "train"]
CONFIG_FILE = "config.yaml"
SHARDS_FILE = "shards.json"
RESULT_FILE = "result.json"
EXPORT_FOLDER = "model"
RESUMABLE_CHANGES = {
    "data.shards",  # moved, that is: names and counts are compared
    "data.max_bad_share",
    "workers",
    "batch_per_worker",
    "accumulate",
    "zero_stage",
    "device",
    "checkpoint_every",
    "log_every",
    "storage_path",
}


@dataclass(frozen=True)
class TrainResult:
    """run_dir: the run's folder · model_dir: the exported open_clip model · seconds: wall time, resumed calls added."""

    run_dir: Path
    model_dir: Path
    steps: int
    seconds: float


def train(config: TrainConfig, resume: bool = False) -> TrainResult:
    """Runs (or goes on with) a training run. Raises GoalRayError before any work for settings that cannot run."""
    began = time.perf_counter()
    # Workers start in folders of their own: every local path they get must be absolute.
    config = replace(
        config,
        model=replace(config.model, name=absolute_if_path(config.model.name)),
        data=replace(config.data, shards=absolute_if_path(config.data.shards)),
    )
    urls = tuple(map(absolute_if_path, expand_shards(config.data.shards)))
    run_dir = Path(config.storage_path).absolute() / config.name
    resume_from = check_run(run_dir, config, resume)
    with ProgressLine(config.name) as line:
        line.show("starting Ray")
        with ray_session(busy_cpus=config.workers):
            line.show("scanning the shards")
            counts, bad = scan_shards(urls, config.loss.needs_pairs)
            samples = sum(counts) + len(bad)
            check_share(bad, samples, config.data.max_bad_share)
            order = BatchOrder(tuple(counts), config.global_batch, config.seed, config.data.shuffle_shards)
            total_steps = config.total_steps(order.steps_per_epoch)
            first_step = 0 if resume_from is None else read_step(resume_from)
            use_gpu = choose_gpu(config)
            check_backend(config, use_gpu)
            line.begin(first_step, total_steps)
            write_run(run_dir, config, {shard_name(url): count for url, count in zip(urls, counts, strict=True)})
            with RunRecorder(run_dir, first_step, line, began) as recorder:
                recorder.quarantine(bad)
                if first_step < total_steps:
                    job = {
                        "config": config,
                        "run_dir": run_dir,
                        "urls": urls,
                        "counts": tuple(counts),
                        "resume_from": resume_from,
                        "bad_allowed": int(config.data.max_bad_share * samples) - len(bad),
                    }
                    run_workers(job, config.workers, use_gpu, recorder)
                    recorder.count_time()
                    check_share(list(recorder.bad.values()), samples, config.data.max_bad_share)
    model_dir = export_model(checkpoint_folders(run_dir)[-1], run_dir / EXPORT_FOLDER)
    result = run_dir / RESULT_FILE
    if first_step < total_steps or not result.exists():
        result.write_text(json.dumps({"steps": total_steps, "seconds": round(recorder.seconds, 1)}), encoding="utf-8")
    return TrainResult(run_dir, model_dir, total_steps, json.loads(result.read_text(encoding="utf-8"))["seconds"])


def absolute_if_path(name: str) -> str:
    """An absolute path for a local file or folder that exists; anything else (a URL, a model's name) unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def check_run(run_dir: Path, config: TrainConfig, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any. Raises StageError for a run that may not start or go on; writes nothing."""
    stored = run_dir / CONFIG_FILE
    if not resume:
        if stored.exists():
            raise StageError(f"{run_dir} already holds a run; add --resume to go on with it, or choose another name")
        return None
    if not stored.exists():
        raise StageError(f"{run_dir} holds no run to go on with; leave out --resume, or mend storage_path and name")
    old = load_config(TrainConfig, stored)
    before, now = flatten(to_tree(old)), flatten(to_tree(config))
    changed = [
        f"{key}={now.get(key)}, it was {before.get(key)}"
        for key in sorted({*before, *now} - RESUMABLE_CHANGES)
        if before.get(key) != now.get(key)
    ]
    if old.global_batch != config.global_batch:
        changed.append(f"a global batch of {config.global_batch}, it was {old.global_batch}")
    if changed:
        raise StageError(f"{run_dir} was started with other settings ({'; '.join(changed)}); use those, or start anew")
    folders = checkpoint_folders(run_dir)
    if not folders:
        return None
    check_checkpoint(folders[-1])
    return folders[-1]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree's leaves by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


def write_run(run_dir: Path, config: TrainConfig, counts: dict[str, int]) -> None:
    """Stores the run's settings and data. Raises StageError where the data differ from those the run started with."""
    shards = run_dir / SHARDS_FILE
    if shards.exists():
        before = json.loads(shards.read_text(encoding="utf-8"))
        if before != counts:
            other = sorted(name for name, _ in before.items() ^ counts.items())
            raise StageError(
                f"the shards are not those that {run_dir} started with (names and counts in {shards}): "
                f"{', '.join(other[:3])}{', ...' if len(other) > 3 else ''} differ; use the same data, or start anew"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    shards.write_text(json.dumps(counts, indent=0), encoding="utf-8")
    (run_dir / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")


def check_share(bad: list[dict[str, str]], samples: int, max_bad_share: float) -> None:
    """Raises StageError when too many of the samples are unusable to go on quietly."""
    if len(bad) > max_bad_share * samples:
        raise StageError(
            f"{len(bad)} of {samples} samples are unusable, more than data.max_bad_share={max_bad_share}; "
            f"the first: {describe_bad(bad[0])}"
        )


def run_workers(job: dict[str, Any], workers: int, use_gpu: bool, recorder: RunRecorder) -> None:
    """Starts Ray Train and records what the workers send until all of them are done.

    Ray Train runs in a thread of its own: from the main thread it would take over Ctrl-C.
    """
    # A restart by Ray itself would begin at the old checkpoint: going on is for --resume.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Empty, Queue

    recorder.line.show(f"starting {workers} {'worker' if workers == 1 else 'workers'}")
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        partial(worker_entry, job, queue, use_gpu),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name="ray", storage_path=str(job["run_dir"])),
    )
    failures: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        finished = False
        while not finished:
            finished = not thread.is_alive()
            try:
                while True:
                    recorder.record(queue.get(timeout=0.5))
            except Empty:
                recorder.line.tick()
    finally:
        queue.shutdown()
    if failures:
        raise own_error(failures[0], job["run_dir"]) from failures[0]


def choose_gpu(config: TrainConfig) -> bool:
    """Whether workers run on GPUs. Raises StageError where Ray would wait forever for what the cluster lacks."""
    import ray

    available, workers = ray.cluster_resources(), config.workers
    gpus, cpus = available.get("GPU", 0), available.get("CPU", 0)
    use_gpu = config.device == "cuda" or (config.device == "auto" and gpus > 0)
    if use_gpu and gpus < workers:
        raise StageError(
            f"{workers} workers need {workers} GPUs, the cluster has {gpus:g}; lower `workers` or set device=cpu"
        )
    if cpus < workers + 1:
        raise StageError(
            f"{workers} workers and the ingest need {workers + 1} CPUs, the cluster has {cpus:g}; lower `workers`"
        )
    return use_gpu


def check_backend(config: TrainConfig, use_gpu: bool) -> None:
    """Raises ConfigError for a TSL backend that the workers' devices cannot run."""
    try:
        choose_backend(config.loss.tsl_backend, "cuda" if use_gpu else "cpu")
    except ValueError as error:
        raise ConfigError(f"loss.tsl_backend: {error}") from None


def own_error(error: BaseException, run_dir: Path) -> BaseException:
    """What to raise for Ray's error: a worker's GoalRayError, a StageError for its death, else the error itself."""
    from ray.exceptions import RayActorError

    inside = list(unwrapped(error))
    for cause in inside:
        if isinstance(cause, GoalRayError):
            return cause
    for cause in inside:
        if isinstance(cause, RayActorError):
            return StageError(
                f"a training worker died ({str(cause).strip().splitlines()[0]}); the memory may have run out: lower "
                f"batch_per_worker, then go on with --resume; Ray's logs say more; run folder: {run_dir}"
            )
    return error


def unwrapped(error: BaseException) -> Iterator[BaseException]:
    """The error and all that Ray wrapped into it."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        waiting += [current.__cause__, current.__context__]
        waiting += [getattr(current, name, None) for name in ("cause", "health_check_failure", "controller_failure")]
        waiting += list(getattr(current, "worker_failures", {}).values())


def export_model(checkpoint: Path, target: Path) -> Path:
    """Copies a checkpoint's open_clip files to a folder that plain open_clip loads as `local-dir:`."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_CONFIG_FILE, WEIGHTS_FILE):
        shutil.copyfile(checkpoint / name, target / name)
    return target
