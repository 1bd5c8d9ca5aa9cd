"""The pairs record: what is written can be read back, and nothing that breaks the contract gets through."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.errors import ShardError
from goal_ray.pairs import Pair, PairRecord, Region, best_pairs, examine

CAPTION = "A dog. A red ball. Grass."
RECORD = PairRecord(
    size=(640, 480),
    sentences=((0, 6), (7, 18), (19, 25)),
    regions=(Region((0.0, 0.0, 640.0, 480.0), 1.0, "image"), Region((10.5, 20.25, 99.99, 60.0), 0.873, "sam")),
    pairs=(Pair(0, 1, 0.31), Pair(1, 1, 0.27), Pair(2, 0, 0.22)),
    provenance={"model": "ViT-B-16", "bäume": ["ünïcode", 3]},
)


def set_at(path: tuple, value) -> bytes:
    """RECORD's bytes with the value at `path` replaced."""
    tree = json.loads(RECORD.to_bytes())
    place = tree
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return json.dumps(tree).encode()


@st.composite
def records(draw) -> tuple[str, PairRecord]:
    """A caption and a valid record for it."""
    caption = draw(st.text(st.characters(codec="utf-8"), min_size=2, max_size=60))
    cuts = sorted(draw(st.sets(st.integers(0, len(caption)), min_size=2, max_size=8)))
    sentences = tuple(zip(cuts[0::2], cuts[1::2], strict=False))
    width, height = draw(st.tuples(st.integers(1, 20_000), st.integers(1, 20_000)))

    def side(length: int) -> st.SearchStrategy:
        edges = st.floats(-0.01, length + 0.01)
        return st.tuples(edges, edges).map(sorted).filter(lambda pair: pair[0] < pair[1])

    boxes = st.tuples(side(width), side(height)).map(lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1]))
    scores = st.floats(allow_nan=False, allow_infinity=False, width=32)
    regions = draw(st.lists(st.builds(Region, boxes, scores, st.text(st.characters(codec="utf-8"))), min_size=1))
    pair = st.builds(
        Pair, st.integers(0, len(sentences) - 1), st.integers(0, len(regions) - 1), st.floats(-1.001, 1.001)
    )
    provenance = draw(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), st.integers(-9, 9)))
    return caption, PairRecord((width, height), sentences, tuple(regions), tuple(draw(st.lists(pair))), provenance)


@given(records())
def test_a_record_is_read_back_as_it_was_up_to_rounding(drawn):
    caption, record = drawn
    data = record.to_bytes()
    again = PairRecord.from_bytes(data, caption, "here")
    assert again.to_bytes() == data
    assert replace(again, regions=(), pairs=()) == replace(record, regions=(), pairs=())
    for mine, theirs in zip(record.regions, again.regions, strict=True):
        assert theirs.box == pytest.approx(mine.box, abs=0.005 + 1e-9)
        assert theirs.score == pytest.approx(mine.score, rel=1e-5)
        assert theirs.source == mine.source
    for mine, theirs in zip(record.pairs, again.pairs, strict=True):
        assert (theirs.sentence, theirs.region) == (mine.sentence, mine.region)
        assert theirs.similarity == pytest.approx(mine.similarity, rel=1e-5)


def test_stored_bytes_are_compact_json_in_the_order_of_the_contract():
    record = replace(RECORD, pairs=(Pair(0, 1, 0.312345678),), provenance={"a": "ü"})
    assert record.to_bytes().decode() == (
        '{"version":1,"size":[640,480],"sentences":[[0,6],[7,18],[19,25]],'
        '"regions":[{"box":[0.0,0.0,640.0,480.0],"score":1.0,"source":"image"},'
        '{"box":[10.5,20.25,99.99,60.0],"score":0.873,"source":"sam"}],'
        '"pairs":[{"sentence":0,"region":1,"similarity":0.312346}],"provenance":{"a":"ü"}}'
    )


def test_rounding_never_closes_a_thin_box():
    thin = replace(RECORD, regions=(Region((5.001, 5.0, 5.002, 9.123456), 1.0, "sam"),), pairs=())
    (region,) = PairRecord.from_bytes(thin.to_bytes(), CAPTION, "here").regions
    assert region.box == (5.001, 5.0, 5.002, 9.12)


def test_keys_of_a_later_writer_are_ignored():
    assert PairRecord.from_bytes(set_at(("mood",), "good"), CAPTION, "here") == RECORD


