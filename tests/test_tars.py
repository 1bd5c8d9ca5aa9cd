"""The shard contract, on real tars."""

import importlib
import io
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from goal_ray import tars
from goal_ray.errors import CaptionError, ShardError
from goal_ray.tar_places import MemberPlace, group_places, index_shard
from goal_ray.tars import (
    Gathering,
    Sample,
    end_mark,
    iter_members,
    open_tar,
    split_name,
    stored_bytes,
    stream_samples,
    write_tar,
)

SAMPLES = [
    ("folder.d/a", {"png": b"1" * 3000, "txt": b"one"}),
    ("b", {"jpg": b"2" * 700, "txt": b"two", "json": b"{}"}),
    ("ü-日本", {"webp": b"3", "txt": "三".encode(), "mask.png": b"4"}),
]


@pytest.fixture
def tar(tmp_path):
    url = str(tmp_path / "a.tar")
    write_tar(url, iter(SAMPLES))
    return url


def test_samples_come_back_as_written(tar):
    assert [(sample.key, sample.members) for sample in stream_samples(tar)] == SAMPLES


def test_the_webdataset_library_reads_the_same_samples(tar):
    read = list(webdataset.WebDataset(tar, shardshuffle=False))
    assert [(s["__key__"], {k: v for k, v in s.items() if k[0] != "_"}) for s in read] == SAMPLES


def test_equal_samples_give_equal_bytes(tar, tmp_path):
    write_tar(str(tmp_path / "b.tar"), iter(SAMPLES))
    assert Path(tar).read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_the_index_points_at_the_members(tar):
    data = Path(tar).read_bytes()
    for entry, (key, members) in zip(index_shard(tar), SAMPLES, strict=True):
        assert entry.key == key
        assert {name: data[at : at + size] for name, (at, size) in entry.members.items()} == members


@pytest.mark.parametrize("cut", [0, 100, 512, 1500, 3584, 4096, 4608, 5000, 5632, 7000, 9000])
def test_a_tar_cut_anywhere_yields_only_complete_samples_and_says_so(tar, tmp_path, cut):
    part = tmp_path / "part.tar"
    part.write_bytes(Path(tar).read_bytes()[:cut])
    read = []
    with pytest.raises(ShardError, match=r"part\.tar: corrupt or truncated"):
        read.extend((sample.key, sample.members) for sample in stream_samples(str(part)))
    assert read == SAMPLES[: len(read)]
    with pytest.raises(ShardError, match="corrupt or truncated"):
        index_shard(str(part))


@given(st.binary(max_size=3000))
def test_garbage_is_refused_and_nothing_else_is_raised(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("garbage") / "x.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError):
        list(stream_samples(str(path)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b.c/img.pairs.json", ("a/b.c/img", "pairs.json")),
        ("IMG.JPG", ("IMG", "jpg")),
        ("noext", None),
        (".hidden", None),
        ("dir/", None),
        ("x.", None),
    ],
)
def test_a_name_splits_at_the_first_dot_of_its_base_name(name, expected):
    assert split_name(name) == expected


def test_folders_and_stray_files_inside_a_tar_belong_to_no_sample(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name in ("README", "sub/a.txt", "sub/a.png"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
    assert [(s.key, sorted(s.members)) for s in stream_samples(str(path))] == [("sub/a", ["png", "txt"])]


@pytest.mark.parametrize(
    ("members", "repeated", "error"),
    [
        ({"txt": b"x"}, (), "no picture"),
        ({"jpg": b"", "png": b""}, (), "more than one picture"),
        ({"jpg": b""}, ("jpg",), "more than one picture"),
    ],
)
def test_a_sample_without_exactly_one_picture_is_refused(members, repeated, error):
    with pytest.raises(ShardError, match=error):
        Sample("k", members, repeated).image_bytes()


@pytest.mark.parametrize(
    ("members", "error"),
    [
        ({}, "no .txt caption"),
        ({"txt": b" \n"}, "empty"),
        ({"txt": b"\xff\xfe"}, "not UTF-8"),
        ({"txt": b"\xef\xbb\xbf"}, "empty"),
    ],
)
def test_a_sample_without_a_caption_is_refused(members, error):
    with pytest.raises(CaptionError, match=error):
        Sample("k", members).caption()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["k", "n" * 99, "n" * 130, "ü" * 80]),
            st.dictionaries(st.sampled_from(["png", "txt"]), st.binary(max_size=1200), min_size=1),
        ),
        max_size=8,
    )
)
def test_the_size_of_a_tar_is_known_before_it_is_written(tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    write_tar(str(path), iter(samples))
    content = sum(stored_bytes(key, members) for key, members in samples)
    assert path.stat().st_size == content + len(end_mark(content))


def test_a_member_that_is_too_large_is_not_read_and_its_sample_refused(tmp_path, monkeypatch):
    samples = [("a", {"jpg": b"p" * 2001, "txt": b"A."}), ("b", {"jpg": b"p" * 100, "txt": b"B."})]
    write_tar(str(tmp_path / "x.tar"), iter(samples))
    monkeypatch.setattr(tars, "LARGEST_MEMBER_BYTES", 2000)
    large, usable = stream_samples(str(tmp_path / "x.tar"))
    assert large.members == {}
    for member in (large.image_bytes, large.caption):
        with pytest.raises(ShardError, match=r"'a' takes more than 2000 bytes, up to and with its member \.jpg"):
            member()
    assert usable.image_bytes() == b"p" * 100


def test_members_that_together_are_too_large_are_not_read_further(tmp_path, monkeypatch):
    many = {f"part{number}": b"p" * 600 for number in range(9)}
    write_tar(str(tmp_path / "x.tar"), iter([("a", {"txt": b"A.", **many}), ("b", many)]))
    monkeypatch.setattr(tars, "LARGEST_MEMBER_BYTES", 3000)
    first, second = stream_samples(str(tmp_path / "x.tar"))
    assert (list(first.members), first.too_large) == (["txt", "part0", "part1"], ("part2",))
    assert (list(second.members), second.too_large) == (["part0", "part1"], ("part2",))


def test_very_many_members_under_one_key_are_gathered_in_time_that_grows_with_their_number():
    names = [str(number % 100_000) for number in range(200_000)]  # copied for each new one, they would take minutes
    gathering = Gathering("a")
    for name in names:
        gathering.add(name, 1, lambda: b"x")
    (found,) = group_places([MemberPlace(0, "a", name, 0, 1) for name in names])
    for sample in (gathering.sample(), found):
        assert (len(sample.members), len(sample.repeated)) == (100_000, 100_000)


def crafted(path, *headers):
    """A tar of these 512-byte headers, each followed by 512 bytes of data, and a sample before them."""
    write_tar(str(path), iter([("a", {"jpg": b"p", "txt": b"A."})]))
    content = path.read_bytes().rstrip(b"\0")
    content += bytes(-len(content) % tarfile.BLOCKSIZE)
    path.write_bytes(content + b"".join(header + bytes(512) for header in headers) + bytes(tarfile.RECORDSIZE))


# Of a sample before damage it is known only from a next one that it is complete.
@pytest.mark.parametrize(("size", "known"), [(10**16, ["a"]), (-512, []), (-(10**9), [])])
def test_a_size_that_makes_no_sense_ends_the_tar_and_no_reader_waits(tmp_path, size, known):
    info = tarfile.TarInfo("b.jpg")
    info.size = size
    crafted(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT))
    read = []
    with pytest.raises(ShardError, match="corrupt or truncated tar"):
        read.extend(sample.key for sample in stream_samples(str(tmp_path / "x.tar")))
    assert read == known
    with pytest.raises(ShardError, match="corrupt or truncated tar"):
        index_shard(str(tmp_path / "x.tar"))


