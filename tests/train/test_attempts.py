"""How many workers an elastic run starts, and what it makes of their micro-batches."""

import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.settings import ModelConfig
from goal_ray.train.attempts import Attempts
from goal_ray.train.config import DataConfig, TrainConfig
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.metrics import Metrics
from goal_ray.train.places import Demand, growth, lacking, most_workers
from goal_ray.train.recorder import ProgressLine, RunRecorder


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
        (1, {"CPU": 1, "GPU": 1}, True, 1),  # a GPU worker holds no CPU, as Ray counts
        (1, {"CPU": 0, "GPU": 1}, True, None),
        ((3, 8), {"CPU": 8}, False, 4),  # 5, 6 and 7 do not share 32 pictures evenly
        ((5, 8), {"CPU": 8}, False, None),
    ],
)
def test_the_most_workers_that_share_a_batch_evenly_and_find_room(workers, resources, use_gpu, count):
    assert most_workers(elastic(workers), use_gpu, resources) == count


def test_a_worker_s_custom_resources_count_too():
    config = elastic((2, 4), worker_resources={"train": 1.0})
    assert most_workers(config, True, {"CPU": 9, "GPU": 9, "train": 3}) == 2  # 3 do not share 16 pictures evenly
    assert lacking(config, True, 2, {"CPU": 9, "GPU": 9, "train": 1}) == "2 workers need 2 trains, the cluster has 1"
    assert (
        lacking(config, False, 2, {"CPU": 2, "train": 2}) == "2 workers and the ingest need 3 CPUs, the cluster has 2"
    )
    assert lacking(config, False, 2, {"CPU": 3, "train": 2}) == ""


@pytest.fixture
def attempts(tmp_path):
    """Of a run whose samples may be bad in two cases, without a cluster."""
    config = elastic(1)
    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        evaluations = Evaluations(tmp_path, config.evaluation, lambda *_: None, line.say)
        yield Attempts(config, {"run_dir": tmp_path}, 2, False, recorder, evaluations, threading.Event())


def test_bad_samples_are_counted_over_all_workers(attempts):
    attempts.looked_around = math.inf  # there is no cluster to look at
    for number, ending in enumerate([None, None, "spoiled"]):
        sample = {"shard": "a.tar", "key": str(number), "stage": "decode", "reason": "torn"}
        attempts._receive({"bad": [sample, sample]})
        assert attempts._reason_to_end(1, Demand([])) == ending


@pytest.mark.parametrize(
    ("leaving", "ending"),
    [({"worker"}, "preempted"), ({"driver"}, "interrupted"), ({"driver", "worker"}, "interrupted"), ({"other"}, None)],
)
def test_a_node_that_leaves_ends_the_attempt_and_the_driver_s_own_the_run(attempts, monkeypatch, leaving, ending):
    import ray

    monkeypatch.setattr("goal_ray.train.attempts.draining_nodes", lambda: leaving)
    monkeypatch.setattr("goal_ray.train.attempts.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "driver"))
    attempts.nodes.add("worker")
    assert attempts._reason_to_end(1, Demand([])) == ending
    assert attempts.interrupted.is_set() is (ending == "interrupted")


@given(data=st.data(), fewest=st.integers(1, 8), most=st.integers(1, 8), use_gpu=st.booleans())
def test_whatever_is_asked_for_beside_the_workers_leaves_the_ingest_its_place(data, fewest, most, use_gpu):
    config = elastic((fewest, max(fewest, most)))
    workers = data.draw(st.sampled_from(config.worker_counts))
    groups = growth(config, use_gpu, workers)
    assert bool(groups) == (workers < config.max_workers)
    for group in groups:
        held = Counter({"CPU": 1.0} if use_gpu else {})  # the ingest's, which no GPU worker takes
        for bundle in [config.worker_bundle(use_gpu)] * workers + group:
            held.update(bundle)
        # so the run restarts with more workers, and the places asked for are given back
        assert most_workers(config, use_gpu, held) > workers


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
