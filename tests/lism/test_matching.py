"""Which region a sentence is matched with, by a tiny real CLIP."""

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from goal_ray.lism.config import MatcherConfig
from goal_ray.lism.matching import Matcher, MatchTask, pick_pairs
from goal_ray.settings import ModelConfig


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
    clip, tokenize = matcher.clip.clip, open_clip.get_tokenizer("ViT-B-32")
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
        # Crops resized as tensors are within 2 of 255 levels of PIL's.
        assert [pair.similarity for pair in pairs] == pytest.approx(best.tolist(), abs=1e-3)


def test_what_else_is_in_the_batch_changes_nothing_but_last_digits(matcher):
    together = matcher.match(TASKS)
    alone = [matcher.match([asked])[0] for asked in TASKS]
    for first, second in zip(together, alone, strict=True):
        assert [pair.region for pair in first] == [pair.region for pair in second]
        assert [pair.similarity for pair in first] == pytest.approx([pair.similarity for pair in second], abs=1e-6)


def test_fp32_is_no_tf32_where_a_matcher_is(tiny_clip, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    Matcher(MatcherConfig(ModelConfig(tiny_clip)), "cpu")
    assert not torch.backends.cudnn.allow_tf32


def test_a_matcher_finds_the_same_pairs_however_much_it_takes_at_once(tiny_clip, matcher):
    other = Matcher(MatcherConfig(ModelConfig(tiny_clip), batch=5), "cpu")
    passes = []
    for name in ("embed_pictures", "embed_texts"):
        embed = getattr(other.clip, name)
        setattr(other.clip, name, lambda some, embed=embed: passes.append(len(some)) or embed(some))
    assert other.at_once == (5,)
    other.at_once = (2,)
    for first, second in zip(other.match(TASKS), matcher.match(TASKS), strict=True):
        assert [pair.region for pair in first] == [pair.region for pair in second]
    assert passes == [2, 2, 2, 2, 2, 2]  # 8 crops, 4 texts


def test_the_same_batch_gives_the_same_bits(matcher):
    assert matcher.match(TASKS) == matcher.match(TASKS)


@pytest.mark.parametrize("size", [(2048, 1), (1, 2048), (1, 1)])
@pytest.mark.parametrize("crop_mode", ["shortest", "squash"])
def test_pictures_of_any_shape_are_matched(tiny_clip, size, crop_mode):
    matcher = Matcher(MatcherConfig(ModelConfig(tiny_clip), crop_mode=crop_mode), "cpu")
    (pairs,) = matcher.match([task(0, [[0, 0, *size]], ["A thread."], size)])
    assert np.isfinite(pairs[0].similarity)


def test_bf16_gives_nearly_the_same_similarities(tiny_clip, matcher):
    half = Matcher(MatcherConfig(ModelConfig(tiny_clip), precision="bf16"), "cpu")
    for exact, rough in zip(matcher.match(TASKS), half.match(TASKS), strict=True):
        # 8 bits of mantissa, through two blocks
        assert [pair.similarity for pair in rough] == pytest.approx([pair.similarity for pair in exact], abs=0.02)


SIMILARITY_SR = torch.tensor([[0.1, 0.5, 0.3], [0.9, 0.2, 0.4], [0.8, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(0, 1), (1, 0), (2, 0)]),
        ({"regions_per_sentence": 2}, [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]),
        ({"regions_per_sentence": 9}, [(0, 1), (0, 2), (0, 0), (1, 0), (1, 2), (1, 1), (2, 0), (2, 1), (2, 2)]),
        ({"min_similarity": 0.8}, [(1, 0), (2, 0)]),
        ({"min_similarity": 0.91}, []),
        ({"mutual_best": True}, [(0, 1), (1, 0)]),
        ({"mutual_best": True, "regions_per_sentence": 3}, [(0, 1), (1, 0), (2, 2)]),
    ],
)
def test_pairs_are_those_that_the_options_ask_for(options, expected):
    pairs = pick_pairs(SIMILARITY_SR, MatcherConfig(**options))
    assert [(pair.sentence, pair.region) for pair in pairs] == expected
    assert all(pair.similarity == SIMILARITY_SR[pair.sentence, pair.region] for pair in pairs)


@given(
    similarity=arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.sampled_from(range(4))),
    count=st.integers(1, 7),
)
def test_pairs_of_a_sentence_are_its_most_similar_regions_best_first(similarity, count):
    pairs = pick_pairs(torch.from_numpy(similarity) / 4, MatcherConfig(regions_per_sentence=count))
    for sentence, row in enumerate(similarity / 4):
        mine = [pair for pair in pairs if pair.sentence == sentence]
        assert [pair.region for pair in mine] == sorted(range(len(row)), key=lambda region: -row[region])[:count]


def test_a_similarity_that_is_no_number_is_not_dropped_silently():
    (pair,) = pick_pairs(torch.tensor([[float("nan"), float("nan")]]), MatcherConfig(min_similarity=0.5))
    assert np.isnan(pair.similarity)
