"""Which region a sentence is matched with, by a tiny real CLIP."""

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from goal_ray.lism.config import MatcherConfig
from goal_ray.lism.matching import Matcher, MatchTask
from goal_ray.model import ModelConfig


@pytest.fixture(scope="module")
def matcher(tiny_clip):
    return Matcher(MatcherConfig(ModelConfig(tiny_clip), batch=5), "cpu")


def task(seed, boxes, sentences, size=(60, 40)):
    width, height = size
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return MatchTask(picture, np.array(boxes, np.float32), sentences)


TASKS = [
    task(0, [[0, 0, 60, 40], [0, 0, 30, 40], [10, 5, 20.5, 30], [59, 39, 60, 40]], ["A red ball.", "一只狗。", "Sky"]),
    task(1, [[0, 0, 60, 40]], ["A red ball."]),
    task(2, [[0, 0, 20, 20], [20, 0, 60, 20], [0, 20, 60, 40]], ["A red ball.", "A red ball.", "word " * 300]),
]


def test_a_sentence_gets_the_region_whose_crop_is_most_similar(matcher):
    clip, tokenize = matcher.clip, open_clip.get_tokenizer("tiny_clip")
    preprocess = image_transform_v2(PreprocessCfg(size=32), is_train=False)
    for asked, pairs in zip(TASKS, matcher.match(TASKS), strict=True):
        image = Image.fromarray(asked.picture_HW3)
        outer = [(*map(int, np.floor(box[:2])), *map(int, np.ceil(box[2:]))) for box in asked.boxes_px_R4]
        with torch.no_grad():
            crops = clip.encode_image(torch.stack([preprocess(image.crop(box)) for box in outer]), normalize=True)
            texts = clip.encode_text(tokenize(asked.sentences), normalize=True)
        best, region = (texts @ crops.T).max(dim=1)
        assert [pair.sentence for pair in pairs] == list(range(len(asked.sentences)))
        assert [pair.region for pair in pairs] == region.tolist()
        # float32, and other batch sizes than the matcher's
        assert [pair.similarity for pair in pairs] == pytest.approx(best.tolist(), abs=1e-5)


def test_what_else_is_in_the_batch_changes_nothing_but_last_digits(matcher):
    together = matcher.match(TASKS)
    alone = [matcher.match([asked])[0] for asked in TASKS]
    for first, second in zip(together, alone, strict=True):
        assert [pair.region for pair in first] == [pair.region for pair in second]
        assert [pair.similarity for pair in first] == pytest.approx([pair.similarity for pair in second], abs=1e-6)


def test_the_same_batch_gives_the_same_bits(matcher):
    assert matcher.match(TASKS) == matcher.match(TASKS)


@pytest.mark.parametrize("size", [(2048, 1), (1, 2048), (1, 1)])
@pytest.mark.parametrize("crop_mode", ["shortest", "squash"])
def test_pictures_of_any_shape_are_matched(tiny_clip, size, crop_mode):
    matcher = Matcher(MatcherConfig(ModelConfig(tiny_clip), crop_mode=crop_mode), "cpu")
    (pairs,) = matcher.match([task(0, [[0, 0, *size]], ["A thread."], size)])
    assert np.isfinite(pairs[0].similarity)


def test_embeddings_are_of_unit_length(matcher):
    crops = matcher._embed_crops([(Image.fromarray(TASKS[0].picture_HW3), box) for box in TASKS[0].boxes_px_R4])
    torch.testing.assert_close(F.normalize(crops, dim=-1), crops)
