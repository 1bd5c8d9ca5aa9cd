"""What every training worker runs: build, resume, step, log, save."""

import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from goal_ray.batches import ExampleBuilder, unpack
from goal_ray.errors import StageError
from goal_ray.geometry import PixelGeometry, ResizeConfig
from goal_ray.losses import TERMS, GoalBatch, GoalModel
from goal_ray.model import LoadedModel, ModelConfig, load_model
from goal_ray.order import BatchOrder
from goal_ray.text import CaptionEncoder
from goal_ray.train.checkpoint import allocate_averages, load_averages, read_step, save_checkpoint
from goal_ray.train.config import TrainConfig
from goal_ray.train.engine import build_engine, set_learning_rate
from goal_ray.train.ingest import BatchReader, stream_batches
from goal_ray.train.scan import QUARANTINE_FILE, describe_bad


@dataclass(frozen=True)
class Job:
    """All that the driver tells its workers.

    urls, counts  tars and the usable samples in each
    resume_from   checkpoint folder to go on from
    bad_allowed   how many samples may turn out unreadable before the run fails
    send          takes a record to the driver, returns at once
    """

    config: TrainConfig
    run_dir: Path
    urls: tuple[str, ...]
    counts: tuple[int, ...]
    resume_from: Path | None
    bad_allowed: int
    send: Callable[[dict[str, Any]], None]


def train_worker(job: Job, rank: int, ranks: int, device: torch.device) -> None:
    """Trains on one rank of an initialised process group."""
    config = job.config
    order = BatchOrder(job.counts, config.global_batch, config.seed, config.data.shuffle_shards)
    total_steps = config.total_steps(order.steps_per_epoch)
    start = config.model if job.resume_from is None else ModelConfig(str(job.resume_from))
    job.send({"doing": "loading the model"})
    loaded = load_model(start, config.seed)
    first_step = 0 if job.resume_from is None else read_step(job.resume_from)
    preprocess = loaded.preprocess
    preprocess["resize_mode"] = "squash" if config.data.resize.mode == "squash" else "shortest"
    builder = pickle.dumps(build_examples(config, loaded))
    reader = BatchReader(job.urls, order, rank, ranks, config.accumulate, builder)
    batches = read_batches(job, reader, first_step * config.accumulate, total_steps * config.accumulate)
    with ThreadPoolExecutor(1) as pool:  # the stream starts while the engine is built
        first_batch = pool.submit(next, batches)
        model = GoalModel(loaded.clip, config.loss, preprocess["mean"], preprocess["std"], config.precision == "bf16")
        engine = build_engine(model.to(device), config)
        allocate_averages(engine, first_step)
        if job.resume_from is not None:
            load_averages(job.resume_from, engine, loaded.clip)
        job.send({"doing": "reading the first batches"})
        batches = chain([first_batch.result()], batches)
    window = LogWindow(config, device)
    for step in range(first_step, total_steps):
        lr = config.optimizer.lr * config.optimizer.lr_factor(step, total_steps)
        set_learning_rate(engine, lr)
        for _ in range(config.accumulate):
            window.add(train_step(engine, unpack(next(batches), device), config.loss.weights(step / total_steps)))
        done = step + 1
        if done % config.log_every == 0 or done == total_steps:
            record = window.read(done, total_steps, lr, done / order.steps_per_epoch, engine)
            if rank == 0:
                job.send(record)
        if done % config.checkpoint_every == 0 or done == total_steps:
            save_checkpoint(job.run_dir, engine, loaded, done)


def train_step(engine: Any, batch: GoalBatch, weights: tuple[float, ...]) -> torch.Tensor:
    """One micro-batch forward and backward; an optimizer step when enough of them are in. Returns the terms (4,)."""
    terms_4 = engine(batch)
    engine.backward((terms_4 * terms_4.new_tensor(weights)).sum())
    engine.step()
    return terms_4.detach()


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
                f"{job.config.data.max_bad_share} allows; the last: {describe_bad(bad[-1])}; all of them: "
                f"{job.run_dir / QUARANTINE_FILE}"
            )
        if not packed:
            raise StageError(
                f"a whole micro-batch is unreadable; raise batch_per_worker, or mend the data; "
                f"the last: {describe_bad(bad[-1])}; all of them: {job.run_dir / QUARANTINE_FILE}"
            )
        yield packed


class LogWindow:
    """Means of the loss terms and the speed since the last log line; the device is read only when asked."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self.config = config
        self.sum_4 = torch.zeros(len(TERMS), device=device)
        self.micro_batches = 0
        self.since = time.perf_counter()

    def add(self, terms_4: torch.Tensor) -> None:
        """Adds a micro-batch's terms."""
        self.sum_4 += terms_4
        self.micro_batches += 1

    def read(self, step: int, total_steps: int, lr: float, epoch: float, engine: Any) -> dict[str, Any]:
        """The log record, averaged over all ranks; every rank must call it. Starts a new window."""
        mean_4 = self.sum_4 / max(1, self.micro_batches)
        dist.all_reduce(mean_4)
        terms = (mean_4 / dist.get_world_size()).tolist()
        seconds = time.perf_counter() - self.since
        images = self.micro_batches * self.config.batch_per_worker * dist.get_world_size()
        norm = engine.get_global_grad_norm()
        self.sum_4.zero_()
        self.micro_batches, self.since = 0, time.perf_counter()
        return {
            "step": step,
            "total_steps": total_steps,
            "epoch": round(epoch, 4),
            "loss": sum(
                weight * term
                for weight, term in zip(self.config.loss.weights((step - 1) / total_steps), terms, strict=True)
            ),
            **{f"loss_{name}": term for name, term in zip(TERMS, terms, strict=True)},
            "lr": lr,
            "grad_norm": None if norm is None else float(norm),
            "images_per_s": images / seconds,
        }
