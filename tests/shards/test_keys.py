"""Keys as hashes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.shards import keys
from goal_ray.shards.keys import KeySet, key_hash, repeated_keys, short_hashes

KEYS = st.text(st.characters(codec=None), max_size=3)


@pytest.mark.parametrize("recent", [1, 3, 1000])
@given(words=st.lists(KEYS))
def test_a_key_set_knows_the_keys_that_were_added_and_no_others(recent, words):
    known, expected = KeySet(), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "_RECENT", recent)
        for word in words:
            assert (word in known) == (word in expected)
            if word not in expected:
                known.add([key_hash(word)])
            expected.add(word)
            assert len(known) == len(expected)


def test_hashes_that_end_in_zero_bytes_are_found_in_a_key_set(monkeypatch):
    hashes = {"a": b"x" * 15 + b"\0", "b": b"x" * 14 + b"\0\0", "c": b"\0" * 16, "d": b"x" * 16}
    monkeypatch.setattr(keys, "key_hash", hashes.__getitem__)
    monkeypatch.setattr(keys, "_RECENT", 1)
    known = KeySet()
    known.add([hashes["a"]])
    known.add([hashes["c"]])
    assert [key in known for key in "abcd"] == [True, False, True, False]


@given(shards=st.lists(st.sets(KEYS, max_size=6), max_size=5))
def test_keys_of_several_shards_are_named_with_the_first_one_and_each_other(shards):
    named = {str(number): sorted(words) for number, words in enumerate(shards)}
    found = set(repeated_keys({shard: short_hashes(words) for shard, words in named.items()}, named.__getitem__))
    expected = set()
    for shard, words in named.items():
        for word in words:
            first = min(other for other in named if word in named[other])
            if first != shard:
                expected.add((word, first, shard))
    assert found == expected


def test_different_keys_of_one_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(keys, "key_hash", lambda key: key[:1].encode() * 16)
    named = {"0": ["apple", "bread"], "1": ["avocado", "bread"]}
    found = list(repeated_keys({shard: short_hashes(words) for shard, words in named.items()}, named.__getitem__))
    assert found == [("bread", "0", "1")]
