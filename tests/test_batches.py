"""From a stored sample to the arrays of a GOAL batch."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from goal_ray.batches import ExampleBuilder, collate, pack, unpack
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.geometry import PixelGeometry, ResizeConfig
from goal_ray.model import ModelConfig, load_model
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.tars import Sample
from goal_ray.text import CaptionEncoder

FIRST, SECOND = "A red half.", "A blue half."
CAPTION = f"{FIRST} {SECOND}"
LEFT, RIGHT = (0.0, 0.0, 32.0, 32.0), (32.0, 0.0, 64.0, 32.0)


@pytest.fixture(scope="module")
def encoder(tiny_clip):
    return CaptionEncoder(load_model(ModelConfig(tiny_clip)).tokenizer)


def builder(encoder, pairs=2, mode="squash", min_scale=0.9):
    geometry = PixelGeometry(ResizeConfig(mode, min_scale), 32, (4, 4))
    return ExampleBuilder(geometry, PixelGeometry(ResizeConfig(), 32, (4, 4)), encoder, 77, pairs)


def sample(key="a", size=(64, 32), **members) -> Sample:
    """A picture, its left half red and its right half blue, each with its sentence; blue is the more similar."""
    image = Image.new("RGB", (64, 32), (255, 0, 0))
    image.paste((0, 0, 255), (32, 0, 64, 32))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    spans = ((0, len(FIRST)), (len(FIRST) + 1, len(CAPTION)))
    regions = (Region(LEFT, 1.0, "grid"), Region(RIGHT, 1.0, "grid"))
    record = PairRecord(size, spans, regions, (Pair(0, 0, 0.2), Pair(1, 1, 0.8)), {})
    stored = {"png": buffer.getvalue(), "txt": CAPTION.encode(), "pairs.json": record.to_bytes()}
    return Sample(key, {name: data for name, data in {**stored, **members}.items() if data is not None})


def test_crop_sentence_box_and_span_of_a_pair_belong_together(encoder):
    example = builder(encoder)(sample(), "tar", 0)
    assert example.boxes_P4.tolist() == [[2, 0, 4, 4], [0, 0, 2, 4]]
    assert example.crops_P3SS.mean(axis=(2, 3)).tolist() == [[0, 0, 255], [255, 0, 0]]
    for text, ids, (start, end) in zip((SECOND, FIRST), example.sentences, example.spans_P2, strict=True):
        assert ids.tolist() == encoder.encode(text, [], 77).ids.tolist()
        assert example.text_L[start:end].tolist() == ids[1:-1].tolist()


def test_the_most_similar_pairs_come_first_and_no_more_than_asked(encoder):
    example = builder(encoder, pairs=1)(sample(), "tar", 0)
    assert example.boxes_P4.tolist() == [[2, 0, 4, 4]]


def test_a_batch_is_ragged_over_its_pictures_and_survives_packing(encoder):
    without = PairRecord((64, 32), (), (), (), {}).to_bytes()
    build = builder(encoder)
    examples = [build(sample(), "tar", 0), build(sample("b", **{"pairs.json": without}), "tar", 0)]
    arrays = collate([*examples, examples[0]])
    batch = unpack(pack(arrays))
    assert batch.sample_index_M.tolist() == [0, 0, 2, 2]
    assert batch.text_BL.shape[1] == max(len(example.text_L) for example in examples)
    assert batch.images_B3SS.dtype == torch.uint8
    for name, array in arrays.items():
        assert np.array_equal(getattr(batch, name).numpy(), array)


def test_a_batch_without_any_pair_keeps_its_shapes(encoder):
    batch = unpack(pack(collate([builder(encoder, pairs=0)(sample(), "tar", 0)])))
    assert batch.crops_M3SS.shape == (0, 3, 32, 32)
    assert [len(part) for part in (batch.sentences_ML, batch.boxes_M4, batch.spans_M2, batch.sample_index_M)] == [0] * 4


def test_a_random_crop_is_fixed_by_seed_and_key(encoder):
    build = builder(encoder, mode="random_resized_crop", min_scale=0.2)
    first, same, other_seed, other_key = (
        build(sample(key), "tar", seed).boxes_P4.tolist() for key, seed in (("a", 1), ("a", 1), ("a", 2), ("b", 1))
    )
    assert first == same
    assert first != other_seed
    assert first != other_key


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"png": b"no picture"}, ImageError, None),
        ({"txt": b" \n"}, CaptionError, "caption of sample 'a' is empty"),
        ({"pairs.json": None}, ShardError, "tar: sample 'a' has no .pairs.json; run `goal-ray lism`"),
        ({"size": (80, 32)}, ShardError, r"pairs are for \(80, 32\) pixels, the picture has \(64, 32\)"),
    ],
)
def test_a_sample_that_breaks_the_contract_is_refused(encoder, changes, error, message):
    with pytest.raises(error, match=message):
        builder(encoder)(sample(**changes), "tar", 0)
