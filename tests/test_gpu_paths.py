"""What runs on a GPU keeps its tensors there, and a training step never waits for it; on a pretended GPU."""

import numpy as np
import pytest
import torch
from goal_batches import MEAN, STD, load, random_batch
from pretended_gpu import GPU, MixedDevices, WaitsForTheDevice, pretended_gpu
from tiny_sam import tiny_sam
from torchvision.models import get_model

from goal_ray.evaluate.embed import embed_shards
from goal_ray.goal_batch import GoalBatch, count_batch
from goal_ray.lism.config import MatcherConfig
from goal_ray.lism.matching import Matcher, MatchTask
from goal_ray.losses import CachedGradients, GoalModel
from goal_ray.model import load_model
from goal_ray.regions import DetectorConfig, SamConfig, build_proposer
from goal_ray.regions.detector import DetectorProposer, load_detector
from goal_ray.regions.sam import SamProposer
from goal_ray.regions.sam_weights import load_sam
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.settings import LossConfig, ModelConfig, StepConfig
from goal_ray.step import prepare_step
from goal_ray.train.feed import MicroBatch
from goal_ray.train.window import LogWindow

PICTURES = [np.random.default_rng(seed).integers(0, 256, (60, 90, 3), np.uint8) for seed in (0, 1)]


@pytest.mark.parametrize(
    "wait",
    [
        lambda there_4, _: there_4.sum().item(),
        lambda there_4, _: bool((there_4 > 0).any()),
        lambda there_4, _: there_4.tolist(),
        lambda there_4, _: there_4.nonzero(),
        lambda there_4, _: there_4[there_4 > 0],
        lambda there_4, _: there_4.cpu(),
        lambda there_4, here_4: there_4[here_4.long()],
        lambda _, here_4: here_4.to(GPU),
        lambda there_4, here_4: here_4.copy_(there_4),
        lambda *_: torch.tensor([1.0, 2.0], device=GPU),
    ],
)
def test_a_wait_for_the_device_is_told(wait):
    with pretended_gpu(), pytest.raises(WaitsForTheDevice):
        wait(torch.ones(4, device=GPU), torch.ones(4))


def test_mixed_devices_are_told_even_where_waiting_is_allowed():
    with pretended_gpu(may_wait=True), pytest.raises(MixedDevices):
        torch.ones(4, device=GPU) + torch.ones(4)


def test_what_needs_no_waiting_is_computed():
    with pretended_gpu():
        there_4, here_4 = torch.ones(4, device=GPU), torch.arange(4.0)
        there_4 = there_4 * torch.tensor(2.0) + here_4.to(GPU, non_blocking=True)
        assert there_4.device == GPU
        assert there_4.to("cpu", non_blocking=True).tolist() == [2, 3, 4, 5]
        assert here_4.sum().item() == 6
        assert (there_4 @ torch.ones(4, 3, device=GPU)).shape == (3,)


@pytest.fixture
def step(tiny_clip):
    """A model and a batch on the CPU, and how to get them to a GPU."""
    loaded = load(tiny_clip)
    loaded.clip.float()
    prepare_step(loaded.clip, StepConfig())
    batch = random_batch(loaded.tokenizer, seed=4)
    batch = batch._replace(counts_R4=count_batch(batch)[None])
    return loaded.clip, batch


def on_gpu(batch: GoalBatch) -> GoalBatch:
    return GoalBatch(*(tensor.to(GPU, non_blocking=True) for tensor in batch[:-1]), batch.counts_R4)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("mode", ["coverage", "touch"])
def test_the_loss_never_waits(step, backend, mode):
    clip, batch = step
    expected_4 = GoalModel(clip, LossConfig(tsl_backend="eager", pooling=mode), MEAN, STD)(batch)
    with pretended_gpu():
        terms_4 = GoalModel(clip, LossConfig(tsl_backend=backend, pooling=mode), MEAN, STD).to(GPU)(on_gpu(batch))
        assert terms_4.device == GPU
        if backend == "eager":  # Triton's kernels do not run here
            torch.testing.assert_close(terms_4.to("cpu", non_blocking=True), expected_4)


