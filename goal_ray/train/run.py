"""The driver of a training run: checks everything, starts Ray Train, shows one progress line, writes the run folder."""

import json
import os
import shutil
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from goal_ray.config import load_config, to_tree, to_yaml
from goal_ray.errors import GoalRayError, StageError
from goal_ray.order import BatchOrder
from goal_ray.ray_session import ray_session
from goal_ray.shards import expand_shards
from goal_ray.train.checkpoint import checkpoint_folders, read_step
from goal_ray.train.config import TrainConfig
from goal_ray.train.ingest import scan_shards
from goal_ray.train.loop import Job, train_worker, use_all_cpus

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
QUARANTINE_FILE = "quarantine.jsonl"
RESULT_FILE = "result.json"
EXPORT_FOLDER = "model"
RESUMABLE_CHANGES = (
    "workers",
    "batch_per_worker",
    "accumulate",
    "zero_stage",
    "device",
    "checkpoint_every",
    "log_every",
)


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
    urls = tuple(expand_shards(config.data.shards))
    # Workers start in folders of their own: every local path they get must be absolute.
    config = replace(config, model=replace(config.model, name=absolute_if_path(config.model.name)))
    run_dir = Path(config.storage_path).absolute() / config.name
    resume_from = prepare_run(run_dir, config, resume)
    with ray_session(busy_cpus=config.workers):
        counts, bad = scan_shards(tuple(map(absolute_if_path, urls)), config.loss.needs_pairs)
        check_share(bad, sum(counts), config.data.max_bad_share)
        order = BatchOrder(tuple(counts), config.global_batch, config.seed, config.data.shuffle_shards)
        total_steps = config.total_steps(order.steps_per_epoch)
        first_step = 0 if resume_from is None else read_step(resume_from)
        with RunRecorder(run_dir, first_step, total_steps) as recorder:
            recorder.quarantine(bad)
            if first_step < total_steps:
                job = {
                    "config": config,
                    "run_dir": run_dir,
                    "urls": tuple(map(absolute_if_path, urls)),
                    "counts": tuple(counts),
                    "resume_from": resume_from,
                }
                run_workers(job, config, recorder)
    model_dir = export_model(checkpoint_folders(run_dir)[-1], run_dir / EXPORT_FOLDER)
    seconds = add_seconds(run_dir / RESULT_FILE, total_steps, time.perf_counter() - began)
    return TrainResult(run_dir, model_dir, total_steps, seconds)