def test_a_stray_member_that_reaches_beyond_the_end_is_damage(tmp_path):
    info = tarfile.TarInfo("stray")
    info.size = 10**16
    crafted(tmp_path / "x.tar", info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ShardError, match="reaches beyond the end of the file"):
        list(stream_samples(str(tmp_path / "x.tar")))


@pytest.fixture
def two_in_one(tar, tmp_path):
    """Two tars in one file, as `cat` makes it."""
    write_tar(str(tmp_path / "b.tar"), iter([("lost", {"jpg": b"p", "txt": b"A."})]))
    (tmp_path / "both.tar").write_bytes(Path(tar).read_bytes() + (tmp_path / "b.tar").read_bytes())
    return str(tmp_path / "both.tar")


def test_a_tar_behind_a_tar_is_an_error_behind_all_samples_of_the_first(two_in_one):
    read = []
    with pytest.raises(ShardError, match=r"both\.tar: another tar stands behind the end mark.*part them"):
        read.extend((sample.key, sample.members) for sample in stream_samples(two_in_one))
    assert read == SAMPLES
    with pytest.raises(ShardError, match="another tar stands behind the end mark"):
        index_shard(two_in_one)


@pytest.mark.parametrize("size", [0, 100, 512, 10_240, 11_264, 100_000])
@pytest.mark.parametrize("filling", [b"\0", b"\xff"])
def test_what_fills_a_tar_up_is_no_other_tar(tar, size, filling):
    with open(tar, "ab") as file:
        file.write(filling * size)
    assert [sample.key for sample in stream_samples(tar)] == [key for key, _ in SAMPLES]
    assert len(index_shard(tar)) == len(SAMPLES)


@pytest.mark.parametrize(("module", "program"), [("gzip", "gunzip"), ("bz2", "bunzip2"), ("lzma", "unxz")])
def test_a_compressed_tar_is_refused_naming_the_program_that_unpacks_it(tar, module, program):
    Path(tar).write_bytes(importlib.import_module(module).compress(Path(tar).read_bytes()))
    for read in (index_shard, lambda url: list(stream_samples(url))):
        with pytest.raises(ShardError, match=rf"a\.tar: the tar is compressed; unpack it with {program}$"):
            read(tar)


def test_a_name_may_start_as_a_compressed_file_does(tmp_path):
    write_tar(str(tmp_path / "a.tar"), iter([("BZh91AY", {"jpg": b"p", "txt": b"A."})]))
    assert [sample.key for sample in stream_samples(str(tmp_path / "a.tar"))] == ["BZh91AY"]


def test_a_sparse_member_can_be_streamed_and_is_refused_by_who_wants_its_place(tmp_path):
    info = tarfile.TarInfo("a.txt")
    info.size = 512
    info.pax_headers = {"GNU.sparse.size": "1024", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "512,512"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(b"x" * 512))
    (sample,) = stream_samples(str(tmp_path / "x.tar"))
    assert sample.members == {"txt": bytes(512) + b"x" * 512}
    with pytest.raises(ShardError, match=r"x\.tar: the member 'a\.txt' is sparse; pack the tar without -S"):
        index_shard(str(tmp_path / "x.tar"))


@pytest.mark.parametrize("mode", ["r|", "r:"])
def test_headers_that_were_read_are_not_held(tar, mode):
    with open(tar, "rb") as file, open_tar(file, mode) as opened:
        for _ in iter_members(opened):
            assert opened.members == []
