"""Embedding a stream of samples: order, threads, memory of what was seen, how far it is."""

import io
import re
import shutil
import sys

import numpy as np
import pytest
import torch

from goal_ray.errors import ModelError
from goal_ray.evaluate.embed import add_new, embed_shards
from goal_ray.model import load_model
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.settings import ModelConfig


@pytest.fixture(scope="module")
def loaded(tiny_clip):
    return load_model(ModelConfig(tiny_clip))


@pytest.fixture(scope="module")
def tars(tmp_path_factory) -> list[str]:
    return draw_scenes(tmp_path_factory.mktemp("scenes"), 14, 3, SceneSettings(shard_size=5, size=40))


def test_rows_are_of_unit_length_and_stand_in_the_samples_order(loaded, tars):
    found = embed_shards(loaded, tars, batch=4, device="cpu", threads=3)
    assert found.image_IE.shape == found.text_TE.shape == (14, 32)
    assert found.pairs_P2.tolist() == [[n, n] for n in range(14)]
    for rows in (found.image_IE, found.text_TE):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(14))


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (3, 8), (100, 2)])
def test_batches_and_threads_change_no_row(loaded, tars, batch, threads):
    once = embed_shards(loaded, tars, batch=14, device="cpu", threads=1)
    again = embed_shards(loaded, tars, batch=batch, device="cpu", threads=threads)
    # Matrix products of other shapes add in another order.
    torch.testing.assert_close(again.image_IE, once.image_IE, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.text_TE, once.text_TE, rtol=0, atol=1e-5)
    assert torch.equal(again.pairs_P2, once.pairs_P2)


def test_what_was_seen_before_is_embedded_once(loaded, tars):
    found = embed_shards(loaded, [*tars, tars[0]], batch=4, device="cpu", threads=2)
    assert len(found.image_IE) == len(found.text_TE) == len(found.pairs_P2) == 14
    assert found.samples == 19


def test_new_arrays_are_numbered_in_order():
    known = {b"a": 0}
    arrays = [np.full(2, value) for value in range(4)]
    new = add_new(known, zip([b"b", b"a", b"c", b"b"], arrays, strict=True))
    assert [array[0] for array in new] == [3, 2]
    assert known == {b"a": 0, b"b": 1, b"c": 2}


def test_a_preprocessing_that_boxes_cannot_follow_is_refused(tiny_clip, tars):
    loaded = load_model(ModelConfig(tiny_clip))
    loaded.preprocess["resize_mode"] = "longest"
    with pytest.raises(ModelError, match="'longest'; supported are shortest and squash"):
        embed_shards(loaded, tars, batch=4, device="cpu", threads=1)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("damaged", [False, True])
def test_the_bar_names_the_model_and_reaches_the_end(loaded, tars, tmp_path, monkeypatch, damaged):
    for tar in tars:
        shutil.copy(tar, tmp_path)
    last = tmp_path / "scenes-000002.tar"
    if damaged:
        last.write_bytes(last.read_bytes()[:-12_000])
    monkeypatch.setattr(sys, "stderr", Terminal())
    shards = [str(path) for path in sorted(tmp_path.glob("*.tar"))]
    embed_shards(loaded, shards, batch=4, device="cpu", threads=1, title="evaluate goal")
    *_, end = sys.stderr.getvalue().rstrip().split("\r")
    assert end.startswith("evaluate goal: 100%|")
    assert re.search(r", 1[1-4] samples\]$", end)


def test_bf16_gives_the_rows_of_fp32_to_its_rounding(loaded, tars):
    exact = embed_shards(loaded, tars, batch=14, device="cpu", threads=1)
    rounded = embed_shards(loaded, tars, batch=14, device="cpu", threads=1, precision="bf16")
    for ours, theirs in ((rounded.image_IE, exact.image_IE), (rounded.text_TE, exact.text_TE)):
        assert ours.dtype == torch.float32
        assert not torch.equal(ours, theirs)
        assert (ours * theirs).sum(dim=1).min() > 0.999
