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
    from goal_ray.losses import GoalBatch

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


def run_stage(
    folder: Path, config, stage: int, resume_from: Path | None, rank: int, accumulate: int = 1
) -> list[float]:
    """Trains from scratch (saving on the way) or from a checkpoint; returns the loss of every step done.

    Every micro-batch of a step is the same one.
    """
    from goal_ray.losses import GoalModel
    from goal_ray.model import ModelConfig, load_model
    from goal_ray.train.checkpoint import allocate_averages, load_averages, read_step, save_checkpoint
    from goal_ray.train.engine import build_engine, set_learning_rate
    from goal_ray.train.loop import train_step

    config = replace(config, zero_stage=stage, accumulate=accumulate)
    loaded = load_model(config.model if resume_from is None else ModelConfig(str(resume_from)), seed=0)
    model = GoalModel(loaded.clip, config.loss, loaded.preprocess["mean"], loaded.preprocess["std"])
    engine = build_engine(model, config)
    first = 0 if resume_from is None else read_step(resume_from)
    allocate_averages(engine, first)
    if resume_from is not None:
        load_averages(resume_from, engine, loaded.clip)
    losses = []
    for step in range(first, STEPS):
        set_learning_rate(engine, 1e-3 / (step + 1))
        for _ in range(accumulate):
            terms = train_step(engine, make_batch(step, rank), config.loss.weights)
        dist.all_reduce(terms)
        losses.append((terms / 2).sum().item())
        if resume_from is None and step + 1 == SAVED_AT:
            save_checkpoint(folder / f"stage-{stage}", engine, loaded, SAVED_AT)
    return losses


def run_rank(rank: int, folder: str, tiny_clip: str) -> None:
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE="2")
    from goal_ray.model import ModelConfig
    from goal_ray.train.config import DataConfig, TrainConfig

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    config = TrainConfig(ModelConfig(tiny_clip), DataConfig("unused"), batch_per_worker=4, workers=2, precision="fp32")
    root = Path(folder)
    curves = {f"stage {stage}": run_stage(root, config, stage, None, rank) for stage in (0, 1, 2, 3)}
    curves["accumulated"] = run_stage(root / "accumulated", config, 2, None, rank, accumulate=3)
    for stage in (0, 1, 2, 3):
        source = root / f"stage-{(stage + 1) % 4}" / "checkpoints" / f"step-{SAVED_AT:08d}"
        curves[f"resumed in stage {stage}"] = run_stage(root, config, stage, source, rank)
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
