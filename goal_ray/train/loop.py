"""What every training worker runs: build, resume, step, log, save."""

import json
import platform
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from goal_ray.atomic import write_bytes
from goal_ray.bad_samples import describe_bad
from goal_ray.batches import ExampleBuilder
from goal_ray.checkpoints import step_of
from goal_ray.errors import StageError
from goal_ray.flops import peak_flops, step_flops
from goal_ray.geometry import PixelGeometry
from goal_ray.gradcache import cached_gradients
from goal_ray.losses import GoalModel
from goal_ray.model import LoadedModel, load_model
from goal_ray.order import BatchOrder
from goal_ray.precision import Precision, dtype, full_fp32
from goal_ray.run_folder import QUARANTINE_FILE
from goal_ray.settings import ModelConfig, ResizeConfig
from goal_ray.step import prepare_step
from goal_ray.text import CaptionEncoder
from goal_ray.train.config import TrainConfig
from goal_ray.train.engine import build_engine, freeze_tower, set_learning_rate
from goal_ray.train.feed import Feed, MicroBatch
from goal_ray.train.ingest import BatchReader, pickled, stream_batches
from goal_ray.train.scan import own_scan
from goal_ray.train.state import CheckpointWriter, allocate_averages, load_averages
from goal_ray.train.window import LogWindow

KEPT_RECORDS = 1000  # in a checkpoint: more than a driver can be behind


@dataclass(frozen=True)
class Job:
    """All that the driver tells its workers.

    urls, counts  tars and the usable samples in each
    indexes       Ray's references to the tars' indexes
    resume_from   checkpoint folder to go on from
    bad_allowed   how many samples may turn out unreadable before the run fails
    send          takes a record to the driver, returns at once
    stopping      whether the driver wants the run to save and end; asked on rank 0
    """

    config: TrainConfig
    run_dir: Path
    urls: tuple[str, ...]
    counts: tuple[int, ...]
    indexes: tuple[Any, ...]
    resume_from: Path | None
    bad_allowed: int
    send: Callable[[dict[str, Any]], None]
    stopping: Callable[[], bool]

    @property
    def order(self) -> BatchOrder:
        """Which sample is read when."""
        return BatchOrder(self.counts, self.config.global_batch, self.config.seed, self.config.data.shuffle_shards)


def train_worker(job: Job, rank: int, ranks: int, device: torch.device) -> None:
    """Trains on one rank of an initialised process group. Raises StageError for what the user can mend."""
    try:
        run_steps(job, rank, ranks, device)
    except torch.OutOfMemoryError as error:
        config = job.config
        shard = "a higher zero_stage, " if ranks > 1 else ""
        raise StageError(
            f"out of GPU memory on rank {rank} ({str(error).splitlines()[0]}); with batch_per_worker="
            f"{config.batch_per_worker}: set `chunk` below it, step.checkpoint_activations=true, {shard}"
            "offload=optimizer, or lower batch_per_worker and raise accumulate by as much, then go on with --resume"
        ) from None


