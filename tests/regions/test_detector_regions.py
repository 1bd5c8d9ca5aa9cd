"""Boxes of torchvision's own detectors, at their real sizes, with random weights."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d, box_iou
from torchvision.transforms.functional import to_tensor

from goal_ray.config import build_config
from goal_ray.errors import ConfigError, ModelError
from goal_ray.regions import DetectorConfig, build_proposer
from goal_ray.regions.detector import WITHOUT_EPSILON, DetectorProposer, load_detector

FASTER, LITE = "fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"
IMAGES = [
    np.random.default_rng(n).integers(0, 256, (*size, 3), np.uint8) for n, size in enumerate([(90, 160), (70, 60)])
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Model name -> a checkpoint of it, with 3 classes, that finds something everywhere."""

    def save(name):
        path = tmp_path_factory.mktemp("weights") / f"{name}.pth"
        torch.manual_seed(0)
        torch.save(get_model(name, weights=None, weights_backbone=None, num_classes=3).state_dict(), path)
        return path

    return {name: save(name) for name in (FASTER, LITE)}


def config(name, path, **settings):
    return DetectorConfig(model=name, checkpoint=path, classes=3, **{"score_thresh": 0.0, **settings})


@pytest.mark.parametrize("name", [FASTER, LITE])
def test_detections_are_the_models_own_without_near_duplicates_of_any_class(checkpoint, name):
    settings = config(name, checkpoint[name], levels=(), box_nms_thresh=0.5, max_detections=20, images_per_batch=1)
    found = build_proposer(settings).propose(IMAGES)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=3).eval()
    model.load_state_dict(torch.load(checkpoint[name], weights_only=True))
    for image, regions in zip(IMAGES, found, strict=True):
        with torch.no_grad():
            (theirs,) = model([to_tensor(image)])
        assert 1 < len(regions.boxes_px) <= 20
        overlap = box_iou(torch.from_numpy(regions.boxes_px), theirs["boxes"])
        # The boxes of one call are the boxes of another, to float32's last digits.
        assert overlap.amax(1).min() > 0.999
        assert regions.scores.tolist() == pytest.approx(theirs["scores"][overlap.argmax(1)].tolist(), abs=1e-5)
        own = torch.from_numpy(regions.boxes_px)
        assert box_iou(own, own).fill_diagonal_(0).max() <= 0.5
        assert (np.diff(regions.scores) <= 0).all()
        assert regions.areas_px == pytest.approx((regions.boxes_px[:, 2:] - regions.boxes_px[:, :2]).prod(1))
        assert set(regions.sources) == {"detector"}


def test_cells_of_the_grid_stand_behind_the_detections_with_score_0(checkpoint):
    with_cells = build_proposer(config(LITE, checkpoint[LITE], levels=(2,))).propose(IMAGES)
    alone = build_proposer(config(LITE, checkpoint[LITE], levels=())).propose(IMAGES)
    for both, detections in zip(with_cells, alone, strict=True):
        count = len(detections.scores)
        assert both.sources.tolist() == ["detector"] * count + ["grid"] * 4
        assert both.boxes_px[:count].tolist() == detections.boxes_px.tolist()
        assert both.scores[count:].tolist() == [0] * 4


def test_fp32_is_no_tf32_where_a_detector_is(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    build_proposer(config(LITE, checkpoint[LITE]))
    assert not torch.backends.cudnn.allow_tf32


def test_a_detector_finds_the_same_however_many_pictures_it_takes_at_once(checkpoint):
    proposer = build_proposer(config(LITE, checkpoint[LITE], images_per_batch=2))
    expected, passes = proposer.propose(IMAGES), []
    proposer.model.register_forward_pre_hook(lambda _, given: passes.append(len(given[0])))
    assert proposer.at_once == (2,)
    proposer.at_once = (1,)
    for found, before in zip(proposer.propose(IMAGES), expected, strict=True):
        assert found.scores == pytest.approx(before.scores, abs=1e-5)
    assert passes == [1, 1]


def test_a_threshold_that_nothing_reaches_leaves_the_grid(checkpoint):
    (regions,) = build_proposer(config(LITE, checkpoint[LITE], score_thresh=1.1)).propose(IMAGES[:1])
    assert set(regions.sources) == {"grid"}
    assert len(regions.boxes_px) == 4 + 9


def lively(name):
    """A random detector whose features differ from place to place, since its normalisation fits them."""
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=3)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # takes what it sees now
    with torch.no_grad():
        model.train().backbone(torch.randn(2, 3, 320, 320))
    return model.eval()


