"""How many workers an elastic run starts, and what it makes of their micro-batches."""

import pytest

from goal_ray.settings import ModelConfig
from goal_ray.train.attempts import most_workers
from goal_ray.train.config import DataConfig, TrainConfig


def elastic(workers, batch=4, **more) -> TrainConfig:
    return TrainConfig(ModelConfig("ViT-B-16"), DataConfig("shards"), workers=workers, batch_per_worker=batch, **more)


@pytest.mark.parametrize(
    ("workers", "resources", "use_gpu", "count"),
    [
        (2, {"CPU": 3}, False, 2),
        (2, {"CPU": 2}, False, None),
        ((1, 4), {"CPU": 64}, False, 4),
        ((1, 4), {"CPU": 64, "GPU": 2}, True, 2),
        ((1, 4), {"CPU": 64}, True, None),
        ((3, 8), {"CPU": 8}, False, 4),  # 5, 6 and 7 do not share 32 pictures evenly
        ((5, 8), {"CPU": 8}, False, None),
    ],
)
def test_the_most_workers_that_share_a_batch_evenly_and_find_room(workers, resources, use_gpu, count):
    assert most_workers(elastic(workers), use_gpu, resources) == count


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_fewer_workers_take_the_same_micro_batch_in_chunks_of_what_a_worker_can_hold(workers):
    config = elastic((1, 4))
    assert config.global_batch == 16
    assert config.worker_batch(workers) * workers == 16
    assert config.worker_batch(workers) / config.chunks(workers) == 4


def test_a_chunk_bounds_what_goes_through_the_towers_at_once():
    config = elastic(2, batch=10, chunk=4)
    assert (config.worker_batch(2), config.chunks(2)) == (10, 3)
    assert elastic(2, batch=10).chunks(2) == 1
