"""The index beside a tar says what its headers say, and is not believed where it may be wrong."""

import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from goal_ray.errors import ShardError
from goal_ray.tar_index import index_url, make_index, read_index
from goal_ray.tar_places import member_places
from goal_ray.tars import write_tar
from goal_ray.train.scan import read_sample, scan_shard

SAMPLES = [(f"s{number}", {"png": bytes([number]) * 700, "txt": b"A cat.", "pairs.json": b"{}"}) for number in range(5)]
signs = st.characters(codec="utf-8", exclude_characters="/.\0")
keys = st.one_of(
    st.text(signs, min_size=1, max_size=20),
    st.text(st.sampled_from("ab/."), min_size=1, max_size=150).map(lambda name: f"{name}k"),
    st.just("caf\udce9"),
)
members = st.dictionaries(
    st.sampled_from(["png", "txt", "pairs.json", "TXT", "cls"]), st.binary(max_size=1500), min_size=1
)


@pytest.fixture
def tar(tmp_path):
    """A tar with its index."""
    url = str(tmp_path / "x.tar")
    write_tar(url, iter(SAMPLES))
    assert make_index(url)
    return url


@settings(max_examples=50)
@given(st.lists(st.tuples(keys, members)))
def test_an_index_says_what_the_headers_say(tmp_path_factory, samples):
    url = str(tmp_path_factory.mktemp("index") / "x.tar")
    write_tar(url, iter(samples))
    make_index(url)
    assert read_index(url) == member_places(url)
    assert not make_index(url)


def test_an_extension_that_is_not_utf8_stands_as_escapes_and_hides_no_other(tmp_path):
    url = str(tmp_path / "x.tar")
    write_tar(url, iter([("a", {"png": b"p", "caf\udce9": b"x", "txt": b"A cat."})]))
    assert make_index(url)
    assert [place.extension for place in read_index(url)] == ["png", r"caf\udce9", "txt"]
    assert [place[3:] for place in read_index(url)] == [place[3:] for place in member_places(url)]
    assert not make_index(url)
    assert len(scan_shard(url, needs_pairs=False)) == 1


def test_a_scan_with_an_index_reads_nothing_of_the_tar(tar):
    expected = scan_shard(tar, needs_pairs=True)
    Path(tar).write_bytes(bytes(Path(tar).stat().st_size))
    found = scan_shard(tar, needs_pairs=True)
    assert [found.key(number) for number in range(len(found))] == [key for key, _ in SAMPLES]
    assert found.places_SM2.tolist() == expected.places_SM2.tolist()


def test_samples_are_read_by_the_index(tar):
    index = scan_shard(tar, needs_pairs=True)
    assert [read_sample(tar, index, number).members for number in range(5)] == [members for _, members in SAMPLES]


def test_an_index_of_a_tar_of_another_size_is_not_used_and_written_anew(tar):
    write_tar(tar, iter([*SAMPLES, *((f"more{number}", members) for number, (_, members) in enumerate(SAMPLES))]))
    assert read_index(tar) is None
    assert len(scan_shard(tar, needs_pairs=True)) == 10
    assert make_index(tar)
    assert read_index(tar) == member_places(tar)


@pytest.mark.parametrize(
    "other",
    [
        [("t0", members) if number == 0 else (key, members) for number, (key, members) in enumerate(SAMPLES)],
        [(key, {**members, "png": members["png"][:-100]}) for key, members in SAMPLES],
        [(key, {name: members[name] for name in ("txt", "png", "pairs.json")}) for key, members in SAMPLES],
    ],
    ids=["another key", "another length", "another order"],
)
def test_a_sample_of_a_changed_tar_of_equal_size_is_refused_not_mixed_up(tar, other):
    size = Path(tar).stat().st_size
    write_tar(tar, iter(other))
    assert Path(tar).stat().st_size == size
    index = scan_shard(tar, needs_pairs=True)
    with pytest.raises(
        ShardError, match=r"x\.tar: sample 's0': .* was the tar changed\? Delete .*/index/x\.tar\.parquet"
    ):
        read_sample(tar, index, 0)


def test_an_overwritten_part_of_a_tar_is_refused(tar):
    index = scan_shard(tar, needs_pairs=True)
    with open(tar, "r+b") as file:
        file.write(bytes(tarfile.BLOCKSIZE))
    with pytest.raises(ShardError, match=r"no header of \.png where the index says"):
        read_sample(tar, index, 0)


@pytest.mark.parametrize(
    "damage", ["cut", "garbage", "a flipped byte", "no UTF-8", "nulls", "another table", "a later version"]
)
def test_a_damaged_index_is_not_used(tar, damage):
    place = Path(index_url(tar))
    table = pyarrow.parquet.read_table(place)
    if damage == "cut":
        place.write_bytes(place.read_bytes()[:-20])
    elif damage == "garbage":
        place.write_bytes(b"garbage")
    elif damage == "a flipped byte":
        data = bytearray(place.read_bytes())
        data[len(b"PAR1") + 12] ^= 0xFF  # in the first page
        place.write_bytes(data)
    elif damage == "no UTF-8":
        bad = pyarrow.array([b"\xff"] * len(table)).view(pyarrow.string())
        pyarrow.parquet.write_table(table.set_column(2, table.schema.field(2), bad), place)
    elif damage == "nulls":
        nulls = pyarrow.nulls(len(table), pyarrow.binary())
        pyarrow.parquet.write_table(table.set_column(1, table.schema.field(1), nulls), place)
    elif damage == "another table":
        pyarrow.parquet.write_table(table.drop_columns(["size"]), place)
    else:
        later = table.schema.metadata | {b"goal_ray.index": b"2"}
        pyarrow.parquet.write_table(table.replace_schema_metadata(later), place)
    assert read_index(tar) is None
    assert len(scan_shard(tar, needs_pairs=True)) == 5


@pytest.mark.parametrize("tar", ["x.tar", "/x.tar", "a/x.tar", "s3://bucket/x.tar", "s3://bucket/a/x.tar"])
def test_the_index_lies_in_a_folder_beside_the_tar(tar):
    assert index_url(tar) == f"{tar.removesuffix('x.tar') or './'}index/x.tar.parquet"