VIOLATIONS = [
    (("version",), 2, "version"),
    (("version",), True, "version"),
    (("version",), None, "version"),
    (("size",), [0, 480], "size"),
    (("size",), [640], "size[1]"),
    (("size", 0), 640.5, "size[0]"),
    (("size", 0), "640", "size[0]"),
    (("sentences",), {}, "sentences"),
    (("sentences", 0), [-1, 6], "sentences[0]"),
    (("sentences", 0), [6, 6], "sentences[0]"),
    (("sentences", 1), [5, 18], "sentences[1]"),
    (("sentences", 2), [19, 26], "sentences[2]"),
    (("sentences", 2), [19, 25, 26], "sentences[2]"),
    (("regions",), None, "regions"),
    (("regions", 1, "box"), [10, 20, 10, 60], "regions[1].box"),
    (("regions", 1, "box"), [10, 60, 99, 20], "regions[1].box"),
    (("regions", 1, "box"), [-0.02, 0, 5, 5], "regions[1].box"),
    (("regions", 1, "box"), [0, -3, 5, 5], "regions[1].box"),
    (("regions", 1, "box"), [0, 0, 640.02, 5], "regions[1].box"),
    (("regions", 1, "box"), [0, 0, 5, 481], "regions[1].box"),
    (("regions", 1, "box"), [0, 0, float("nan"), 5], "regions[1].box"),
    (("regions", 1, "box"), [0, 0, float("inf"), 5], "regions[1].box"),
    (("regions", 1, "box"), [0, 0, 5], "regions[1].box[3]"),
    (("regions", 1, "score"), float("nan"), "regions[1].score"),
    (("regions", 1, "score"), "0.5", "regions[1].score"),
    (("regions", 1, "source"), 7, "regions[1].source"),
    (("pairs", 0, "sentence"), 3, "pairs[0].sentence"),
    (("pairs", 0, "sentence"), -1, "pairs[0].sentence"),
    (("pairs", 0, "region"), 2, "pairs[0].region"),
    (("pairs", 0, "region"), True, "pairs[0].region"),
    (("pairs", 0, "similarity"), 1.01, "pairs[0].similarity"),
    (("pairs", 0, "similarity"), -1.01, "pairs[0].similarity"),
    (("pairs", 0, "similarity"), float("nan"), "pairs[0].similarity"),
    (("pairs", 0, "similarity"), None, "pairs[0].similarity"),
    (("pairs", 0), [0, 1, 0.3], "pairs[0]"),
    (("provenance",), [], "provenance"),
]


@pytest.mark.parametrize(("path", "value", "field"), VIOLATIONS)
def test_a_violation_is_refused_with_its_place_field_and_value(path, value, field):
    with pytest.raises(ShardError) as caught:
        PairRecord.from_bytes(set_at(path, value), CAPTION, "train-07.tar: img3")
    message = str(caught.value)
    assert message.startswith("train-07.tar: img3: ")
    assert f"{field} = " in message
    assert "goal-ray lism" in message


@pytest.mark.parametrize("key", ["size", "sentences", "regions", "pairs", "provenance"])
def test_a_missing_key_is_named(key):
    tree = json.loads(RECORD.to_bytes())
    del tree[key]
    with pytest.raises(ShardError, match=f"here: pairs: {key} = nothing"):
        PairRecord.from_bytes(json.dumps(tree).encode(), CAPTION, "here")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, RECORD.to_bytes()[:-1], b"null"])
def test_bytes_that_hold_no_record_are_refused(data):
    with pytest.raises(ShardError, match="here: the pairs"):
        PairRecord.from_bytes(data, CAPTION, "here")


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_shard_error(data):
    with pytest.raises(ShardError):
        PairRecord.from_bytes(data, CAPTION, "here")


def test_a_record_that_could_not_be_read_is_never_written():
    broken = replace(RECORD, pairs=(Pair(0, 1, float("nan")),))
    with pytest.raises(ShardError, match=r"pairs\[0\].similarity = nan"):
        broken.to_bytes()


def test_best_pairs_takes_the_highest_similarities_first_and_one_per_sentence():
    pairs = (Pair(0, 0, 0.1), Pair(1, 0, 0.3), Pair(1, 1, 0.4), Pair(2, 0, 0.2))
    assert best_pairs(replace(RECORD, pairs=pairs), 2) == [Pair(1, 1, 0.4), Pair(2, 0, 0.2)]


def test_best_pairs_breaks_ties_by_sentence_then_region():
    pairs = (Pair(2, 0, 0.3), Pair(1, 1, 0.3), Pair(1, 0, 0.3), Pair(0, 1, 0.3))
    assert best_pairs(replace(RECORD, pairs=pairs), 3) == [Pair(0, 1, 0.3), Pair(1, 0, 0.3), Pair(2, 0, 0.3)]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (2, 2), (9, 3)])
def test_best_pairs_returns_no_more_than_there_are(count, expected):
    assert len(best_pairs(RECORD, count)) == expected


def test_examine_tells_all_that_is_wrong_where_reading_stops_at_the_first():
    data = json.dumps({**json.loads(RECORD.to_bytes()), "size": [0, 7], "sentences": [[9, 2]], "pairs": []}).encode()
    record, problems = examine(data, None)
    assert record is not None
    assert record.size == (0, 7)
    assert [any(word in problem for problem in problems) for word in ("size", "sentences[0]", "regions[0].box")] == [
        True
    ] * 3
    with pytest.raises(ShardError) as refusal:
        PairRecord.from_bytes(data, "", "here")
    assert str(refusal.value) == f"here: {problems[0]}"


@pytest.mark.parametrize("data", [b"", b"[]", b'{"version": 1}', set_at(("size",), "large")])
def test_examine_has_no_record_where_the_bytes_are_none(data):
    record, problems = examine(data, "")
    assert record is None
    assert problems
    assert all("goal-ray lism" in problem for problem in problems)