def run_steps(job: Job, rank: int, ranks: int, device: torch.device) -> None:
    """As `train_worker`, with the framework's own errors."""
    config, order = job.config, job.order
    total_steps = config.total_steps(order.steps_per_epoch)
    job.send({"doing": "loading the model"})
    start = config.model if job.resume_from is None else ModelConfig(str(job.resume_from))
    loaded = load_model(start, config.seed)
    first_step = 0 if job.resume_from is None else step_of(job.resume_from)
    preprocess = loaded.preprocess
    preprocess["resize_mode"] = "squash" if config.data.resize.mode == "squash" else "shortest"
    builder = pickled(build_examples(config, loaded))
    multiple = config.step.text_multiple
    reader = BatchReader(job.urls, order, rank, ranks, config.accumulate, builder, job.indexes, multiple)
    packed = read_batches(job, reader, first_step * config.accumulate, total_steps * config.accumulate)
    writer = CheckpointWriter(job.run_dir, lambda step: job.send({"saved": step}))
    full_fp32()
    # The feed starts to read while the engine is built.
    with closing(Feed(packed, config.chunks(ranks), config.accumulate, device, job.stopping, multiple)) as feed:
        prepare_step(loaded.clip, config.step)
        freeze_tower(loaded.clip, config.optimizer.freeze)
        flops = FlopTable(loaded)  # ZeRO-3 hides the parameters' shapes
        model = GoalModel(loaded.clip, config.loss, preprocess["mean"], preprocess["std"], config.precision)
        engine = build_engine(model.to(device), config, ranks)
        allocate_averages(engine, first_step)
        if job.resume_from is not None:
            load_averages(job.resume_from, engine, loaded.clip)
        job.send({**describe_device(device, config.precision, ranks), "workers": ranks})
        job.send({"doing": "reading the first batches"})
        window = LogWindow(device)
        recent: deque[dict[str, Any]] = deque(maxlen=KEPT_RECORDS)

        def report(record: dict[str, Any] | None) -> None:
            """Sends a log record from rank 0, which keeps it for the next checkpoint."""
            if record is not None:
                check_finite(job, record)
                recent.append(record)
                if rank == 0:
                    job.send(record)

        batches = iter(feed)
        done = first_step
        while group := take(batches, config.accumulate, window):
            weights = config.loss.weights(done / total_steps)
            lr = config.optimizer.lr * config.optimizer.lr_factor(done, total_steps)
            set_learning_rate(engine, lr)
            for micro_batch in group:
                terms_4 = train_step(engine, micro_batch, config.loss.contrastive, weights)
                window.add(done, terms_4, micro_batch, flops.of(micro_batch))
            if not engine.was_step_applied():
                raise nonfinite(job, done)
            done += 1
            last = done == total_steps
            report(window.arrived())
            if done % config.log_every == 0 or last:
                report(window.arrived(wait=True))
                window.close(describe_progress(config, order, done, lr), weights, engine.get_global_grad_norm())
            if done % config.checkpoint_every == 0 or last:
                report(window.arrived(wait=True))
                writer.save(engine, loaded, done, list(recent))
        report(window.arrived(wait=True))
        if window.steps:  # asked to stop between two log lines
            window.close(describe_progress(config, order, done, lr), weights, engine.get_global_grad_norm())
            report(window.arrived(wait=True))
        if done % config.checkpoint_every and done < total_steps:
            writer.save(engine, loaded, done, list(recent))
        writer.wait()


def describe_progress(config: TrainConfig, order: BatchOrder, done: int, lr: float) -> dict[str, Any]:
    """The beginning of a log line after `done` steps."""
    return {
        "step": done,
        "total_steps": config.total_steps(order.steps_per_epoch),
        "epoch": round(done / order.steps_per_epoch, 4),
        "lr": lr,
    }


def take(batches: Iterator[MicroBatch], count: int, window: LogWindow) -> list[MicroBatch]:
    """The next `count` micro-batches, fewer at the end; the window's meter gets the time they took to come."""
    with window.wait.waiting():
        return list(islice(batches, count))


def train_step(engine: Any, micro_batch: MicroBatch, kind: str, weights: Sequence[float]) -> torch.Tensor:
    """One micro-batch forward and backward; an optimizer step when enough of them are in. Returns the terms (4,)."""
    chunks, counts_R4, *_ = micro_batch
    caches: Sequence[Any] = [None]
    if len(chunks) > 1:
        with torch.no_grad():
            features = [engine.module(chunk, features_only=True) for chunk in chunks]
        caches = cached_gradients(features, counts_R4, kind, weights)
    total_4 = torch.zeros(len(weights), device=chunks[0].images_B3SS.device)
    for chunk, cached in zip(chunks, caches, strict=True):
        terms_4 = engine(chunk, cached=cached)
        loss = sum(weight * term for weight, term in zip(weights, terms_4, strict=True))
        engine.backward(loss * len(chunks))  # the engine takes the mean over its accumulated backward passes
        engine.step()
        total_4 = total_4 + terms_4.detach()
    return total_4


class FlopTable:
    """Useful FLOPs of micro-batches, forward and backward, looked up by shape."""

    def __init__(self, loaded: LoadedModel):
        self.image = step_flops(loaded.clip, 1, [])
        self.text_L = [0, *(step_flops(loaded.clip, 0, [length]) for length in range(1, loaded.context_length + 1))]

    def of(self, micro_batch: MicroBatch) -> int:
        """Of a micro-batch on this rank."""
        pictures = sum(len(chunk.images_B3SS) + len(chunk.crops_M3SS) for chunk in micro_batch.chunks)
        return pictures * self.image + sum(self.text_L[length] for length in micro_batch.text_lengths)


