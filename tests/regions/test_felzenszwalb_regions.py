"""Classical regions: superpixels and their merges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from goal_ray.config import build_config
from goal_ray.errors import ConfigError
from goal_ray.regions import FelzenszwalbConfig, build_proposer, usable
from goal_ray.regions.felzenszwalb import merge_tree

TEXTURES = ("plain", "striped", "dotted", "checkered")


def textured(height, width, texture, first, second):
    """A rectangle of two colours with 6-px elements, (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    where = {
        "plain": np.zeros((height, width), bool),
        "striped": (x + y) % 12 < 5,
        "dotted": (x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 12,
        "checkered": (x // 6 + y // 6) % 2 == 0,
    }[texture]
    return np.where(where[..., None], second, first)


def scene(seed):
    """Four textured rectangles, one per quadrant, on a faintly textured background with noise; and their boxes."""
    rng = np.random.default_rng(seed)
    image = textured(128, 160, rng.choice(TEXTURES), np.array([225, 220, 205]), np.array([208, 203, 188])).astype(float)
    boxes = []
    for colour, (left, top) in zip(
        rng.permutation([[200, 40, 40], [40, 90, 200], [30, 140, 60], [120, 50, 150]]),
        [(6, 6), (86, 6), (6, 70), (86, 70)],
        strict=True,
    ):
        x0, y0 = left + rng.integers(0, 16), top + rng.integers(0, 12)
        width, height = rng.integers(28, 52), rng.integers(24, 40)
        tint = colour + (255 - colour) * 0.6
        image[y0 : y0 + height, x0 : x0 + width] = textured(height, width, rng.choice(TEXTURES), colour, tint)
        boxes.append([x0, y0, x0 + width, y0 + height])
    image += rng.normal(0, 4, image.shape)
    return image.clip(0, 255).astype(np.uint8), torch.tensor(boxes, dtype=torch.float32)


def test_textured_objects_are_found_with_few_proposals():
    scenes = [scene(seed) for seed in range(20)]
    proposer = build_proposer(FelzenszwalbConfig())
    best, counts = [], []
    for (_, truth), regions in zip(scenes, proposer.propose([image for image, _ in scenes]), strict=True):
        kept = usable(regions, (160, 128))
        counts.append(len(kept.boxes_px))
        best.append(box_iou(truth, torch.from_numpy(kept.boxes_px)).max(1).values)
    assert (torch.cat(best) >= 0.5).float().mean() >= 0.9
    assert np.mean(counts) <= 60


def test_an_object_that_stands_out_is_the_best_region():
    image = np.full((60, 80, 3), 230, np.uint8)
    image[20:40, 10:50] = [200, 30, 30]
    kept = usable(build_proposer(FelzenszwalbConfig()).propose([image])[0], (80, 60))
    assert np.abs(kept.boxes_px[0] - [10, 20, 50, 40]).max() <= 1
    assert kept.areas_px[0] == pytest.approx(800, rel=0.1)


def test_merging_passes_through_every_step_up_to_the_whole_image():
    labels = np.array([[0, 0, 1], [2, 2, 1]])
    image = np.array([[[9, 9, 9]] * 2 + [[200, 0, 0]], [[9, 9, 9]] * 2 + [[200, 0, 0]]], np.uint8)
    tree = merge_tree(image, labels)
    assert tree.boxes_px.tolist() == [[0, 0, 2, 1], [2, 0, 3, 2], [0, 1, 2, 2], [0, 0, 2, 2], [0, 0, 3, 2]]
    assert tree.areas_px.tolist() == [2, 2, 2, 4, 6]
    assert tree.scores[1] == pytest.approx(1 - 2 / 3)  # its green and blue are in the others' lowest bins too


def test_boxes_of_a_shrunk_image_are_in_its_own_pixels():
    image = np.full((600, 800, 3), 230, np.uint8)
    image[200:400, 100:500] = [200, 30, 30]
    kept = usable(build_proposer(FelzenszwalbConfig(side_px=80)).propose([image])[0], (800, 600))
    assert np.abs(kept.boxes_px[0] - [100, 200, 500, 400]).max() <= 10
    assert kept.areas_px[0] == pytest.approx(80_000, rel=0.1)


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_any_image_gives_boxes_inside_it_and_the_same_ones_again(height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image.flags.writeable = False  # as pictures that come out of a shared object store
    once, again = build_proposer(FelzenszwalbConfig()).propose([image, image])
    np.testing.assert_array_equal(once.boxes_px, again.boxes_px)
    x0, y0, x1, y1 = once.boxes_px.T
    assert ((x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= width) & (y1 <= height)).all()
    assert (once.areas_px <= (x1 - x0) * (y1 - y0)).all()


@pytest.mark.parametrize("bad", [{"scale": 0}, {"sigma": -1}, {"min_size": 0}, {"side_px": 0}, {"device": "cuda"}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError):
        build_config(FelzenszwalbConfig, bad, source="test")
