"""Boxes and areas between the cells of a coarse mask, against the same mask enlarged."""

import pytest
import torch
import torch.nn.functional as F

from goal_ray.regions.mask_geometry import area_above, mask_boxes, pixels_near, sample_at

HEIGHT, WIDTH = 25, 30
FACTOR = 16


@pytest.fixture(params=range(3))
def logits(request):
    """Eight smooth masks of several blobs."""
    coarse = torch.randn(8, 1, 5, 6, generator=torch.Generator().manual_seed(request.param))
    return F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[:, 0]


def box_of(mask_MHW):
    """First and last row and column inside, the last exclusive."""
    rows, columns = mask_MHW.any(2), mask_MHW.any(1)
    first, last = (lambda line: line.int().argmax(1)), (lambda line: line.shape[1] - line.flip(1).int().argmax(1))
    return torch.stack([first(columns), first(rows), last(columns), last(rows)], dim=1)


def test_edges_and_areas_are_those_of_the_mask_enlarged_bilinearly(logits):
    large = F.interpolate(logits[:, None], scale_factor=FACTOR, mode="bilinear")[:, 0] > 0
    x, y = torch.arange(WIDTH) + 0.5, torch.arange(HEIGHT) + 0.5
    found = mask_boxes(logits, x, y, (HEIGHT, WIDTH))
    # A sample of the large mask stands for 1/16 of a cell.
    torch.testing.assert_close(found, box_of(large) / FACTOR, rtol=0, atol=1.01 / FACTOR)
    torch.testing.assert_close(area_above(logits, 0.0), large.sum((1, 2)) / FACTOR**2, rtol=0.02, atol=1.0)


@pytest.mark.parametrize("pixels", [(40, 61), (25, 30), (12, 17)])
def test_sampled_at_pixels_the_box_is_that_of_the_pixels(logits, pixels):
    (height, width), pitch = pixels, (HEIGHT / pixels[0], WIDTH / pixels[1])
    every_y, every_x = ((torch.arange(count) + 0.5) * step for count, step in zip(pixels, pitch, strict=True))
    picture = sample_at(sample_at(logits, every_y, 1), every_x, 2) > 0
    seen = picture.flatten(1).any(1)
    y, x = pixels_near(HEIGHT, height, HEIGHT), pixels_near(WIDTH, width, WIDTH)
    assert set(y.tolist()) <= set(every_y.tolist())
    sampled = sample_at(sample_at(logits[seen], y, 1), x, 2)
    found = mask_boxes(sampled, x, y, (HEIGHT, WIDTH))
    expected = box_of(picture[seen]) * torch.tensor([pitch[1], pitch[0], pitch[1], pitch[0]])
    # The edge of the last pixel inside is half a pixel beyond its centre, the crossing up to a whole one, or a cell.
    assert ((found - expected).abs() <= max(1.0, *pitch) + 1e-4).all()


def test_a_speck_between_pixels_is_not_seen():
    logits = torch.full((1, 8, 8), -1.0)
    logits[0, 2, 2] = 0.1
    positions = pixels_near(8, 16, 8.0)  # two pixels a cell, each a quarter of a cell from its centre
    assert positions.tolist() == [cell + 0.25 for cell in range(8)]
    assert (sample_at(sample_at(logits, positions, 1), positions, 2) < 0).all()


def test_a_mask_that_fills_the_picture_reaches_its_edges():
    full = torch.ones(1, 4, 7)
    x, y = torch.arange(7) + 0.5, torch.arange(4) + 0.5
    assert mask_boxes(full, x, y, (3.6, 6.8)).tolist() == [[0, 0, pytest.approx(6.8), pytest.approx(3.6)]]


@pytest.mark.parametrize("side", [1, 2])
def test_grids_of_one_or_two_cells_are_no_special_case(side):
    logits = torch.ones(1, side, side)
    at = pixels_near(side, 3, float(side))
    sampled = sample_at(sample_at(logits, at, 1), at, 2)
    assert mask_boxes(sampled, at, at, (side, side)).tolist() == [[0, 0, side, side]]