@pytest.mark.parametrize("name", [FASTER, LITE])
def test_bf16_finds_nearly_the_same_boxes_and_does_not_round_them(name):
    exact, rough = (
        DetectorProposer(lively(name), config(name, "none.pth", levels=(), precision=precision)).propose(IMAGES[:1])[0]
        for precision in ("fp32", "bf16")
    )
    assert not np.array_equal(rough.scores, exact.scores)
    boxes_R4 = torch.from_numpy(rough.boxes_px)
    # Boxes that bf16 rounds are at 0.957 and 0.975 here.
    assert box_iou(boxes_R4, torch.from_numpy(exact.boxes_px)).amax(1).median() > 0.985
    rounded_R4 = boxes_R4.bfloat16().float() == boxes_R4
    assert rounded_R4.float().mean() < 0.1  # those at the picture's edges


def test_masks_and_keypoints_are_not_computed(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "mask.safetensors"
    save_file(get_model("maskrcnn_resnet50_fpn", weights=None, weights_backbone=None, num_classes=3).state_dict(), path)
    model = load_detector("maskrcnn_resnet50_fpn", 3, path)
    model.roi_heads.mask_head = None  # would fail if it were run
    (regions,) = DetectorProposer(model, config("maskrcnn_resnet50_fpn", path, levels=())).propose(IMAGES[1:])
    assert regions.boxes_px.shape[1] == 4


@pytest.mark.parametrize(("file", "epsilon"), [(WITHOUT_EPSILON[0], 0.0), ("mine.pth", 1e-5)])
def test_torchvisions_old_checkpoints_run_without_the_epsilon_of_batch_normalisation(tmp_path, file, epsilon):
    torch.manual_seed(0)
    state = get_model("fasterrcnn_resnet50_fpn", weights=None, weights_backbone=None).state_dict()
    # As torchvision stores them, from frozen normalisation.
    torch.save({key: tensor for key, tensor in state.items() if "num_batches" not in key}, tmp_path / file)
    model = load_detector("fasterrcnn_resnet50_fpn", 91, tmp_path / file)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d | FrozenBatchNorm2d)]
    assert {norm.eps for norm in norms} == {epsilon}
    assert len(norms) == 53


class TestRefused:
    def test_weights_of_another_number_of_classes(self, checkpoint):
        with pytest.raises(ModelError, match=r"(?s)not weights of ssdlite320.* with classes=91: .*size mismatch"):
            load_detector(LITE, 91, checkpoint[LITE])

    def test_weights_of_another_model(self, checkpoint):
        with pytest.raises(ModelError, match=r"not weights of ssdlite320.*tensors differ"):
            load_detector(LITE, 3, checkpoint[FASTER])

    def test_a_file_that_is_no_state_dict(self, tmp_path):
        torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "x.pth")
        with pytest.raises(ModelError, match=r"x\.pth: holds no plain state dict"):
            load_detector(LITE, 3, tmp_path / "x.pth")

    def test_a_missing_checkpoint(self, tmp_path):
        with pytest.raises(ModelError, match=r"no checkpoint at .*none\.pth; download .*GOAL_RAY_WEIGHTS"):
            config(LITE, tmp_path / "none.pth").check()

    def test_a_file_whose_name_promises_another_checksum(self, checkpoint, tmp_path):
        path = tmp_path / "ssdlite-01234567.pth"
        path.write_bytes(checkpoint[LITE].read_bytes())
        with pytest.raises(ModelError, match=r"sha256 is .*not 01234567; download it again"):
            build_proposer(config(LITE, path))

    @pytest.mark.parametrize(
        ("setting", "error"),
        [
            ({"model": "yolo"}, "one of torchvision's detectors: .*fcos_resnet50_fpn"),
            ({"classes": 1}, "classes must be at least 2"),
            ({"levels": [1]}, "levels must be"),
            ({"images_per_batch": 0}, "images_per_batch must be at least 1"),
        ],
    )
    def test_impossible_settings(self, setting, error):
        with pytest.raises(ConfigError, match=error):
            build_config(DetectorConfig, {"model": LITE, "checkpoint": "x.pth", **setting}, source="test")
