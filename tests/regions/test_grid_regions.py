"""The regular division of the image."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.config import build_config
from goal_ray.errors import ConfigError
from goal_ray.regions import GridConfig, build_proposer, usable


def divide(config, *sizes):
    return build_proposer(config).propose([np.zeros((height, width, 3), np.uint8) for width, height in sizes])


def test_default_gives_four_and_nine_cells():
    (regions,) = divide(GridConfig(), (60, 30))
    assert len(regions.boxes_px) == 13
    assert regions.boxes_px[:4].tolist() == [[0, 0, 30, 15], [30, 0, 60, 15], [0, 15, 30, 30], [30, 15, 60, 30]]
    assert set(regions.sources) == {"grid"}


def test_images_of_different_sizes_each_get_their_own_division():
    small, large = divide(GridConfig(levels=(2,)), (10, 20), (1000, 500))
    assert small.boxes_px.max(0).tolist() == [5, 10, 10, 20]
    assert large.boxes_px.max(0).tolist() == [500, 250, 1000, 500]


@given(st.integers(2, 6), st.integers(1, 3000), st.integers(1, 3000))
def test_cells_without_overlap_tile_the_image_exactly(level, width, height):
    (regions,) = divide(GridConfig(levels=(level,)), (width, height))
    assert regions.areas_px.sum() == pytest.approx(width * height, rel=1e-5)
    assert regions.boxes_px.min(0).tolist()[:2] == [0, 0]
    assert regions.boxes_px.max(0).tolist()[2:] == [width, height]
    assert len(usable(regions, (width, height)).boxes_px) == level**2


@given(st.integers(2, 6), st.floats(0, 0.9))
def test_neighbours_share_the_asked_part_of_their_side(level, overlap):
    (regions,) = divide(GridConfig(levels=(level,), overlap=overlap), (1000, 1000))
    first, second = regions.boxes_px[:2]
    assert first[2] - second[0] == pytest.approx(overlap * (first[2] - first[0]), abs=0.01)
    assert regions.boxes_px[-1, 2:].tolist() == [1000, 1000]


@pytest.mark.parametrize("settings", [{"levels": []}, {"levels": [1]}, {"overlap": 1.0}, {"overlap": -0.1}, {"n": 2}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError):
        build_config(GridConfig, settings, source="test")
