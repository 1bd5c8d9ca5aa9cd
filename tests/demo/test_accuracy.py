"""LISM's accuracy on hand-made shards of known shares."""

import io
import json
from dataclasses import asdict

import pytest
from PIL import Image

from goal_ray.demo.accuracy import LismAccuracy, lism_accuracy
from goal_ray.errors import ShardError, StageError
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.scenes.run import SceneSettings, draw_scene
from goal_ray.tars import write_tar

CAPTION = "A red disc. A blue star. All is calm."
DISC, STAR, CALM = (0, 11), (12, 24), (25, 37)
DISC_BOX, STAR_BOX, PICTURE = (0, 0, 10, 10), (50, 40, 70, 60), (0, 0, 100, 80)
# The star's box, 4 px too far to the right, meets the star with an IoU of 16 / 24; 8 px too far, 12 / 28.
NEAR_STAR, FAR_FROM_STAR = (54, 40, 74, 60), (58, 40, 78, 60)


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (100, 80)).save(buffer, "PNG")
    return buffer.getvalue()


def truth(sentences=((DISC, 0), (STAR, 1), (CALM, None))) -> bytes:
    return json.dumps(
        {
            "size": [100, 80],
            "objects": [{"box": DISC_BOX}, {"box": STAR_BOX}],
            "sentences": [{"start": a, "end": b, "object": number} for (a, b), number in sentences],
        }
    ).encode()


def record(pairs, sentences=(DISC, STAR, CALM), boxes=(PICTURE, DISC_BOX, STAR_BOX)) -> bytes:
    """pairs: (sentence, region, similarity)."""
    regions = tuple(Region(box, 1.0, "grid") for box in boxes)
    return PairRecord((100, 80), tuple(sentences), regions, tuple(Pair(*pair) for pair in pairs), {}).to_bytes()


def accuracy(tmp_path, *records: bytes, **truths) -> LismAccuracy:
    members = {"png": png(), "txt": CAPTION.encode(), "json": truth(**truths)}
    url = str(tmp_path / "a.tar")
    write_tar(url, ((f"{number}", {**members, "pairs.json": data}) for number, data in enumerate(records)))
    return lism_accuracy(url)


def test_pairs_on_their_objects_are_all_right(tmp_path):
    found = accuracy(tmp_path, record([(0, 1, 0.5), (1, 2, 0.6), (2, 0, 0.2)]))
    assert asdict(found) == {"sentences": 2, "right_region": 1, "right_pair": 1, "object_recall": 1}


def test_shares_are_of_all_sentences_pictures_and_objects(tmp_path):
    swapped = record([(0, 2, 0.5), (1, 1, 0.4), (2, 0, 0.1)])
    half = record([(0, 1, 0.5), (1, 1, 0.6), (2, 0, 0.1)], boxes=(PICTURE, DISC_BOX))
    right = record([(0, 1, 0.5), (1, 2, 0.4), (2, 0, 0.1)])
    found = accuracy(tmp_path, swapped, half, right, right)
    assert found == LismAccuracy(sentences=8, right_region=5 / 8, right_pair=2 / 4, object_recall=7 / 8)


@pytest.mark.parametrize(("box", "right"), [(NEAR_STAR, 1), (FAR_FROM_STAR, 0)])
def test_half_of_intersection_over_union_makes_a_region_right(tmp_path, box, right):
    found = accuracy(tmp_path, record([(1, 0, 0.5)], boxes=(box,)), sentences=((STAR, 1),))
    assert (found.right_region, found.right_pair) == (right, right)


def test_a_sentence_cut_otherwise_than_in_the_truth_counts_as_wrong(tmp_path):
    joined = record([(0, 1, 0.5), (1, 0, 0.2)], sentences=((DISC[0], STAR[1]), CALM))
    found = accuracy(tmp_path, joined)
    assert (found.sentences, found.right_region, found.right_pair) == (2, 0, 0)
    assert found.object_recall == 1


def test_a_sentence_without_a_pair_counts_as_wrong(tmp_path):
    found = accuracy(tmp_path, record([(0, 1, 0.5)]), record([]))
    assert (found.right_region, found.right_pair) == (1 / 4, 1 / 2)


@pytest.mark.parametrize(("region", "right"), [(0, 1), (1, 0)])
def test_the_whole_picture_is_right_for_a_sentence_on_the_scene(tmp_path, region, right):
    found = accuracy(tmp_path, record([(2, region, 0.9), (0, 1, 0.1), (1, 2, 0.1)]))
    assert (found.right_region, found.right_pair) == (1, right)


def test_of_several_pairs_of_a_sentence_the_most_similar_counts(tmp_path):
    found = accuracy(tmp_path, record([(0, 2, 0.9), (0, 1, 0.5), (1, 2, 0.3)]))
    assert (found.right_region, found.right_pair) == (1 / 2, 0)


def test_a_record_without_regions_finds_nothing(tmp_path):
    found = accuracy(tmp_path, record([], boxes=()))
    assert (found.right_region, found.object_recall) == (0, 0)


def test_a_drawn_scene_paired_by_its_truth_is_all_right(tmp_path):
    key, members = draw_scene(3, 0, SceneSettings(size=64))
    scene = json.loads(members["json"])
    parts = [part for part in scene["sentences"] if part["object"] is not None]
    regions = tuple(Region(tuple(thing["box"]), 1.0, "grid") for thing in scene["objects"])
    pairs = tuple(Pair(number, part["object"], 0.5) for number, part in enumerate(parts))
    spans = tuple((part["start"], part["end"]) for part in parts)
    made = PairRecord(tuple(scene["size"]), spans, regions, pairs, {}).to_bytes()
    url = str(tmp_path / "scene.tar")
    write_tar(url, iter([(key, {**members, "pairs.json": made})]))
    assert lism_accuracy(url) == LismAccuracy(len(parts), 1, 1, 1)


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (None, "'7' has no truth"),
        (b"{}", "'7' has no truth"),
        (b"[1]", "'7' has no truth"),
        (b"{", "'7' has no truth"),
        (truth(sentences=((DISC, 5),)), "'7' has no truth"),
    ],
)
def test_a_sample_without_truth_is_refused(tmp_path, data, error):
    members = {"png": png(), "txt": CAPTION.encode(), "pairs.json": record([])}
    url = str(tmp_path / "a.tar")
    write_tar(url, iter([("7", members if data is None else {**members, "json": data})]))
    with pytest.raises(ShardError, match=rf"a\.tar: sample {error}.*goal-ray scenes"):
        lism_accuracy(url)


def test_a_scene_without_pairs_is_refused(tmp_path):
    url = str(tmp_path / "a.tar")
    write_tar(url, iter([draw_scene(3, 0, SceneSettings(size=64))]))
    with pytest.raises(ShardError, match=r"has no \.pairs\.json; run `goal-ray lism`"):
        lism_accuracy(url)


def test_scenes_that_speak_of_no_object_are_refused(tmp_path):
    with pytest.raises(StageError, match="nothing to measure"):
        accuracy(tmp_path, record([(2, 0, 0.5)]), sentences=((CALM, None),))
