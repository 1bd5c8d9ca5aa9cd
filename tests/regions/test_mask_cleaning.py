"""Small holes and islands of masks."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from skimage.morphology import remove_small_objects

from goal_ray.regions.mask_cleaning import clean, clean_mask


def drawn(*rows: str) -> np.ndarray:
    return np.array([[sign == "#" for sign in row] for row in rows])


def test_a_small_hole_is_filled_and_a_small_island_goes():
    before = drawn("#########...", "#.##....#..#", "####....#..#", "#########...")
    after = clean_mask(before, 4)
    assert (after == drawn("#########...", "####....#...", "####....#...", "#########...")).all()


def test_of_small_islands_alone_the_largest_stays():
    assert (clean_mask(drawn("#...", "..##", "#..."), 4) == drawn("....", "..##", "....")).all()


def test_cells_that_touch_at_a_corner_are_one_part():
    diagonal = drawn("#..", ".#.", "..#")
    assert (clean_mask(diagonal, 3) == diagonal).all()


@given(arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))), st.integers(1, 20))
def test_no_small_part_is_left_but_an_only_one(mask, least):
    after = clean_mask(mask, least)
    large = remove_small_objects(after, max_size=least - 1, connectivity=2)
    assert (after == large).all() or not large.any()


def test_logits_change_sides_only_where_the_mask_changes():
    mask = drawn("###..", "#.#.#", "###..")
    logits = torch.from_numpy(np.where(mask, 2.0, -3.0))
    cleaned, changed = clean(torch.stack([logits, torch.full((3, 5), -1.0)]), 2)
    assert changed.tolist() == [True, False]
    after = drawn("###..", "###..", "###..")
    assert ((cleaned[0] > 0).numpy() == after).all()
    assert (cleaned[0].abs() == logits.abs()).all()


def test_where_there_is_no_mask_nothing_changes():
    logits_RHW, changed_R = clean(torch.empty(0, 8, 8), 3)
    assert logits_RHW.shape == (0, 8, 8)
    assert changed_R.tolist() == []