def add_seconds(path: Path, steps: int, seconds: float) -> float:
    """Adds this call's time to the run's and stores it. A call that found the run complete adds nothing."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"steps": 0, "seconds": 0.0}
    total = before["seconds"] if before["steps"] == steps else before["seconds"] + seconds
    path.write_text(json.dumps({"steps": steps, "seconds": round(total, 1)}), encoding="utf-8")
    return total


def absolute_if_path(name: str) -> str:
    """An absolute path for a local file or folder that exists; anything else (a URL, a model's name) unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def prepare_run(run_dir: Path, config: TrainConfig, resume: bool) -> Path | None:
    """Makes the run folder, or checks that an old one may go on. Returns the checkpoint to go on from, if any."""
    stored = run_dir / CONFIG_FILE
    if stored.exists() and not resume:
        raise StageError(f"{run_dir} already holds a run; add --resume to go on with it, or choose another name")
    if stored.exists():
        old, new = to_tree(load_config(TrainConfig, stored)), to_tree(config)
        changed = [key for key in new if new[key] != old[key] and key not in RESUMABLE_CHANGES]
        if changed or load_config(TrainConfig, stored).global_batch != config.global_batch:
            what = ", ".join(changed) or "the global batch"
            raise StageError(f"{run_dir} was started with other settings ({what}); resume with the same, or start anew")
    run_dir.mkdir(parents=True, exist_ok=True)
    stored.write_text(to_yaml(config), encoding="utf-8")
    folders = checkpoint_folders(run_dir)
    return folders[-1] if folders else None


def check_share(bad: list[dict[str, str]], usable: int, max_bad_share: float) -> None:
    """Raises StageError when too many samples are unusable to go on quietly."""
    if len(bad) > max_bad_share * (usable + len(bad)):
        first = bad[0]
        raise StageError(
            f"{len(bad)} of {usable + len(bad)} samples are unusable, more than data.max_bad_share={max_bad_share}; "
            f"the first: {first['shard']}: {first['reason']}"
        )


def run_workers(job: dict[str, Any], config: TrainConfig, recorder: "RunRecorder") -> None:
    """Starts Ray Train and shows what rank 0 sends until all workers are done."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    os.environ.setdefault("RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS", "0")
    use_gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    check_resources(config.workers, use_gpu, ray.cluster_resources())
    queue = Queue(actor_options={"num_cpus": 0})
    stop = threading.Event()
    listener = threading.Thread(target=listen, args=(queue, recorder, stop), daemon=True)
    listener.start()
    trainer = TorchTrainer(
        worker_entry,
        train_loop_config={**job, "queue": queue, "use_gpu": use_gpu},
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=use_gpu),
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=RunConfig(name="ray", storage_path=str(job["run_dir"])),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise first_own_error(error) from error
    finally:
        stop.set()
        listener.join()
        queue.shutdown()


def check_resources(workers: int, use_gpu: bool, available: dict[str, float]) -> None:
    """Raises StageError where Ray would wait forever for resources the cluster does not have."""
    gpus, cpus = available.get("GPU", 0), available.get("CPU", 0)
    if use_gpu and gpus < workers:
        raise StageError(
            f"{workers} workers need {workers} GPUs, the cluster has {gpus:g}; lower `workers` or device=cpu"
        )
    if cpus < workers + 1:
        raise StageError(f"{workers} workers and the ingest need {workers + 1} CPUs, the cluster has {cpus:g}")


def worker_entry(settings: dict[str, Any]) -> None:
    """Ray Train's entry point: joins the process group to DeepSpeed and runs the loop."""
    import logging
    import warnings

    os.environ["DS_ACCELERATOR"] = "cuda" if settings["use_gpu"] else "cpu"
    warnings.filterwarnings("ignore")
    import deepspeed
    import ray.train
    import ray.train.torch

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    context = ray.train.get_context()
    if not settings["use_gpu"]:
        use_all_cpus(context.get_local_world_size())
    deepspeed.init_distributed(
        dist_backend="nccl" if settings["use_gpu"] else "gloo", auto_mpi_discovery=False, verbose=False
    )
    queue = settings["queue"]
    fields = {name: settings[name] for name in ("config", "run_dir", "urls", "counts", "resume_from")}
    job = Job(**fields, send=lambda record: queue.actor.put_nowait.remote(record))
    train_worker(job, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())


def first_own_error(error: BaseException) -> BaseException:
    """The GoalRayError a worker raised, dug out of Ray's wrappings; the error itself where there is none."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop()
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, GoalRayError):
            return current
        waiting += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        waiting += list(getattr(current, "worker_failures", {}).values())
    return error


def listen(queue: Any, recorder: "RunRecorder", stop: threading.Event) -> None:
    """Hands records from the queue to the recorder until told to stop and the queue is empty."""
    from ray.util.queue import Empty

    while True:
        finishing = stop.is_set()
        try:
            while True:
                recorder.record(queue.get(timeout=0.5))
        except Empty:
            if finishing:
                return


class RunRecorder:
    """Writes a run's metrics (JSONL and TensorBoard) and quarantine, and draws its progress line."""

    def __init__(self, run_dir: Path, first_step: int, total_steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.run_dir = run_dir
        keep_steps(run_dir / METRICS_FILE, first_step)
        self.metrics: TextIO = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc=f"train {run_dir.name}", unit="step", dynamic_ncols=True
        )
        self.known_bad: set[tuple[str, str]] = set()

    def __enter__(self) -> "RunRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.metrics.close()
        self.board.close()
        self.bar.close()

    def record(self, message: dict[str, Any]) -> None:
        """Takes one record from a worker: a log line, or bad samples."""
        if "bad" in message:
            self.quarantine(message["bad"])
            return
        self.metrics.write(json.dumps(message) + "\n")
        self.metrics.flush()
        for name, value in message.items():
            if name not in ("step", "total_steps") and value is not None:
                self.board.add_scalar(f"train/{name}", value, message["step"])
        self.bar.set_postfix_str(describe_step(message), refresh=False)
        self.bar.update(message["step"] - self.bar.n)

    def quarantine(self, records: list[dict[str, str]]) -> None:
        """Appends samples that were not met before to the run's quarantine."""
        with (self.run_dir / QUARANTINE_FILE).open("a", encoding="utf-8") as file:
            for record in records:
                if (record["shard"], record["key"]) not in self.known_bad:
                    self.known_bad.add((record["shard"], record["key"]))
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def keep_steps(path: Path, last_step: int) -> None:
    """Drops log lines beyond a step: what came after the checkpoint that a run goes on from will be logged again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= last_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def describe_step(record: dict[str, Any]) -> str:
    """The progress line's tail: the loss and its terms, rate and speed."""
    terms = " ".join(
        f"{label} {record[key]:.3f}"
        for label, key in (
            ("global", "loss_global"),
            ("local", "loss_local"),
            ("tsl", "loss_tsl_image"),
            ("txt", "loss_tsl_text"),
        )
        if record[key]
    )
    return f"loss {record['loss']:.3f} ({terms}) lr {record['lr']:.1e} {record['images_per_s']:.1f} img/s"


def export_model(checkpoint: Path, target: Path) -> Path:
    """Copies a checkpoint's open_clip files to a folder that plain open_clip loads as `local-dir:`."""
    from goal_ray.model import CONFIG_FILE as MODEL_CONFIG
    from goal_ray.model import WEIGHTS_FILE

    target.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_CONFIG, WEIGHTS_FILE):
        shutil.copyfile(checkpoint / name, target / name)
    return target
