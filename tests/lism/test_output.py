"""The output folder: which shards count as done, and what a shard done again leaves."""

import json
import os
from pathlib import Path

import pytest
from odd_tars import good, write_members

from goal_ray.errors import StageError
from goal_ray.lism.counts import ShardCounts
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.picks import Pick
from goal_ray.storage import size_bytes
from goal_ray.tar_index import index_url, read_index
from goal_ray.tar_places import member_places

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
        counts.add_pairs(3, 1, [0.5], 0, 1)
    for _ in range(bad):
        counts.add_bad(BAD)
    return counts


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


@pytest.mark.parametrize("change", [{"similarity_histogram": [0] * 40}, {"samples": "many"}])
def test_counts_that_another_version_stored_otherwise_are_refused_with_what_to_do(shard, folder, change):
    folder.finish(shard, {0: b"{}"}, [], counted(shard, 1, 0))
    done = Path(folder.url, "done", "in.tar.json")
    done.write_text(json.dumps({**json.loads(done.read_text()), **change}))
    (name,) = change
    with pytest.raises(
        StageError, match=rf"in\.tar\.json: not as this version .*\({name}: .*delete the files in .*done"
    ):
        folder.finished({shard: size_bytes(shard)})


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


def test_a_shard_whose_name_is_not_utf8_is_finished_and_its_quarantine_is_readable(tmp_path, folder):
    shard = str(tmp_path / "caf\udce9.tar")
    write_members(Path(shard), good("a"))
    counts, record = ShardCounts(size_bytes(shard)), {**BAD, "shard": "caf\udce9.tar"}
    counts.add_pairs(3, 1, [0.5], 0, 1)
    counts.add_picks([Pick("caf\udce9.tar", 0, "a", 0, 0, 0.5)])
    counts.add_bad(record)
    folder.finish(shard, {0: b"{}"}, [record], counts)
    assert folder.finished({shard: size_bytes(shard)}) == {shard: folder.counts(shard)} == {shard: counts}
    assert list(folder.quarantine([shard])) == [[record]]


def test_counts_that_are_no_json_are_refused_with_what_to_do(shard, folder):
    folder.finish(shard, {0: b"{}"}, [], counted(shard, 1, 0))
    Path(folder.url, "done", "in.tar.json").write_text("{")
    with pytest.raises(StageError, match=r"in\.tar\.json: not as this version .*delete the files in .*done"):
        folder.finished({shard: size_bytes(shard)})


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
