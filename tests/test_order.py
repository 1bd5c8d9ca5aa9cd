"""The order of training is a function of seed and step alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.errors import StageError
from goal_ray.order import BatchOrder, _window_rows


def epoch_rows(order: BatchOrder, epoch: int) -> np.ndarray:
    """(shard, sample) rows of an epoch in reading order, for one worker."""
    first = epoch * order.steps_per_epoch
    batches = [order.micro_batch(first + step, 0, 1, 1) for step in range(order.steps_per_epoch)]
    assert {number for number, _ in batches} == {epoch}
    return np.concatenate([rows for _, rows in batches])


counts = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda values: sum(values) >= 8)


@given(counts, st.integers(1, 4), st.integers(0, 5))
def test_an_epoch_reads_every_sample_at_most_once(counts, window, epoch):
    order = BatchOrder(tuple(counts), 8, seed=3, window_shards=window)
    rows = [tuple(row) for row in epoch_rows(order, epoch)]
    assert len(rows) == len(set(rows)) == sum(counts) // 8 * 8
    assert all(0 <= sample < counts[shard] for shard, sample in rows)


@given(counts, st.sampled_from([(1, 1), (2, 1), (1, 4), (4, 2), (2, 4)]), st.integers(0, 12))
def test_a_global_batch_is_the_same_for_any_number_of_workers(counts, layout, step):
    ranks, accumulate = layout
    order = BatchOrder(tuple(counts), 8, seed=0, window_shards=2)
    parts = [
        order.micro_batch(step * accumulate + part, rank, ranks, accumulate)
        for rank in range(ranks)
        for part in range(accumulate)
    ]
    expected, step_in_epoch = divmod(step, order.steps_per_epoch)
    rows = epoch_rows(order, expected)[step_in_epoch * 8 : step_in_epoch * 8 + 8]
    assert {epoch for epoch, _ in parts} == {expected}
    assert sorted(map(tuple, np.concatenate([rows for _, rows in parts]))) == sorted(map(tuple, rows))


def test_only_the_windows_of_a_batch_are_made():
    order = BatchOrder((10_000,) * 1_000, 64, seed=0, window_shards=2)
    _window_rows.cache_clear()
    order.micro_batch(77_777, 0, 1, 1)
    assert _window_rows.cache_info().misses <= 2


def test_the_windows_of_an_epoch_are_shuffled_differently():
    rows = epoch_rows(BatchOrder((8, 8), 8, seed=0, window_shards=1), 0)
    assert rows[:8, 1].tolist() != rows[8:, 1].tolist()


def test_epochs_and_seeds_differ():
    order = BatchOrder((50,), 8, seed=0, window_shards=1)
    assert not np.array_equal(epoch_rows(order, 0), epoch_rows(order, 1))
    assert not np.array_equal(epoch_rows(order, 0), epoch_rows(BatchOrder((50,), 8, seed=1, window_shards=1), 0))


def test_too_few_samples_for_a_batch_are_refused_with_the_remedy():
    with pytest.raises(StageError, match="lower the batch"):
        BatchOrder((3, 4), 8, seed=0, window_shards=1)