def describe_device(device: torch.device, precision: Precision, ranks: int) -> dict[str, Any]:
    """What the workers run on: "device", "gpus", and "peak_flops" of all together, None on CPUs."""
    if device.type != "cuda":
        return {"device": platform.processor() or platform.machine(), "gpus": False, "peak_flops": None}
    peak = peak_flops(device, dtype(precision))
    whole = None if peak is None else peak * ranks
    return {"device": torch.cuda.get_device_name(device), "gpus": True, "peak_flops": whole}


def check_finite(job: Job, record: dict[str, Any]) -> None:
    """Raises StageError, on every rank, for a log record with a loss that is not finite."""
    bad_step = record.pop("nonfinite_step")
    if bad_step is not None:
        raise nonfinite(job, bad_step)


def nonfinite(job: Job, step: int) -> StageError:
    """What ends the run after step `step`, from 0; tells the driver, and writes the samples that may be the cause.

    At stages 1 to 3 DeepSpeed leaves out an update whose gradient is not finite, and would go on; at stage 0 it is
    made, and the next loss shows it.
    """
    job.send({"nonfinite": step + 1})  # from every rank, and before the tars are read: another may end all meanwhile
    place = write_offenders(job, step)
    return StageError(
        f"the loss of step {step + 1}, or its gradient, is not finite; the samples of that step and the one before are "
        f"listed in {place}; look at them, or lower optimizer.lr, then go on with --resume from the checkpoint before"
    )


def write_offenders(job: Job, step: int) -> Path:
    """Lists the samples of step `step`, from 0, and of the one before it, whose update may have broken the weights.

    Every rank writes the same bytes: which of them is ended first is not known.
    """
    place = job.run_dir / f"nonfinite-step-{step + 1:08d}.json"
    steps = {}
    for number in (step - 1, step):
        if number >= 0:
            _, rows = job.order.micro_batch(number, 0, 1, 1)
            samples = [
                {"shard": job.urls[shard], "key": own_scan(job.urls[shard], job.config.loss.needs_pairs).key(at)}
                for shard, at in rows.tolist()
            ]
            steps[number + 1] = samples
    write_bytes(str(place), json.dumps(steps, ensure_ascii=False, indent=1).encode(errors="backslashreplace"))
    return place


def build_examples(config: TrainConfig, loaded: LoadedModel) -> ExampleBuilder:
    """The sample-to-tensor part of the ingest for a model."""
    interpolation = loaded.preprocess["interpolation"]
    crops = ResizeConfig(mode=config.data.crop_mode)
    return ExampleBuilder(
        geometry=PixelGeometry(config.data.resize, loaded.size_px, loaded.grid_HW, interpolation),
        crop_geometry=PixelGeometry(crops, loaded.size_px, loaded.grid_HW, interpolation),
        encoder=CaptionEncoder(loaded.tokenizer),
        context_length=loaded.context_length,
        pairs=config.data.pairs_per_image if config.loss.needs_pairs else 0,
    )


def read_batches(job: Job, reader: BatchReader, first: int, last: int) -> Iterator[bytes]:
    """This rank's packed micro-batches `first` to `last` - 1.

    Raises StageError once this rank alone has met more unreadable samples than the run allows, or nothing but those in
    a micro-batch.
    """
    met: set[tuple[str, str]] = set()
    for packed, bad in stream_batches(reader, first, last):
        if bad:
            job.send({"bad": bad})
            met.update((record["shard"], record["key"]) for record in bad)
        if len(met) > job.bad_allowed:
            raise StageError(
                f"{len(met)} samples turned out unreadable, more than data.max_bad_share="
                f"{job.config.data.max_bad_share} allows; mend them, or raise that, then go on with --resume; the "
                f"last: {describe_bad(bad[-1])}; all of them: {job.run_dir / QUARANTINE_FILE}"
            )
        if not packed:
            raise StageError(
                "a whole micro-batch is unreadable; mend its samples, or raise batch_per_worker and lower accumulate "
                f"by as much, then go on with --resume; the last: {describe_bad(bad[-1])}; all of them: "
                f"{job.run_dir / QUARANTINE_FILE}"
            )
        yield packed
