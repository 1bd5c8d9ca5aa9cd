"""What a paired tar holds."""

import io
import tarfile

import pytest
from odd_tars import GOOD, good, odd_but_good, read_members, write_members

from goal_ray.errors import ShardError
from goal_ray.lism.paired_tar import write_paired_tar
from goal_ray.storage import size_bytes
from goal_ray.tar_places import member_places, read_part
from goal_ray.tars import stream_samples


@pytest.fixture
def shard(tmp_path):
    """A tar of three usable samples."""
    write_members(tmp_path / "in.tar", [member for n in range(3) for member in good(f"s{n}", seed=n)])
    return str(tmp_path / "in.tar")


def paired_names(shard, tmp_path, pairs):
    write_paired_tar(shard, str(tmp_path / "x.tar"), pairs)
    return [name for name, _ in read_members(tmp_path / "x.tar")]


def test_pairs_stand_behind_the_members_of_their_sample(shard, tmp_path):
    assert paired_names(shard, tmp_path, {0: b"{}", 2: b"{}"}) == [
        *("s0.png", "s0.txt", "s0.pairs.json"),
        *("s2.png", "s2.txt", "s2.pairs.json"),
    ]


def test_headers_of_members_stay_as_they_were(tmp_path):
    write_members(tmp_path / "a.tar", odd_but_good())
    write_paired_tar(str(tmp_path / "a.tar"), str(tmp_path / "x.tar"), dict.fromkeys(range(100), b"{}"))
    with tarfile.open(tmp_path / "a.tar") as before, tarfile.open(tmp_path / "x.tar") as after:
        kept = [info for info in after if not info.name.endswith(".pairs.json")]
        for old, new in zip(before, kept, strict=True):
            assert new.get_info() == old.get_info()


def test_pairs_of_an_earlier_run_are_replaced(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, [*good("a")[:1], ("a.PAIRS.json", b"old"), *good("a")[1:], ("a.pairs.json", b"older")])
    write_paired_tar(str(path), str(tmp_path / "x.tar"), {0: b"new"})
    assert [(n, d) for n, d in read_members(tmp_path / "x.tar") if "pairs" in n.lower()] == [("a.pairs.json", b"new")]


def test_a_link_and_a_sparse_file_survive(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, good("a"))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("latest.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "a.txt"
        tar.addfile(link)
        tar.addfile(*sparse("hole.bin"))
    write_paired_tar(str(path), str(tmp_path / "x.tar"), {0: b"{}", 1: b"{}"})
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert tar.getmember("latest.txt").linkname == "a.txt"
        assert tar.extractfile("hole.bin").read() == bytes(512) + b"x" * 512


def sparse(name):
    """A GNU sparse member (PAX 0.1) of 1024 bytes whose first half is a hole."""
    info = tarfile.TarInfo(name)
    info.size = 512
    info.pax_headers = {
        "GNU.sparse.size": "1024",
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.map": "512,512",
    }
    return info, io.BytesIO(b"x" * 512)


def odd_member(name, kind, size, data=b""):
    """A member's blocks as other programs write them: of another type, its header with a size."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def test_folders_that_give_a_size_and_members_of_unknown_types_are_copied(tmp_path):
    path = tmp_path / "a.tar"
    write_members(path, good("a"))
    content = odd_member("d/", tarfile.DIRTYPE, 4096) + odd_member("dump/", b"D", 5, b"Ya\0\0\0") + path.read_bytes()
    path.write_bytes(content)
    (only,) = stream_samples(str(path))
    write_paired_tar(str(path), str(tmp_path / "x.tar"), {0: b"{}"})
    (paired,) = stream_samples(str(tmp_path / "x.tar"))
    assert paired.members == {**only.members, "pairs.json": b"{}"}
    with tarfile.open(tmp_path / "x.tar") as tar:
        assert [(info.name, info.type, info.size) for info in tar][:2] == [("d", b"5", 0), ("dump/", b"D", 5)]


def test_what_is_damage_to_the_reader_is_damage_to_the_writer(tmp_path):
    write_members(tmp_path / "a.tar", [*good("a"), *good("b")])
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        info, data = sparse("c.txt")
        info.pax_headers["GNU.sparse.size"] = "12x"
        tar.addfile(info, data)
    read = []
    with pytest.raises(ShardError):
        read.extend(sample.key for sample in stream_samples(str(tmp_path / "a.tar")))
    assert read == ["a"]  # the last before the damage may be incomplete
    assert paired_names(str(tmp_path / "a.tar"), tmp_path, {0: b"{}"})[-1] == "a.pairs.json"


def test_a_member_of_no_sample_that_is_too_large_is_left_out(tmp_path, monkeypatch):
    write_members(tmp_path / "a.tar", [("core", b"x" * 5001), ("notes", b"x" * 5000), *good("a")])
    monkeypatch.setattr("goal_ray.lism.paired_tar.LARGEST_MEMBER_BYTES", 5000)
    names = paired_names(str(tmp_path / "a.tar"), tmp_path, {0: b"{}"})
    assert "notes" in names
    assert "core" not in names


def test_a_sample_is_read_from_its_part_of_the_paired_tar(tmp_path):
    write_members(tmp_path / "a.tar", odd_but_good())
    pairs = {number: b"{}" for number in range(len(GOOD)) if number != 2}
    target = str(tmp_path / "x.tar")
    parts = write_paired_tar(str(tmp_path / "a.tar"), target, pairs).parts
    assert list(parts) == list(pairs)
    assert [read_part(target, *part) for part in parts.values()] == list(stream_samples(target))


def test_where_members_were_written_is_where_a_reader_finds_them(tmp_path):
    twice = [*good("a"), *good("left out"), *good("a", seed=1)]  # now side by side
    members = [*odd_but_good(), ("README", b"of no sample"), *twice]
    write_members(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(*sparse("hole.bin"))
    target = str(tmp_path / "x.tar")
    left_out = 2, len(GOOD) + 1
    pairs = {number: b"{}" for number in range(len(GOOD) + 4) if number not in left_out}
    written = write_paired_tar(str(tmp_path / "a.tar"), target, pairs)
    assert written.places == member_places(target)
    assert written.size_bytes == size_bytes(target)


def test_pairs_are_not_written_to_the_samples_of_a_changed_tar(shard, tmp_path):
    keys = {0: "s0", 1: "s1", 2: "s2"}
    write_paired_tar(shard, str(tmp_path / "x.tar"), dict.fromkeys(keys, b"{}"), keys)
    write_members(tmp_path / "in.tar", [member for n in (0, 2, 1) for member in good(f"s{n}", seed=n)])
    with pytest.raises(ShardError, match=r"in\.tar: 's2' stands where 's1' stood .*; the tar was changed meanwhile"):
        write_paired_tar(shard, str(tmp_path / "y.tar"), dict.fromkeys(keys, b"{}"), keys)
    write_members(tmp_path / "in.tar", [member for n in (0, 1) for member in good(f"s{n}", seed=n)])
    with pytest.raises(ShardError, match=r"in\.tar: lacks 1 samples that it held before"):
        write_paired_tar(shard, str(tmp_path / "y.tar"), dict.fromkeys(keys, b"{}"), keys)
    assert not (tmp_path / "y.tar").exists()


def test_of_two_tars_in_one_file_all_samples_of_the_first_are_paired(shard, tmp_path):
    write_members(tmp_path / "b.tar", good("lost"))
    with open(shard, "ab") as file:
        file.write((tmp_path / "b.tar").read_bytes())
    assert paired_names(shard, tmp_path, {2: b"{}"}) == ["s2.png", "s2.txt", "s2.pairs.json"]