def test_the_loss_of_a_chunk_never_waits(step):
    clip, batch = step
    with pretended_gpu():
        model = GoalModel(clip, LossConfig(tsl_backend="eager"), MEAN, STD).to(GPU)
        features = model(on_gpu(batch), features_only=True)
        cached = CachedGradients(torch.ones(2, device=GPU), features)
        assert model(on_gpu(batch), cached=cached).device == GPU


def test_a_log_line_never_waits(step, monkeypatch):
    happened = []

    class Event:
        def record(self):
            happened.append("recorded")

        def query(self):
            happened.append("asked")
            return False

    monkeypatch.setattr(torch.cuda, "Event", Event)
    _, batch = step
    with pretended_gpu():
        window = LogWindow(GPU)
        window.add(0, torch.ones(4, device=GPU), MicroBatch([on_gpu(batch)], batch.counts_R4, [7], None), 10)
        window.close({"step": 1}, [1, 1, 1, 1], torch.ones(1, device=GPU))
        assert window.arrived() is None
    assert happened == ["recorded", "asked"]


@pytest.mark.parametrize("mutual_best", [False, True])
def test_the_matcher_computes_on_the_gpu_what_it_computes_on_the_cpu(tiny_clip, mutual_best):
    config = MatcherConfig(ModelConfig(tiny_clip), batch=3, mutual_best=mutual_best)
    boxes = np.array([[0, 0, 90, 60], [5, 5, 40, 30.5]], np.float32)
    tasks = [MatchTask(picture, boxes, ["A red ball.", "A dog."]) for picture in PICTURES]
    expected = Matcher(config, "cpu").match(tasks)
    with pretended_gpu(may_wait=True):
        found = Matcher(config, "cuda:0").match(tasks)
    for each, other in zip(found, expected, strict=True):
        assert [(pair.sentence, pair.region) for pair in each] == [(pair.sentence, pair.region) for pair in other]
        # On a CPU torchvision resizes bytes, on a GPU floats.
        assert [pair.similarity for pair in each] == pytest.approx([pair.similarity for pair in other], abs=1e-3)


@pytest.mark.parametrize("settings", [{}, {"crop_n_layers": 1, "min_mask_region_area": 20}])
def test_sam_computes_on_the_gpu_what_it_computes_on_the_cpu(tmp_path, settings):
    torch.save(tiny_sam().state_dict(), tmp_path / "sam.pth")
    config = SamConfig(
        checkpoint=tmp_path / "sam.pth",
        points_per_side=4,
        points_per_batch=16,
        pred_iou_thresh=-1e9,
        stability_score_thresh=0.5,
        **settings,
    )
    expected = build_proposer(config).propose(PICTURES)
    sam = load_sam(tmp_path / "sam.pth")
    with pretended_gpu(may_wait=True):
        found = SamProposer(sam.to(GPU), config).propose(PICTURES)
    assert [len(each.boxes_px) for each in found] == [len(each.boxes_px) for each in expected] != [0, 0]
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(each.boxes_px, other.boxes_px)


def test_a_detector_computes_on_the_gpu_what_it_computes_on_the_cpu(tmp_path):
    name = "ssdlite320_mobilenet_v3_large"
    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "detector.pth")
    config = DetectorConfig(model=name, checkpoint=tmp_path / "detector.pth", classes=3, score_thresh=0.0)
    expected = build_proposer(config).propose(PICTURES)
    model = load_detector(name, 3, tmp_path / "detector.pth")
    with pretended_gpu(may_wait=True):
        found = DetectorProposer(model.to(GPU), config).propose(PICTURES)
    for each, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(each.boxes_px, other.boxes_px)


def test_an_evaluation_computes_on_the_gpu_what_it_computes_on_the_cpu(tiny_clip, tmp_path):
    tars = draw_scenes(tmp_path, 5, 3, SceneSettings(size=40))
    expected = embed_shards(load_model(ModelConfig(tiny_clip)), tars, batch=3, device="cpu", threads=1)
    with pretended_gpu(may_wait=True):
        found = embed_shards(load_model(ModelConfig(tiny_clip)), tars, batch=3, device="cuda:0", threads=1)
    torch.testing.assert_close(found.image_IE, expected.image_IE)
    torch.testing.assert_close(found.text_TE, expected.text_TE)
