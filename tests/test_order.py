"""The order of training is a function of seed and step alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.errors import StageError
from goal_ray.order import BatchOrder, locate_step

counts = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda values: sum(values) >= 8)


@given(counts, st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_reads_every_sample_at_most_once(counts, window, epoch):
    order = BatchOrder(tuple(counts), 8, seed=3, window_shards=window)
    rows = [tuple(row) for row in order.epoch(epoch)]
    assert len(rows) == len(set(rows)) == sum(counts) // 8 * 8
    assert all(0 <= sample < counts[shard] for shard, sample in rows)


@given(counts, st.sampled_from([(1, 1), (2, 1), (1, 4), (4, 2), (2, 4)]))
def test_a_global_batch_is_the_same_for_any_number_of_workers(counts, layout):
    ranks, accumulate = layout
    order = BatchOrder(tuple(counts), 8, seed=0, window_shards=2)
    plans = [order.micro_batches(1, 0, rank, ranks, accumulate) for rank in range(ranks)]
    for step in range(order.steps_per_epoch):
        micro = slice(step * accumulate, (step + 1) * accumulate)
        seen = np.concatenate([rows for plan in plans for rows in plan[micro]])
        expected = order.epoch(1)[step * 8 : step * 8 + 8]
        assert sorted(map(tuple, seen)) == sorted(map(tuple, expected))


def test_starting_late_gives_the_rest_of_the_same_order():
    order = BatchOrder((30, 30), 8, seed=0, window_shards=1)
    whole = order.micro_batches(2, 0, 1, 2, 2)
    rest = order.micro_batches(2, 3, 1, 2, 2)
    assert np.array_equal(np.stack(whole[6:]), np.stack(rest))


def test_epochs_and_seeds_differ():
    order = BatchOrder((50,), 8, seed=0, window_shards=1)
    assert not np.array_equal(order.epoch(0), order.epoch(1))
    assert not np.array_equal(order.epoch(0), BatchOrder((50,), 8, seed=1, window_shards=1).epoch(0))


def test_a_step_is_found_in_its_epoch():
    assert locate_step(17, 5) == (3, 2)


def test_too_few_samples_for_a_batch_are_refused_with_the_remedy():
    with pytest.raises(StageError, match="lower the batch"):
        BatchOrder((3, 4), 8, seed=0, window_shards=1)
