"""Which proposed regions are worth matching."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torchvision.ops import box_iou

from goal_ray.regions import Regions, usable
from goal_ray.regions.protocol import all_from

SIZE = (100, 50)


def regions(boxes, scores=None, areas=None):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    scores = np.ones(len(boxes)) if scores is None else np.array(scores)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1) if areas is None else np.array(areas)
    return Regions(boxes, scores.astype(np.float32), areas.astype(np.float32), all_from("test", len(boxes)))


def test_area_limits_are_inclusive():
    kept = usable(regions([[0, 0, 10, 5], [0, 0, 10, 4.9], [0, 0, 80, 50], [0, 0, 81, 50]]), SIZE)
    assert sorted(kept.areas_px.tolist()) == [50, 4000]


def test_a_mask_counts_by_its_own_area_not_its_box():
    kept = usable(regions([[0, 0, 90, 50], [0, 0, 20, 20]], areas=[2000, 10]), SIZE)
    assert kept.boxes_px.tolist() == [[0, 0, 90, 50]]


def test_boxes_are_clipped_to_the_image():
    kept = usable(regions([[-10, -20, 30, 20], [70, 10, 1000, 1000]]), SIZE)
    assert kept.boxes_px.tolist() == [[0, 0, 30, 20], [70, 10, 100, 50]]
    assert kept.areas_px.tolist() == [600, 1200]


@pytest.mark.parametrize("box", [[5, 5, 5, 40], [5, 5, 40, 5], [40, 5, 5, 40], [120, 5, 150, 40], [np.nan, 0, 40, 40]])
def test_boxes_without_area_inside_the_image_are_dropped(box):
    assert len(usable(regions([box], areas=[1000]), SIZE, min_area=0).boxes_px) == 0


def test_of_near_duplicates_the_higher_score_stays():
    kept = usable(regions([[0, 0, 40, 40], [0, 0, 40, 39], [0, 0, 40, 30]], scores=[0.5, 0.9, 0.1]), SIZE)
    assert kept.boxes_px.tolist() == [[0, 0, 40, 39], [0, 0, 40, 30]]
    assert kept.scores.tolist() == pytest.approx([0.9, 0.1])


def test_no_regions_stay_no_regions():
    kept = usable(regions([]), SIZE)
    assert kept.boxes_px.shape == (0, 4)
    assert kept.sources.shape == (0,)


SCORES = st.sampled_from([0.25, 0.5, 1.0])  # few values, so that ties are common


@given(arrays(np.float32, st.tuples(st.integers(0, 12), st.just(4)), elements=st.integers(-20, 120)), st.data())
def test_result_is_valid_distinct_and_independent_of_the_order_given(boxes, data):
    scores = np.array(data.draw(st.lists(SCORES, min_size=len(boxes), max_size=len(boxes))))
    given_order = regions(boxes, scores)
    kept = usable(given_order, SIZE)
    x0, y0, x1, y1 = kept.boxes_px.T
    assert ((x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= SIZE[0]) & (y1 <= SIZE[1])).all()
    assert (np.diff(kept.scores) <= 0).all()
    overlap = box_iou(*[torch.from_numpy(kept.boxes_px)] * 2).fill_diagonal_(0)
    assert (overlap <= 0.95).all()

    order = data.draw(st.permutations(range(len(boxes))))
    shuffled = usable(regions(boxes[list(order)], scores[list(order)]), SIZE)
    np.testing.assert_array_equal(shuffled.boxes_px, kept.boxes_px)
    np.testing.assert_array_equal(shuffled.scores, kept.scores)
