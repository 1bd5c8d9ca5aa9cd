"""The driver of a training run: checks everything, trains, shows one progress line, writes the run folder."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from goal_ray.atomic import open_atomic, remove_abandoned, write_bytes
from goal_ray.checkpoints import (
    CHUNK_BYTES,
    OPTIMIZER_FILE,
    STATE_FILE,
    checkpoint_folders,
    file_mark,
    find_damage,
    newest_intact,
    prune_checkpoints,
    remove_partial,
    saved_log,
    step_of,
)
from goal_ray.config import load_config, to_yaml
from goal_ray.cores import usable_cores
from goal_ray.errors import StageError
from goal_ray.order import BatchOrder
from goal_ray.ray_session import is_joined, keep_ray_data_here, quiet_ray_data, ray_session
from goal_ray.run_folder import (
    CONFIG_FILE,
    MODEL_FOLDER,
    RESULT_FILE,
    SHARDS_FILE,
    best_checkpoint,
    read_result,
    write_result,
)
from goal_ray.settings import OPEN_CLIP_CONFIG
from goal_ray.shard_urls import expand_shards, shard_name
from goal_ray.train.attempts import Attempts, Ending
from goal_ray.train.checks import (
    check_backend,
    check_evaluation,
    check_held_out,
    check_room,
    check_run,
    check_share,
    choose_gpu,
)
from goal_ray.train.config import TrainConfig
from goal_ray.train.cost import Cost
from goal_ray.train.driver_lock import DriverLock, driver_lock
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.loggers import open_loggers
from goal_ray.train.metrics import Metrics
from goal_ray.train.recorder import ProgressLine, RunRecorder
from goal_ray.train.scan import scan_shards


@dataclass(frozen=True)
class TrainResult:
    """What a run ends with.

    run_dir    the run's folder
    model_dir  the exported open_clip model, of the best checkpoint where there is an evaluation, else of the last
    steps      optimizer steps done
    seconds    wall time, resumed calls added
    cost       the run's cost on one line
    best_step  the step of the best checkpoint; None without an evaluation
    """

    run_dir: Path
    model_dir: Path
    steps: int
    seconds: float
    cost: str
    best_step: int | None = None


def train(config: TrainConfig, resume: bool | None = False) -> TrainResult:
    """Runs (or goes on with) a training run. Raises GoalRayError before any work for settings that cannot run.

    resume  whether the run is to go on; None: if it exists

    SIGTERM and Ctrl-C make it save a checkpoint and end with a StageError that says how to go on.
    """
    began = time.perf_counter()
    # Workers start in folders of their own: every local path they get must be absolute.
    held_out = config.evaluation.shards
    config = replace(
        config,
        model=replace(
            config.model,
            name=absolute_if_path(config.model.name),
            weights=config.model.weights and absolute_if_path(config.model.weights),
        ),
        data=replace(config.data, shards=absolute_pattern(config.data.shards)),
        evaluation=replace(config.evaluation, shards=held_out and absolute_pattern(held_out)),
    )
    # By name alone: the order of the samples must not depend on where the tars lie.
    urls = tuple(sorted(expand_shards(config.data.shards), key=shard_name))
    held_out_urls = [] if config.evaluation.shards is None else expand_shards(config.evaluation.shards)
    run_dir = Path(config.storage_path).absolute() / config.name
    resume = (run_dir / CONFIG_FILE).exists() if resume is None else resume
    check_run(run_dir, config, resume)
    if resume and is_complete(run_dir, config):
        print(f"{run_dir} is complete", file=sys.stderr)
        return finished_run(run_dir)
    if not checkpoint_folders(run_dir):  # a checkpoint needs them no more
        from goal_ray.weights import check_model  # here: it takes seconds to import

        check_model(config.model, "model")
    if held_out_urls:
        check_held_out(held_out_urls[0], config.evaluation.pairs)
    check_room(run_dir)
    workers = max(config.min_workers, min(config.max_workers, usable_cores()))
    busy_cpus = workers + (config.evaluation.cpus if held_out else 0)
    with ProgressLine(str(run_dir)) as line, driver_lock(run_dir, line.say) as lock:
        resume_from = newest_intact(run_dir, line.say) if resume else None
        remove_partial(run_dir)
        line.show("starting Ray")
        try:
            # In this order: Ray sets a handler of its own.
            with ray_session(busy_cpus), interruption(line.say) as interrupted:
                train_on_cluster(config, urls, run_dir, resume_from, line, interrupted, lock, began)
        except OSError as error:
            again = "go on with --resume" if os.path.exists(run_dir / CONFIG_FILE) else "start it again"
            raise StageError(
                f"{type(error).__name__}: {error}; run folder: {run_dir}; mend it, then {again}"
            ) from error
    return finished_run(run_dir)


def is_complete(run_dir: Path, config: TrainConfig) -> bool:
    """Whether a run has ended, was asked for nothing else since, and its best checkpoint is there and whole."""
    result = read_result(run_dir)
    if not result or load_config(TrainConfig, run_dir / CONFIG_FILE) != config:
        return False
    best = best_checkpoint(run_dir)
    return find_damage(best) is None and result.get("best_step") in (None, step_of(best))


def finished_run(run_dir: Path) -> TrainResult:
    """What a run has come to, its model exported. Raises StageError where that model is damaged."""
    result, checkpoint = read_result(run_dir), best_checkpoint(run_dir)
    damage = find_damage(checkpoint, model_only=True)
    if damage is not None:
        raise StageError(f"{checkpoint} is damaged ({damage}); delete it, then go on with --resume")
    model_dir = export_model(checkpoint, run_dir / MODEL_FOLDER)
    best_step = None if result.get("best_step") is None else step_of(checkpoint)
    return TrainResult(run_dir, model_dir, result["steps"], result["seconds"], Cost.read(run_dir).line(), best_step)


def train_on_cluster(
    config: TrainConfig,
    urls: tuple[str, ...],
    run_dir: Path,
    resume_from: Path | None,
    line: ProgressLine,
    interrupted: threading.Event,
    lock: DriverLock,
    began: float,
) -> None:
    """Scans, trains and evaluates in a Ray session, and stores the result.

    A run that came to its end, or ran out of patience and still would, is only evaluated.
    """
    if is_joined():
        quiet_ray_data(preserve_order=True)
        keep_ray_data_here()
    line.show("scanning the shards")
    counts, bad, indexes = scan_shards(urls, config.loss.needs_pairs)
    samples = sum(counts) + len(bad)
    check_share(bad, samples, config.data.max_bad_share)
    order = BatchOrder(tuple(counts), config.global_batch, config.seed, config.data.shuffle_shards)
    total_steps = config.total_steps(order.steps_per_epoch)
    first_step = 0 if resume_from is None else step_of(resume_from)
    use_gpu = choose_gpu(config)
    check_backend(config, use_gpu)
    check_evaluation(config, use_gpu, line.say)
    line.begin(first_step, total_steps)
    if resume_from is None and config.model.weights is None and not Path(config.model.name).is_dir():
        line.say("model.weights is empty: the model starts from random weights")
    if config.batch_per_worker == 1:
        line.say("batch_per_worker is 1: an unreadable sample leaves a micro-batch empty, which ends the run")
    if total_steps <= config.optimizer.warmup_steps:
        line.say(
            f"the learning rate rises to the end: {total_steps} steps are not more than "
            f"optimizer.warmup_steps={config.optimizer.warmup_steps}; lower that"
        )
    write_run(run_dir, config, {shard_name(url): count for url, count in zip(urls, counts, strict=True)})
    with RunRecorder(run_dir, line, open_loggers(run_dir, config), Metrics(str(run_dir)), began) as recorder:
        recorder.quarantine(bad)
        evaluations = Evaluations(run_dir, config.evaluation, recorder.evaluated, line.say)
        most_bad = int(config.data.max_bad_share * samples)
        job = {
            "config": config,
            "run_dir": run_dir,
            "urls": urls,
            "counts": tuple(counts),
            "indexes": indexes,
            "bad_allowed": most_bad - len(bad),
            "total_steps": total_steps,
        }
        if resume_from is not None and (first_step == total_steps or evaluations.out_of_patience):
            recorder.rewind(first_step, saved_log(resume_from))
            ending: Ending = "finished" if first_step == total_steps else "early"
        else:
            attempts = Attempts(config, job, most_bad, use_gpu, recorder, evaluations, interrupted, lock)
            ending = attempts.run(resume_from)
        step = step_of(checkpoint_folders(run_dir)[-1])
        if ending == "interrupted":
            raise StageError(f"interrupted after step {step} of {total_steps}, which is saved; go on with --resume")
        check_share(list(recorder.bad.values()), samples, config.data.max_bad_share)
        if config.evaluation.shards is not None:
            line.show("evaluating")
        if not evaluations.finish(line.tick, interrupted.is_set, config.wait_for_nodes_s):
            raise StageError(f"interrupted before all {evaluations.left} evaluations; go on with --resume")
        prune_checkpoints(run_dir, config.keep_checkpoints, evaluations.needed)
        recorder.count_time()
        write_result(run_dir, step, recorder.seconds, ending, evaluations.best)


@contextmanager
def interruption(say: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set within the block; the first one only, so that a second ends the process."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def handle(number: int, frame: object) -> None:  # noqa: ARG001
        event.set()
        restore()
        say("saving a checkpoint, to go on from with --resume; a second signal ends at once")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        restore()


def absolute_pattern(spec: str) -> str:
    """A file, folder, glob or brace pattern with its folder; an address unchanged."""
    return spec if "://" in spec else os.path.abspath(spec)


def absolute_if_path(name: str) -> str:
    """An absolute path for a local file or folder that exists; anything else (a URL, a model's name) unchanged."""
    return os.path.abspath(name) if os.path.exists(name) else name


def write_run(run_dir: Path, config: TrainConfig, counts: dict[str, int]) -> None:
    """Stores the settings and data of a run that starts or goes on, which has no result until it ends.

    Raises StageError where the data differ from those the run started with.
    """
    shards = run_dir / SHARDS_FILE
    if shards.exists():
        before = json.loads(shards.read_text(encoding="utf-8"))
        if list(before.items()) != list(counts.items()):
            other = sorted(name for name, _ in before.items() ^ counts.items())
            what = (
                f"{', '.join(other[:3])}{', ...' if len(other) > 3 else ''} differ" if other else "their order differs"
            )
            raise StageError(
                f"the shards are not those that {run_dir} started with (names and counts in {shards}): {what}; use "
                "the same data, or start anew"
            )
    run_dir.mkdir(parents=True, exist_ok=True)
    # Before the settings: an earlier call's result beside those of this one would tell that the run is complete.
    (run_dir / RESULT_FILE).unlink(missing_ok=True)
    write_bytes(str(shards), json.dumps(counts, indent=0).encode())
    write_bytes(str(run_dir / CONFIG_FILE), to_yaml(config).encode())


def export_model(checkpoint: Path, target: Path) -> Path:
    """Copies a checkpoint's open_clip files to a folder that plain open_clip loads as `local-dir:`.

    Each appears complete, in place of one that may be in use; those that are there already are not touched.
    """
    remove_abandoned(str(target))
    files = {path.name: path for path in checkpoint.iterdir() if path.name not in (OPTIMIZER_FILE, STATE_FILE)}
    # Weights first: where there is a config, open_clip reads both.
    for name in sorted(files, key=lambda name: (name == OPEN_CLIP_CONFIG, name)):
        source, copied = files[name], target / name
        if not copied.exists() or file_mark(copied) != file_mark(source):
            with source.open("rb") as data, open_atomic(str(copied)) as file:
                shutil.copyfileobj(data, file, CHUNK_BYTES)
    return target
