"""SAM regions: the official model classes at a width that runs in milliseconds, with random weights."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.build_sam import _build_sam
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from tiny_sam import IMAGE_PX, tiny_sam
from torchvision.ops import box_iou

from goal_ray.config import build_config
from goal_ray.errors import ConfigError, ModelError
from goal_ray.lism.benchmark import generators, matched, read_pictures
from goal_ray.regions import SamConfig, build_proposer, usable
from goal_ray.regions.sam_decoder import decode_points, two_way
from goal_ray.regions.sam_weights import MobileEncoder, empty_sam, load_sam


@pytest.fixture(scope="module")
def sam():
    return tiny_sam()


@pytest.fixture(scope="module")
def checkpoint(sam, tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "tiny.pth"
    torch.save(sam.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def image():
    """A smooth 90 × 60 image of three blobs."""
    y, x = np.mgrid[:60, :90]
    blobs = [((20, 15), 9), ((60, 20), 14), ((40, 45), 11)]
    channels = [np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * r**2)) for (cx, cy), r in blobs]
    return (255 * np.stack(channels, -1)).astype(np.uint8)


def everything(checkpoint, **settings):
    """A config that keeps masks whatever the (random) model thinks of them."""
    return SamConfig(checkpoint=checkpoint, pred_iou_thresh=-1e9, stability_score_thresh=0.0, **settings)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_loaded_checkpoint_is_the_same_model(sam, tmp_path, suffix, image):
    path = tmp_path / f"model{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(sam.state_dict(), path)
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    with torch.no_grad():
        outputs = [
            model([{"image": pixels, "original_size": image.shape[:2]}], multimask_output=True)[0]["low_res_logits"]
            for model in (sam, load_sam(path))
        ]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "depth", "heads", "global_blocks"),
    [(768, 12, 12, [2, 5, 8, 11]), (1024, 24, 16, [5, 11, 17, 23]), (1280, 32, 16, [7, 15, 23, 31])],
    ids=["vit_b", "vit_l", "vit_h"],
)
def test_the_official_architectures_are_read_from_shapes(width, depth, heads, global_blocks):
    with torch.device("meta"):
        official = _build_sam(width, depth, heads, global_blocks)
        built = empty_sam({name: tuple(tensor.shape) for name, tensor in official.state_dict().items()})
    assert str(built) == str(official)
    for ours, theirs in zip(built.image_encoder.blocks, official.image_encoder.blocks, strict=True):
        assert (ours.window_size, ours.attn.num_heads) == (theirs.window_size, theirs.attn.num_heads)


@pytest.mark.parametrize("crop_layers", [0, 1])
def test_regions_agree_with_the_official_generator(sam, checkpoint, image, crop_layers):
    # With no thinning both give every mask. Large, since 20 px decide what a crop cuts off.
    image = image.repeat(5, axis=0).repeat(5, axis=1)
    settings = {"points_per_side": 6, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0, "crop_n_layers": crop_layers}
    official = SamAutomaticMaskGenerator(sam, pred_iou_thresh=-1e9, stability_score_thresh=0.0, **settings)
    masks = sorted((mask for mask in official.generate(image) if mask["area"]), key=lambda mask: mask["predicted_iou"])
    (regions,) = build_proposer(everything(checkpoint, **settings)).propose([image])
    assert len(regions.scores) == pytest.approx(len(masks), rel=0.1)
    scores = np.array([mask["predicted_iou"] for mask in masks])
    cell_px = 4 * image.shape[1] / IMAGE_PX
    found = 0
    for box, score, area in zip(regions.boxes_px, regions.scores, regions.areas_px, strict=True):
        nearest = np.flatnonzero(np.abs(scores - score) < 1e-4)
        for x, y, width, height in (masks[index]["bbox"] for index in nearest):
            found += np.abs(box - [x, y, x + width + 1, y + height + 1]).max() <= cell_px
        assert 0 < area <= (box[2] - box[0]) * (box[3] - box[1]) + cell_px * (sum(image.shape[:2]))
    assert found >= 0.9 * len(regions.scores) > 20


def test_boxes_and_areas_are_of_masks_without_small_parts(checkpoint, image):
    settings = {"points_per_side": 4, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0}
    (before,) = build_proposer(everything(checkpoint, **settings)).propose([image])
    (same,) = build_proposer(everything(checkpoint, **settings, min_mask_region_area=1)).propose([image])
    (after,) = build_proposer(everything(checkpoint, **settings, min_mask_region_area=300)).propose([image])
    # No part of a mask is smaller than a pixel; but the masks of equal score may stand in another order.
    for name in ("boxes_px", "areas_px", "scores"):
        assert np.sort(getattr(same, name), axis=0) == pytest.approx(np.sort(getattr(before, name), axis=0), abs=1e-3)
    # About 38 cells; the random masks are made of blocks of 16.
    assert len(after.scores) == len(before.scores)
    sides = [(each.boxes_px[:, 2:] - each.boxes_px[:, :2]).prod(1).sum() for each in (before, after)]
    assert 0.5 * sides[0] < sides[1] < 0.99 * sides[0]


@pytest.mark.slow
def test_compiled_models_find_the_same(checkpoint, image):
    settings = {"points_per_side": 4, "points_per_batch": 4}
    (expected,), (found,) = (
        build_proposer(everything(checkpoint, **settings, compile=compiled)).propose([image])
        for compiled in (False, True)
    )
    assert found.boxes_px == pytest.approx(expected.boxes_px, abs=1e-2)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)


def test_the_decoder_computes_what_the_official_one_does_for_many_images_and_points():
    sam = tiny_sam()
    sam.mask_decoder.double()
    random = torch.Generator().manual_seed(5)
    features = torch.randn(3, 32, 8, 8, generator=random, dtype=torch.float64)
    points = torch.rand(3, 5, 2, generator=random) * IMAGE_PX
    ones = torch.ones(5, 1, dtype=torch.int)
    expected = []
    for image, at in zip(features, points, strict=True):
        sparse, dense = sam.prompt_encoder(points=(at[:, None], ones), boxes=None, masks=None)
        pe = sam.prompt_encoder.get_dense_pe().double()
        expected.append(sam.mask_decoder(image[None], pe, sparse.double(), dense, multimask_output=True))
    logits, scores = (torch.cat(each).flatten(0, 1) for each in zip(*expected, strict=True))
    median = scores.median().item()
    kept = scores > median
    pe_NC = sam.prompt_encoder.get_dense_pe()[0].flatten(1).T.double()
    found, found_scores, image = decode_points(sam, features, pe_NC, points, (6, 7), median, two_way)
    # Logits are of order 10 and computed in float64 but for the float32 of points and results.
    torch.testing.assert_close(found.double(), logits[kept][:, :24, :28], rtol=0, atol=1e-4)
    torch.testing.assert_close(found_scores.double(), scores[kept], rtol=0, atol=1e-5)
    assert image.tolist() == torch.arange(3).repeat_interleave(15)[kept].tolist()


def test_a_checkpoint_under_mobile_sams_names_is_the_encoder_with_these_weights(tmp_path):
    torch.manual_seed(4)
    encoder = MobileEncoder().eval()
    rest = {"prompt_encoder": PromptEncoder(256, (64, 64), (1024, 1024), 16)}
    rest["mask_decoder"] = MaskDecoder(
        transformer_dim=256, transformer=TwoWayTransformer(2, 256, 8, 2048), num_multimask_outputs=3
    )
    state = {f"{part}.{name}": tensor for part, module in rest.items() for name, tensor in module.state_dict().items()}
    for name, tensor in encoder.state_dict().items():
        name = re.sub(r"stages\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        name = name.replace("body.", "").replace("stages.", "layers.").replace(".conv.weight", ".c.weight")
        name = name.replace("patch_embed.conv1", "patch_embed.seq.0").replace("patch_embed.conv2", "patch_embed.seq.2")
        state[f"image_encoder.{name}"] = tensor
    state |= {"image_encoder.head.weight": torch.zeros(9, 320), "image_encoder.norm_head.bias": torch.zeros(320)}
    torch.save(state, tmp_path / "mobile_sam.pt")
    loaded = load_sam(tmp_path / "mobile_sam.pt")
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        features = loaded.image_encoder(pixels)
        torch.testing.assert_close(features, encoder(pixels), rtol=0, atol=0)
    assert features.shape == (1, 256, 16, 16)


def test_images_in_one_call_are_as_if_alone(checkpoint, image):
    others = [image, image[:40], np.ascontiguousarray(image[:, ::-1])]
    proposer = build_proposer(everything(checkpoint, points_per_side=3, images_per_batch=2, points_per_batch=20))
    for together, alone in zip(proposer.propose(others), (proposer.propose([each])[0] for each in others), strict=True):
        np.testing.assert_allclose(together.boxes_px, alone.boxes_px, atol=1e-3)
        np.testing.assert_allclose(together.scores, alone.scores, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_about_the_same(checkpoint, image, precision):
    exact, half = (
        build_proposer(everything(checkpoint, points_per_side=4, precision=each)).propose([image])[0]
        for each in ("fp32", precision)
    )
    iou = box_iou(torch.from_numpy(exact.boxes_px), torch.from_numpy(half.boxes_px))
    assert iou.amax(1).min() > 0.7


def test_half_precision_does_not_round_the_scores(checkpoint, image):
    settings = {"points_per_side": 4, "box_nms_thresh": 1.0, "crop_nms_thresh": 1.0, "precision": "bf16"}
    (regions,) = build_proposer(everything(checkpoint, **settings)).propose([image])
    scores_R = torch.from_numpy(regions.scores)
    assert len(scores_R) > 20
    assert (scores_R.bfloat16().float() == scores_R).float().mean() < 0.1


def test_mobile_sam_agrees_with_the_official_generator_on_photographs(shared):
    weights = shared / "weights" / "mobile_sam_fp16.safetensors"
    both = generators(SamConfig(checkpoint=weights, points_per_side=6), "cpu")
    found = [matched(*(generate(image) for generate in both.values())) for image in read_pictures([], 2048).values()]
    for name in both:
        share = sum(each[f"{name}_matched"] * each[name] for each in found) / sum(each[name] for each in found)
        assert share >= 0.95, (name, found)


def test_masks_thought_poor_or_unstable_are_left_out(checkpoint, image):
    all_of_them = build_proposer(everything(checkpoint, points_per_side=6)).propose([image])[0]
    median = float(np.median(all_of_them.scores))
    config = SamConfig(checkpoint=checkpoint, points_per_side=6, pred_iou_thresh=median, stability_score_thresh=0.0)
    assert 0 < len(build_proposer(config).propose([image])[0].scores) < len(all_of_them.scores)
    assert (build_proposer(config).propose([image])[0].scores > median).all()
    none = SamConfig(checkpoint=checkpoint, points_per_side=6, pred_iou_thresh=-1e9, stability_score_thresh=1.1)
    assert build_proposer(none).propose([image])[0].boxes_px.shape == (0, 4)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (129, 64)])
def test_boxes_stay_inside_images_of_any_shape(checkpoint, size):
    width, height = size
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image.flags.writeable = False
    (regions,) = build_proposer(everything(checkpoint, points_per_side=3)).propose([image])
    x0, y0, x1, y1 = regions.boxes_px.T
    assert len(regions.scores) > 0
    assert ((x0 >= 0) & (y0 >= 0) & (x1 > x0) & (y1 > y0) & (x1 <= width) & (y1 <= height)).all()
    usable(regions, size)


def test_points_per_batch_changes_nothing(checkpoint, image):
    few, many = (
        build_proposer(everything(checkpoint, points_per_side=4, points_per_batch=batch)).propose([image])[0]
        for batch in (3, 128)
    )
    # The order of float additions differs between batch sizes.
    np.testing.assert_allclose(few.boxes_px, many.boxes_px, atol=1e-3)
    np.testing.assert_allclose(few.scores, many.scores, atol=1e-5)


def test_a_missing_checkpoint_says_which_file_to_put_where(tmp_path, monkeypatch):
    monkeypatch.setenv("GOAL_RAY_WEIGHTS", str(tmp_path))
    with pytest.raises(ModelError, match=r"sam_vit_b_01ec64\.pth.*GOAL_RAY_WEIGHTS") as error:
        build_proposer(SamConfig(checkpoint=Path("sam_vit_b_01ec64.pth")))
    assert str(tmp_path) in str(error.value)


def test_a_checkpoint_is_found_by_name_in_the_weights_folder(checkpoint, monkeypatch):
    monkeypatch.setenv("GOAL_RAY_WEIGHTS", str(checkpoint.parent))
    config = build_config(SamConfig, {"checkpoint": checkpoint.name}, source="test")
    assert build_proposer(config) is not None


def test_a_wrong_checksum_is_refused_and_a_right_one_is_not(checkpoint):
    right = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert build_proposer(SamConfig(checkpoint=checkpoint, sha256=right.upper())) is not None
    with pytest.raises(ModelError, match=right):
        build_proposer(SamConfig(checkpoint=checkpoint, sha256="0" * 64))


def test_an_official_name_is_held_to_the_official_checksum(checkpoint, tmp_path):
    impostor = tmp_path / "sam_vit_b_01ec64.pth"
    impostor.write_bytes(checkpoint.read_bytes())
    with pytest.raises(ModelError, match="ec2df6"):
        build_proposer(SamConfig(checkpoint=impostor))


class Trap:
    """Pickles to a call of print: what a checkpoint must not be able to do."""

    def __reduce__(self):
        return print, ("code from a checkpoint ran",)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"PK\x03\x04broken"])
def test_damaged_checkpoints_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="model"):
        load_sam(path)


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(checkpoint.read_bytes()[:-5000])
    with pytest.raises(ModelError):
        load_sam(path)


def test_code_in_a_checkpoint_is_not_run(tmp_path, capsys):
    torch.save({"weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(ModelError, match="damaged"):
        load_sam(tmp_path / "trap.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("change", ["missing", "extra", "other model", "no tensors", "list"])
def test_weights_that_do_not_fit_are_refused(sam, tmp_path, change):
    state = dict(sam.state_dict())
    if change == "missing":
        del state["mask_decoder.iou_token.weight"]
    elif change == "extra":
        state["head.weight"] = torch.zeros(2)
    elif change == "other model":
        state = torch.nn.Linear(3, 3).state_dict()
    elif change == "no tensors":
        state = {"model": "vit_b"}
    torch.save([1, 2] if change == "list" else state, tmp_path / "model.pth")
    with pytest.raises(ModelError, match=r"not a SAM checkpoint|holds no plain state dict"):
        load_sam(tmp_path / "model.pth")


def test_the_checkpoint_is_a_required_setting():
    with pytest.raises(ConfigError, match="checkpoint: required"):
        build_config(SamConfig, {}, source="test")


def test_a_date_in_a_name_is_no_checksum(checkpoint, tmp_path):
    dated = tmp_path / "sam-20240101.pth"  # torchvision would mean the beginning of a checksum
    dated.write_bytes(checkpoint.read_bytes())
    assert build_proposer(SamConfig(checkpoint=dated)) is not None


@pytest.mark.parametrize("encoder", ["vit", "mobile"])
def test_the_necks_norms_do_not_overflow_in_fp16(checkpoint, encoder):
    neck = load_sam(checkpoint).image_encoder.neck if encoder == "vit" else MobileEncoder().neck
    for norm in (neck[1], neck[3]):
        channels = norm.weight.numel()
        official = LayerNorm2d(channels)
        official.load_state_dict(norm.state_dict())
        torch.manual_seed(0)
        x = 300 * torch.randn(2, channels, 5, 7)
        assert torch.equal(norm(x), official(x))
        half = norm.half()(x.half())
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), official(x), rtol=0.01, atol=0.01)
        assert not torch.allclose(official.half()(x.half()).float(), half.float(), atol=0.01)


def test_fp32_is_no_tf32_where_sam_is(checkpoint, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    build_proposer(SamConfig(checkpoint=checkpoint))
    assert not torch.backends.cudnn.allow_tf32


def test_sam_finds_the_same_however_much_it_takes_at_once(checkpoint, image):
    proposer = build_proposer(everything(checkpoint, points_per_side=4, images_per_batch=2, points_per_batch=3))
    assert proposer.at_once == (2, 3)
    expected = proposer.propose([image, image])
    encode, transform = proposer.encode, proposer.transform_tokens
    passes = []
    proposer.encode = lambda images: passes.append(len(images)) or encode(images)
    proposer.transform_tokens = lambda model, points, *rest: (
        passes.append(len(points)) or transform(model, points, *rest)
    )
    proposer.at_once = (1, 1)
    for found, before in zip(proposer.propose([image, image]), expected, strict=True):
        np.testing.assert_allclose(found.boxes_px, before.boxes_px, atol=1e-3)
    assert set(passes) == {1}
