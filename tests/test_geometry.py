"""Boxes go through exactly the geometry of the pixels."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from goal_ray.geometry import PixelGeometry, outer_box, random_part, resize
from goal_ray.settings import ResizeConfig

SIZE, GRID = 64, (8, 8)
MODES = ["shortest", "squash", "random_resized_crop"]


def paint(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    """A black picture with one white box."""
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = box
    pixels[y0:y1, x0:x1] = 255
    return Image.fromarray(pixels)


def bright_extent(square_3SS: np.ndarray) -> tuple[int, int, int, int]:
    """The box, in pixels of the square, around all that is more than half bright."""
    ys, xs = np.nonzero(square_3SS[0] > 127)
    return int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1


@given(st.data())
@settings(max_examples=60)
@pytest.mark.parametrize("mode", MODES)
def test_a_painted_box_lands_where_its_box_does(mode, data):
    width = data.draw(st.integers(40, 300))
    height = data.draw(st.integers(40, 300))
    x0 = data.draw(st.integers(0, width - 20))
    y0 = data.draw(st.integers(0, height - 20))
    x1 = data.draw(st.integers(x0 + 20, width))
    y1 = data.draw(st.integers(y0 + 20, height))
    geometry = PixelGeometry(ResizeConfig(mode, min_scale=0.5, min_visible=0.0), SIZE, GRID)
    seed = data.draw(st.integers(0, 2**31))
    square, cells = geometry(paint(width, height, (x0, y0, x1, y1)), np.array([[x0, y0, x1, y1]]), seed)
    box_px = cells[0] * SIZE / GRID[0]
    if min(box_px[2] - box_px[0], box_px[3] - box_px[1]) < 3:
        return  # thinner than what resampling leaves bright
    assert np.abs(np.array(bright_extent(square)) - box_px).max() <= 1.5


@pytest.mark.parametrize(("width", "height"), [(200, 100), (101, 333), (64, 64), (1, 1), (7, 3)])
def test_shortest_equals_open_clips_own_preprocessing(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(pixels)
    theirs = open_clip.image_transform(SIZE, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(image)
    mine, _ = PixelGeometry(ResizeConfig(), SIZE, GRID)(image, np.empty((0, 4)))
    assert torch.equal(torch.from_numpy(mine).float() / 255, theirs)


@given(st.integers(1, 300), st.integers(1, 300))
@settings(max_examples=60)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])  # a GPU resizes bytes as floats
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_a_tensor_becomes_the_same_square_as_a_pil_picture(mode, interpolation, dtype, width, height):
    # No black and white, which PIL clips between its two passes where bicubic overshoots them.
    pixels = np.random.default_rng(width).integers(64, 192, (height, width, 3), np.uint8)
    geometry = PixelGeometry(ResizeConfig(mode), SIZE, GRID, interpolation)
    expected, _ = geometry(Image.fromarray(pixels), np.empty((0, 4)))
    square = geometry.square(torch.from_numpy(pixels).permute(2, 0, 1).to(dtype))
    assert (square.float() - torch.from_numpy(expected).float()).abs().max() <= 2


@given(st.data())
@settings(max_examples=100)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_tensor_is_resized_exactly_as_torchvision_does_it(interpolation, channels, data):
    height, width = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 200))
    new_height, new_width = data.draw(st.integers(8, 200)), data.draw(st.integers(8, 200))
    picture = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    tensor = torch.from_numpy(picture).permute(2, 0, 1)  # as the readers hand it in, or with its channels apart
    tensor = tensor if data.draw(st.booleans()) else tensor.contiguous()
    mode = InterpolationMode(interpolation)
    expected = v2.functional.resize(tensor, [new_height, new_width], mode, antialias=True)
    assert torch.equal(resize(tensor, (new_height, new_width), interpolation), expected)


def test_box_cut_away_by_center_crop_is_dropped():
    geometry = PixelGeometry(ResizeConfig(), SIZE, GRID)
    boxes = np.array([[0, 0, 40, 100], [100, 0, 200, 100]])  # of a 300-pixel-wide picture only 100..200 stays
    _, cells = geometry(Image.new("RGB", (300, 100)), boxes)
    assert cells[0].tolist() == [0, 0, 0, 0]
    assert cells[1].tolist() == [0, 0, 8, 8]


@pytest.mark.parametrize("size", [(403, 4), (4, 1200), (12_000, 1)])
def test_a_thread_is_cut_to_its_middle_and_its_boxes_with_it(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    longest, center = int(np.argmax(size)), max(size) / 2
    box = np.array([0, 0, *size], np.float32)
    box[longest], box[longest + 2] = center - min(size) / 4, center + min(size) / 4  # half of the square that is kept
    square, cells = PixelGeometry(ResizeConfig(), SIZE, GRID)(Image.fromarray(pixels), box[None])
    expected = np.array([0, 0, 8, 8], np.float32)
    expected[longest], expected[longest + 2] = 2, 6
    # The resized side is cut to whole pixels of the model's square, here 4 to a cell.
    assert cells[0] == pytest.approx(expected, abs=0.13)
    if max(size) < 2000:
        whole = v2.Compose([v2.Resize(SIZE, InterpolationMode.BICUBIC), v2.CenterCrop(SIZE)])(Image.fromarray(pixels))
        assert np.array_equal(square, np.asarray(whole).transpose(2, 0, 1))


def test_box_half_cut_is_clipped_and_kept_only_above_min_visible():
    image, box = Image.new("RGB", (300, 100)), np.array([[40, 0, 140, 100]])  # 40 % of it stays
    kept = PixelGeometry(ResizeConfig(min_visible=0.3), SIZE, GRID)(image, box)[1]
    gone = PixelGeometry(ResizeConfig(min_visible=0.5), SIZE, GRID)(image, box)[1]
    assert kept[0] == pytest.approx([0, 0, 3.2, 8], abs=1e-4)
    assert gone[0].tolist() == [0, 0, 0, 0]


@given(st.data())
@settings(max_examples=200)
def test_a_box_inside_the_view_is_wholly_visible_whatever_is_rounded(data):
    width, height = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 5000))
    mode = data.draw(st.sampled_from(["squash", "random_resized_crop"]))
    geometry = PixelGeometry(ResizeConfig(mode, min_visible=1.0), data.draw(st.sampled_from([224, 336])), GRID)
    view = geometry.view((width, height), data.draw(st.integers(0, 2**31)))
    x0, y0, x1, y1 = view.part_px
    # By so much a box of pairs.json may reach over the edge.
    over = [data.draw(st.sampled_from([0.0, 0.01])) for _ in range(4)]
    boxes = np.array([[x0 - over[0], y0 - over[1], x1 + over[2], y1 + over[3]]], np.float32)
    assert geometry.cells(view, boxes) == pytest.approx(np.array([[0, 0, 8, 8]]), abs=1e-4)


def test_a_box_that_is_visibly_cut_is_not_wholly_visible():
    geometry = PixelGeometry(ResizeConfig(min_visible=1.0), SIZE, GRID)
    boxes = np.array([[100, 0, 200, 100], [99.9, 0, 200, 100], [100, 0, 200.1, 100]])
    kept = geometry.cells(geometry.view((300, 100)), boxes).any(axis=1)
    assert kept.tolist() == [True, False, False]


SIDE = st.one_of(st.integers(1, 12), st.integers(1, 4000))


@given(SIDE, SIDE, st.floats(0.05, 1), st.integers(0, 2**32 - 1))
@settings(max_examples=500)
def test_a_random_part_keeps_its_share_of_any_picture_and_nearly_its_shape(width, height, min_scale, seed):
    x0, y0, x1, y1 = random_part(width, height, min_scale, seed)
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height
    assert (x1 - x0) * (y1 - y0) >= min_scale * width * height * (1 - 1e-9)
    across, down = (x1 - x0) / width, (y1 - y0) / height
    # Either side may be rounded up by a pixel.
    assert across <= 4 / 3 * down + 1 / width
    assert down <= 4 / 3 * across + 1 / height


@pytest.mark.parametrize("size", [(1600, 200), (200, 1600), (1200, 800), (500, 500)])
def test_random_parts_of_a_picture_of_any_shape_differ_in_size_and_place(size):
    parts = [random_part(*size, 0.9, seed) for seed in range(200)]
    shares = [(x1 - x0) * (y1 - y0) / (size[0] * size[1]) for x0, y0, x1, y1 in parts]
    assert len(set(parts)) > 150
    assert min(shares) < 0.91
    assert max(shares) > 0.99
    for axis in (0, 1):
        # Parts at one end of the picture, at the other, and at neither.
        touches = [(part[axis] == 0, part[axis + 2] == size[axis]) for part in parts]
        assert {(False, False), (True, False), (False, True)} <= set(touches)


def test_random_crop_is_fixed_by_its_seed_and_leaves_torchs_random_state_alone():
    geometry = PixelGeometry(ResizeConfig("random_resized_crop", min_scale=0.3), SIZE, GRID)
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (90, 120, 3), np.uint8))
    state = torch.get_rng_state()
    first, again, other = (geometry(image, np.empty((0, 4)), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_seeding_leaves_nothing_behind_however_often_it_is_done():
    geometry = PixelGeometry(ResizeConfig("random_resized_crop"), SIZE, GRID)
    before = len(torch.cuda._queued_calls)
    for seed in range(3):
        geometry(Image.new("RGB", (90, 120)), np.empty((0, 4)), seed)
    assert len(torch.cuda._queued_calls) == before


@given(st.lists(st.floats(-50, 150), min_size=4, max_size=4))
def test_a_crop_is_never_empty_and_covers_its_box(values):
    x0, x1 = sorted(values[:2])
    y0, y1 = sorted(values[2:])
    left, top, right, bottom = outer_box((x0, y0, x1, y1), (100, 80))
    assert 0 <= left < right <= 100
    assert 0 <= top < bottom <= 80
    assert right - left >= max(1, min(x1, 100) - max(x0, 0))
    assert bottom - top >= max(1, min(y1, 80) - max(y0, 0))
