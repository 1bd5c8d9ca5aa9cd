"""DeepSpeed engines on two gloo ranks: every ZeRO stage trains the same, and any checkpoint goes on in any stage."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

STEPS, SAVED_AT = 4, 2


def make_batch(step: int, rank: int):
    from goal_ray.goal_batch import GoalBatch

    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(1, 40000, (4, 12), generator=generator)
    ids[:, -1] = 49407
    return GoalBatch(
        images_B3SS=torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        text_BL=ids,
        crops_M3SS=torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8),
        sentences_ML=torch.cat([ids[:, :5], ids[:, -1:]], dim=1),
        boxes_M4=torch.tensor([[0.0, 0, 2, 2], [1, 1, 4, 4], [0, 0, 4, 4], [2, 0, 3, 4]]),
        spans_M2=torch.tensor([[1, 5], [1, 5], [2, 6], [-1, -1]]),
        sample_index_M=torch.arange(4),
    )


def as_micro_batch(batch, chunks: int):
    from goal_ray.goal_batch import count_batch
    from goal_ray.gradcache import split_batch
    from goal_ray.losses import gather_counts
    from goal_ray.train.feed import MicroBatch

    counts = gather_counts(count_batch(batch))
    return MicroBatch(split_batch(batch._replace(counts_R4=counts), chunks), counts, [], None)


def run_stage(folder: Path, config, resume_from: Path | None, rank: int, save: bool = True) -> list[float]:
    """Trains from scratch (saving on the way) or from a checkpoint; returns the loss of every step done.

    Every micro-batch of a step is the same one.
    """
    from goal_ray.checkpoints import step_of
    from goal_ray.losses import GoalModel
    from goal_ray.model import load_model
    from goal_ray.settings import ModelConfig
    from goal_ray.step import prepare_step
    from goal_ray.train.engine import build_engine, freeze_tower, set_learning_rate
    from goal_ray.train.loop import train_step
    from goal_ray.train.state import CheckpointWriter, allocate_averages, load_averages

    loaded = load_model(config.model if resume_from is None else ModelConfig(str(resume_from)), seed=0)
    prepare_step(loaded.clip, config.step)
    freeze_tower(loaded.clip, config.optimizer.freeze)
    model = GoalModel(loaded.clip, config.loss, loaded.preprocess["mean"], loaded.preprocess["std"])
    engine = build_engine(model, config, workers=2)
    first = 0 if resume_from is None else step_of(resume_from)
    allocate_averages(engine, first)
    if resume_from is not None:
        load_averages(resume_from, engine, loaded.clip)
    losses, weights = [], config.loss.weights(0)
    writer = CheckpointWriter(folder, lambda _: None)
    for step in range(first, STEPS):
        set_learning_rate(engine, 1e-3 / (step + 1))
        for _ in range(config.accumulate):
            terms = train_step(engine, as_micro_batch(make_batch(step, rank), config.chunks(2)), "clip", weights)
        dist.all_reduce(terms)
        losses.append((terms / 2).sum().item())
        if save and step + 1 == SAVED_AT:
            writer.save(engine, loaded, SAVED_AT, [])
    writer.wait()
    dist.barrier()
    return losses


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
    from goal_ray.settings import ModelConfig, StepConfig
    from goal_ray.train.config import DataConfig, OptimizerConfig, TrainConfig

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = TrainConfig(ModelConfig(tiny_clip), DataConfig("unused"), batch_per_worker=4, workers=2, precision="fp32")
    root = Path(folder)
    stages = {stage: replace(config, zero_stage=stage) for stage in (0, 1, 2, 3)}
    curves = {}
    for stage, staged in stages.items():
        curves[f"stage {stage}"] = run_stage(root / f"stage-{stage}", staged, None, rank)
    for stage, staged in stages.items():
        source = root / f"stage-{(stage + 1) % 4}" / "checkpoints" / f"step-{SAVED_AT:08d}"
        curves[f"resumed in stage {stage}"] = run_stage(root, staged, source, rank, save=False)
    variants = {
        "accumulated": replace(stages[2], accumulate=3),
        "offloaded optimizer": replace(stages[2], offload="optimizer"),
        "offloaded parameters": replace(stages[3], offload="parameters"),
        **{f"chunks in stage {stage}": replace(stages[stage], chunk=2) for stage in (0, 1, 3)},
        **{
            f"{tower} frozen in stage {stage}": replace(stages[stage], optimizer=OptimizerConfig(freeze=tower))
            for tower, stage in (("image", 0), ("image", 3), ("text", 0), ("text", 2))
        },
        **{
            f"layer decay in stage {stage}": replace(stages[stage], optimizer=OptimizerConfig(layer_decay=0.5))
            for stage in (0, 2, 3)
        },
        **{
            f"channels last in stage {stage}": replace(stages[stage], step=StepConfig(channels_last=True))
            for stage in (0, 1, 3)
        },
    }
    for name, variant in variants.items():
        curves[name] = run_stage(root, variant, None, rank, save=False)
    if rank == 0:
        (root / "curves.json").write_text(json.dumps(curves))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def curves(tiny_clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    mp.spawn(run_rank, (str(folder), tiny_clip), nprocs=2)
    return json.loads((folder / "curves.json").read_text())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_same_loss_curve(curves, stage):
    # float32 sums in another order; the curve itself moves by a thousand times more
    assert curves[f"stage {stage}"] == pytest.approx(curves["stage 0"], rel=1e-5)
    assert abs(curves["stage 0"][-1] - curves["stage 0"][0]) > 1e-2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_checkpoint_of_another_stage_goes_on_as_if_never_stopped(curves, stage):
    assert curves[f"resumed in stage {stage}"] == pytest.approx(curves["stage 0"][SAVED_AT:], rel=1e-5)


def test_accumulated_gradients_are_the_mean_over_the_micro_batches(curves):
    assert curves["accumulated"] == pytest.approx(curves["stage 2"], rel=1e-5)


@pytest.mark.parametrize("name", ["offloaded optimizer", "offloaded parameters"])
def test_offload_to_the_cpu_gives_the_same_loss_curve(curves, name):
    assert curves[name] == pytest.approx(curves["stage 0"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_pictures_in_channels_last_give_the_same_loss_curve(curves, stage):
    assert curves[f"channels last in stage {stage}"] == pytest.approx(curves["stage 0"], rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_micro_batch_in_chunks_gives_the_loss_curve_of_the_whole(curves, stage):
    assert curves[f"chunks in stage {stage}"] == pytest.approx(curves["stage 0"], rel=1e-5)


@pytest.mark.parametrize(
    ("variant", "stages"), [("image frozen", (0, 3)), ("text frozen", (0, 2)), ("layer decay", (0, 2, 3))]
)
def test_frozen_towers_and_layer_decay_train_alike_in_every_stage_and_unlike_the_plain_run(curves, variant, stages):
    first, *others = (curves[f"{variant} in stage {stage}"] for stage in stages)
    for other in others:
        assert other == pytest.approx(first, rel=1e-5)
    assert first[0] == pytest.approx(curves["stage 0"][0], rel=1e-6)
    assert abs(first[-1] - curves["stage 0"][-1]) > 1e-4
