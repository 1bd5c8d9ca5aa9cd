"""What is drawn and what is said about it, one scene at a time."""

import io
import json
from itertools import combinations

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from goal_ray.scenes.captions import PATTERN_PHRASES, PLACE_WORDS, SHAPE_WORDS, SIZE_WORDS
from goal_ray.scenes.drawing import SUPERSAMPLE, object_mask, render
from goal_ray.scenes.layout import (
    BACKGROUNDS,
    COLOURS,
    PATTERNS,
    SIDES,
    TEXTURES,
    crop_scene,
    full_scene,
    overlap,
    place_name,
)
from goal_ray.scenes.run import SceneSettings, draw_scene
from goal_ray.scenes.shapes import SHAPES, outline

FULL = SceneSettings()
CROPS = SceneSettings(short=True, crops=1)
seeds = st.integers(0, 2**32)


def drawn(seed, scene_settings, index=0):
    """Picture, caption and truth of one scene."""
    members = draw_scene(seed, index, scene_settings)[1]
    return Image.open(io.BytesIO(members["png"])), members["txt"].decode(), json.loads(members["json"])


def area_share(box, size):
    return (box[2] - box[0]) * (box[3] - box[1]) / (size[0] * size[1])


@settings(max_examples=40)
@given(seed=seeds, objects=st.integers(1, 9), size=st.sampled_from([32, 65, 128]), crops=st.sampled_from([0, 1]))
def test_boxes_lie_inside_the_image_and_between_1_and_80_percent_of_it(seed, objects, size, crops):
    image, _, truth = drawn(seed, SceneSettings(size=size, min_objects=objects, max_objects=objects, crops=crops))
    assert list(image.size) == truth["size"]
    assert size <= image.width <= 1.25 * size + 0.5
    assert image.height == size
    assert len(truth["objects"]) == (1 if crops else objects)
    for thing in truth["objects"]:
        x0, y0, x1, y1 = thing["box"]
        assert 0 <= x0 < x1 <= image.width
        assert 0 <= y0 < y1 <= image.height
        largest = 0.95 if crops else 0.80
        assert 0.01 <= area_share(thing["box"], truth["size"]) <= largest


@settings(max_examples=25)
@given(seed=seeds)
def test_boxes_are_tight_around_the_drawn_masks(seed):
    rng = np.random.default_rng(seed)
    scene = full_scene(rng, 128, 5)
    _, boxes = render(scene, rng)
    for thing, box in zip(scene.objects, boxes, strict=True):
        mask, corner = object_mask(thing)
        ys, xs = np.nonzero(np.asarray(mask))
        low, high = np.array([xs.min(), ys.min()]), np.array([xs.max(), ys.max()]) + 1
        assert box == pytest.approx((*(corner + low / SUPERSAMPLE), *(corner + high / SUPERSAMPLE)))
        ring = outline(thing.shape, thing.turn_rad) * thing.side_px + np.array(thing.centre_px)
        # PIL also fills the pixels that the outline only touches: less than two supersampled ones.
        assert box == pytest.approx((*ring.min(axis=0), *ring.max(axis=0)), abs=2 / SUPERSAMPLE)


def test_an_object_changes_pixels_up_to_every_side_of_its_box():
    rng = np.random.default_rng(5)
    scene = crop_scene(rng, 128)
    state = rng.bit_generator.state
    image, boxes = render(scene, rng)
    rng.bit_generator.state = state
    empty, _ = render(type(scene)(scene.size_px, scene.background, scene.texture, (), scene.zoom), rng)
    changed = np.abs(np.asarray(image, int) - np.asarray(empty, int)).max(axis=2) > 60
    ys, xs = np.nonzero(changed)
    # Softened crops blur the rim over a pixel of the smaller resolution.
    found = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert found == pytest.approx(boxes[0], abs=1.5 * max(1, scene.zoom))


@settings(max_examples=30)
@given(seed=seeds, objects=st.integers(2, 9))
def test_objects_hardly_overlap_and_any_two_can_be_told_apart(seed, objects):
    _, _, truth = drawn(seed, SceneSettings(min_objects=objects, max_objects=objects))
    for a, b in combinations(truth["objects"], 2):
        assert overlap(a["box"], b["box"]) < 0.06
        assert a["place"] != b["place"]
        assert sum(a[key] == b[key] for key in ("shape", "colour", "pattern")) <= 1


