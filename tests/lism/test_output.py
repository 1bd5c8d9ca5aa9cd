"""The output folder: what a paired tar holds, and which shards count as done."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from odd_tars import GOOD, good, odd_but_good, read_members, write_members

from goal_ray.errors import ShardError
from goal_ray.lism.output import OutputFolder, ShardCounts, print_summary, summary, write_paired_tar
from goal_ray.storage import size_bytes
from goal_ray.tar_index import index_url, read_index
from goal_ray.tar_places import member_places, read_part
from goal_ray.tars import stream_samples

BAD = {"shard": "in.tar", "key": "k", "stage": "decode", "reason": "torn"}


@pytest.fixture
def shard(tmp_path):
    """A tar of three usable samples."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "in.tar"
    write_members(path, [member for n in range(3) for member in good(f"s{n}", seed=n)])
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return OutputFolder(str(tmp_path / "out"))


def counted(shard, paired, bad):
    counts = ShardCounts(size_bytes(shard))
    for _ in range(paired):
        counts.add_pairs(3, 1, [0.5], 0)
    for _ in range(bad):
        counts.add_bad(BAD)
    return counts


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
    monkeypatch.setattr("goal_ray.lism.output.LARGEST_MEMBER_BYTES", 5000)
    names = paired_names(str(tmp_path / "a.tar"), tmp_path, {0: b"{}"})
    assert "notes" in names
    assert "core" not in names


def test_only_a_shard_with_all_its_outputs_is_finished(shard, folder):
    assert folder.finished({shard: size_bytes(shard)}) == {}
    counts = counted(shard, 2, 1)
    folder.finish(shard, {0: b"{}", 1: b"{}"}, [BAD], counts)
    assert folder.finished({shard: size_bytes(shard)}) == {shard: counts}


@pytest.mark.parametrize("lost", ["in.tar", "done/in.tar.json", "quarantine/in.tar.jsonl"])
def test_a_shard_that_lost_an_output_is_done_again(shard, folder, lost):
    folder.finish(shard, {0: b"{}", 1: b"{}"}, [BAD], counted(shard, 2, 1))
    os.unlink(f"{folder.url}/{lost}")
    assert folder.finished({shard: size_bytes(shard)}) == {}


def test_a_shard_whose_input_has_another_size_now_is_done_again(shard, folder):
    folder.finish(shard, {0: b"{}"}, [], counted(shard, 1, 0))
    assert folder.finished({shard: size_bytes(shard) + 512}) == {}


def test_a_shard_done_again_leaves_nothing_of_the_first_time(shard, folder):
    folder.finish(shard, {0: b"{}", 1: b"{}"}, [BAD], counted(shard, 2, 1))
    folder.finish(shard, {0: b"{}", 1: b"{}", 2: b"{}"}, [], counted(shard, 3, 0))
    assert os.listdir(f"{folder.url}/quarantine") == []
    folder.finish(shard, {}, [BAD] * 3, counted(shard, 0, 3))
    assert sorted(os.listdir(folder.url)) == ["done", "index", "quarantine"]
    assert os.listdir(f"{folder.url}/index") == []
    assert set(folder.finished({shard: size_bytes(shard)})) == {shard}


def test_a_write_that_fails_leaves_the_shard_undone_and_nothing_half_written(shard, folder):
    os.makedirs(f"{folder.url}/in.tar")
    with pytest.raises(OSError, match=r"in\.tar"):
        folder.finish(shard, {0: b"{}"}, [], counted(shard, 1, 0))
    assert folder.finished({shard: size_bytes(shard)}) == {}
    assert os.listdir(folder.url) == ["in.tar"]


def test_quarantine_has_a_json_line_for_every_bad_sample(shard, folder):
    records = [{**BAD, "key": key} for key in ("k", "日本 ü", r"caf\xe9")]
    folder.finish(shard, {}, records, counted(shard, 0, 3))
    lines = Path(folder.url, "quarantine", "in.tar.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == records


def test_the_summary_adds_up_shards_and_shows_similarities_and_first_reasons(capsys):
    first, second = ShardCounts(), ShardCounts()
    first.add_pairs(10, 2, [-1.0, 0.26, 1.0], whole_image=1)
    second.add_pairs(20, 3, [0.26], whole_image=0)
    for number in range(7):
        second.add_bad({**BAD, "key": f"k{number}"})
    result = summary([first, second], seconds=1.0)
    assert (result["samples"], result["paired"], result["quarantined"]) == (9, 2, 7)
    each = ("regions_per_image", "sentences_per_image", "pairs_per_image", "whole_image_share")
    assert [result[name] for name in each] == [15, 2.5, 2, 0.25]
    histogram = result["similarity_histogram"]
    assert {number: count for number, count in enumerate(histogram) if count} == {0: 1, 25: 2, 39: 1}
    print_summary(result)
    printed = capsys.readouterr().out
    assert "similarity +0.25..+0.30        2 █" in printed
    assert "in.tar 'k0' (decode): torn" in printed
    assert "2 more" in printed


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("PNG of 2000×1000 = 2000000 pixels, more than max_pixels=9", "PNG of N = N pixels, more than max_pixels=N"),
        (
            "caption of sample 'a 7' is not UTF-8: byte 0xe9 in position 3",
            "caption of sample … is not UTF-8: byte N in position N",
        ),
        (
            "s3://b/x 1/in.tar: corrupt or truncated tar: bad checksum",
            "s3://b/x ….tar: corrupt or truncated tar: bad checksum",
        ),
        ("sample 'k' has no picture (jpg/png; members: ['a', 'b'])", "sample … has no picture (jpg/png; members: …)"),
    ],
)
def test_reasons_are_counted_by_kind_without_what_is_of_one_sample(reason, kind):
    counts = ShardCounts()
    counts.add_bad({**BAD, "reason": reason})
    counts.add_bad({**BAD, "key": "other", "reason": reason})
    assert counts.reasons == {f"decode: {kind}": 2}


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


def test_a_shard_with_an_extension_that_is_not_utf8_is_finished_with_its_index(tmp_path, folder):
    shard = str(tmp_path / "a.tar")
    write_members(Path(shard), [*good("a"), ("a.caf\udce9", b"x")])
    folder.finish(shard, {0: b"{}"}, [], counted(shard, 1, 0))
    assert set(folder.finished({shard: size_bytes(shard)})) == {shard}
    assert len(read_index(folder.tar(shard))) == 4


def test_the_index_of_a_finished_shard_is_renewed_with_its_tar(shard, folder):
    for pairs in ({0: b"{}", 1: b"{}", 2: b"{}"}, {1: b'{"again": 1}'}):
        counts = counted(shard, len(pairs), 3 - len(pairs))
        folder.finish(shard, pairs, [BAD] * (3 - len(pairs)), counts)
        assert read_index(folder.tar(shard)) == member_places(folder.tar(shard))
    folder.finish(shard, {}, [BAD] * 3, counted(shard, 0, 3))
    assert not Path(index_url(folder.tar(shard))).exists()


def test_the_summary_tells_seconds_rate_and_share_of_every_phase_over_all_shards(capsys):
    first, second = ShardCounts(), ShardCounts()
    first.add_work("match", 6.0, 30)
    first.add_work("read", 1.0, 40)
    second.add_work("match", 3.0, 15)
    result = summary([first, second], seconds=1.0)
    assert list(result["work"]) == ["read", "match"]
    assert result["work"]["match"] == {"seconds": 9.0, "images": 45, "images_per_s": 5.0, "share": 0.9}
    print_summary(result)
    assert "match            9.0                   5.0  90.0 %" in capsys.readouterr().out
