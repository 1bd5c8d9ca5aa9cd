"""The detector of drawn scenes: what it is taught, and that its weights are a proposer's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.demo.detector import main, mirrored, read_scenes
from goal_ray.regions import DetectorConfig, build_proposer
from goal_ray.scenes.run import SceneSettings, draw_scenes

MODEL = "ssdlite320_mobilenet_v3_large"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(folder, 3, 0, SceneSettings(size=64))
    return folder


def test_every_object_of_every_scene_is_taught(scenes):
    found = read_scenes(str(scenes))
    assert len(found) == 3
    for picture, boxes_O4 in found:
        height, width = picture.shape[1:]
        assert len(boxes_O4) >= SceneSettings().min_objects
        assert (boxes_O4[:, :2] < boxes_O4[:, 2:]).all()
        assert (boxes_O4 >= 0).all()
        assert (boxes_O4 <= torch.tensor([width, height, width, height])).all()


@given(st.integers(1, 40), st.data())
def test_a_box_lies_on_its_object_also_in_the_mirror(width, data):
    x0 = data.draw(st.integers(0, width - 1))
    x1 = data.draw(st.integers(x0 + 1, width))
    picture = torch.zeros(3, 10, width, dtype=torch.uint8)
    picture[:, 2:7, x0:x1] = 255
    turned, boxes_O4 = mirrored(picture, torch.tensor([[float(x0), 2.0, float(x1), 7.0]]))
    a0, b0, a1, b1 = boxes_O4[0].int().tolist()
    assert turned[:, b0:b1, a0:a1].min() == 255
    assert (b0, b1, a1 - a0) == (2, 7, x1 - x0)


def test_the_weights_are_those_of_a_proposer_and_the_same_for_the_same_seed(scenes, tmp_path):
    for name in ("first.pth", "again.pth"):
        main([str(scenes), str(tmp_path / name), "--steps", "2", "--batch", "2"])
    first, again = (torch.load(tmp_path / name, weights_only=True) for name in ("first.pth", "again.pth"))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    config = DetectorConfig(model=MODEL, checkpoint=tmp_path / "first.pth", classes=2, score_thresh=0.0, levels=())
    (found,) = build_proposer(config, "cpu").propose([np.zeros((64, 80, 3), np.uint8)])
    assert len(found.boxes_px) > 0