@settings(max_examples=30)
@given(seed=seeds)
def test_size_and_place_words_are_true_of_the_box(seed):
    _, _, truth = drawn(seed, FULL)
    width, height = truth["size"]
    for thing in truth["objects"]:
        x0, y0, x1, y1 = thing["box"]
        assert thing["place"] == place_name(int((y0 + y1) / 2 // (height / 3)), int((x0 + x1) / 2 // (width / 3)))
        side = np.sqrt((x1 - x0) * (y1 - y0)) / height
        assert min(SIDES, key=lambda name: abs(np.mean(SIDES[name]) - side)) == thing["size"]


@settings(max_examples=60)
@given(seed=seeds, short=st.booleans())
def test_sentence_spans_cut_the_caption_into_its_sentences(seed, short):
    _, caption, truth = drawn(seed, SceneSettings(short=short))
    pieces = [caption[sentence["start"] : sentence["end"]] for sentence in truth["sentences"]]
    assert " ".join(pieces) == caption
    assert all(piece.endswith(".") and piece.count(".") == 1 and piece[0].isupper() for piece in pieces)
    about = [sentence["object"] for sentence in truth["sentences"]]
    assert sorted(index for index in about if index is not None) == list(range(len(truth["objects"])))
    assert (0 if short else 1) <= about.count(None) <= (0 if short else 3)


@settings(max_examples=60)
@given(seed=seeds, short=st.booleans())
def test_a_sentence_says_nothing_untrue_of_its_object_and_a_short_one_no_size(seed, short):
    _, caption, truth = drawn(seed, SceneSettings(short=short))
    for sentence in truth["sentences"]:
        if sentence["object"] is None:
            continue
        thing = truth["objects"][sentence["object"]]
        text = caption[sentence["start"] : sentence["end"]].lower().strip(".").replace(",", "")
        assert thing["colour"] in text
        assert any(word in text for word in SHAPE_WORDS[thing["shape"]])
        details = [phrase.format(accent=thing["accent"]) for phrase in PATTERN_PHRASES[thing["pattern"]]]
        assert any(detail in text for detail in details)
        forbidden = {word for name, words in SIZE_WORDS.items() if short or name != thing["size"] for word in words}
        assert not forbidden & set(text.split())
        places = [name for name, words in PLACE_WORDS.items() if any(f"{word} " in f"{text} " for word in words)]
        assert places in ([thing["place"]], [])


def test_crops_are_the_share_of_pictures_asked_for():
    lone = [len(drawn(0, SceneSettings(size=32, crops=0.25), index)[2]["objects"]) == 1 for index in range(200)]
    assert 0.15 < np.mean(lone) < 0.35


def test_full_captions_mostly_exceed_77_tokens_and_never_150():
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=248)
    captions = [drawn(0, FULL, index)[1] for index in range(150)]
    lengths = (tokenizer(captions) != 0).sum(dim=1)
    assert lengths.max() <= 150
    assert lengths.min() >= 55
    assert (lengths > 77).float().mean() > 0.6


def test_a_lone_object_with_a_short_caption_is_drawn_like_a_crop():
    truths = [drawn(0, CROPS, index)[2] for index in range(40)]
    assert all(0.40 <= area_share(truth["objects"][0]["box"], truth["size"]) <= 0.95 for truth in truths)
    assert all(len(truth["sentences"]) == 1 and truth["sentences"][0]["object"] == 0 for truth in truths)


def test_every_word_of_the_vocabulary_turns_up_and_hardly_any_scene_repeats():
    truths = [drawn(0, SceneSettings(size=32), index)[2] for index in range(300)]
    things = [thing for truth in truths for thing in truth["objects"]]
    assert {thing["shape"] for thing in things} == set(SHAPES)
    assert {thing["colour"] for thing in things} == set(COLOURS)
    assert {thing["pattern"] for thing in things} == set(PATTERNS)
    assert {thing["size"] for thing in things} == set(SIDES)
    assert {thing["place"] for thing in things} == set(PLACE_WORDS)
    assert {truth["background"]["colour"] for truth in truths} == set(BACKGROUNDS)
    assert {truth["background"]["texture"] for truth in truths} == set(TEXTURES)
    looks = [frozenset((t["shape"], t["colour"], t["pattern"]) for t in truth["objects"]) for truth in truths]
    assert len(set(looks)) == len(looks)


@settings(max_examples=20)
@given(seed=seeds, family=st.integers(2, 5))
def test_look_alikes_share_all_but_the_patterns_of_their_objects(seed, family):
    truths = [drawn(seed, SceneSettings(size=32, family=family), index)[2] for index in range(family + 1)]
    patterns = [[(thing.pop("pattern"), thing.pop("accent")) for thing in truth["objects"]] for truth in truths]
    first, *alike, stranger = truths
    for truth, drawn_patterns in zip(alike, patterns[1:family], strict=True):
        assert (truth["objects"], truth["background"]) == (first["objects"], first["background"])
        assert drawn_patterns != patterns[0]
    assert stranger["objects"] != first["objects"]
