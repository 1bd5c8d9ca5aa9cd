"""`shards make`: sizes of shards, and the same bytes after whatever interruption."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_inputs import picture, put, samples_in, skipped

from goal_ray.errors import GoalRayError
from goal_ray.shard_urls import expand_shards
from goal_ray.shards.make import ShardSize, make_shards
from goal_ray.shards.sources.detect import SourceSettings
from goal_ray.tar_places import index_shard
from goal_ray.tars import stored_bytes

COUNT = 23


def make(source, out, size=None, name=None):
    """Makes shards of at most 5 samples."""
    return make_shards(SourceSettings(str(source)), str(out), name, size or ShardSize(5))


def files_in(out: Path) -> dict[str, bytes]:
    """Everything that `make` left, but for its settings, which name the folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A list of 23 pictures, every fourth row of it unusable in one way or another."""
    folder = tmp_path_factory.mktemp("source")
    rows = []
    for number in range(COUNT):
        put(folder, {f"{number}.png": picture(size=(10 + 3 * number, 10), seed=number)})
        rows.append(f"{number}.png,caption {number}")
        if number % 4 == 0:
            rows.append(
                [f"{number}.png,again", f"{number}.png,", "gone.png,x", "list.csv,not a picture"][number // 4 % 4]
            )
    return put(folder, {"list.csv": "image,caption\n" + "\n".join(rows) + "\n"}) / "list.csv"


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> Path:
    """What an undisturbed run makes of it."""
    out = tmp_path_factory.mktemp("out") / "train"
    make(source, out)
    return out


def test_shards_are_filled_one_after_the_other_in_the_order_of_the_source(whole):
    counts = [len(index_shard(url)) for url in expand_shards(str(whole))]
    assert counts == [5, 5, 5, 5, 3]
    assert list(samples_in(whole)) == [str(number) for number in range(COUNT)]
    assert [path.name for path in sorted(whole.glob("*.tar"))][:2] == ["train-000000.tar", "train-000001.tar"]
    assert len(skipped(whole)) == 6


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(limit=st.integers(1, 60_000))
def test_no_tar_is_larger_than_allowed_unless_by_a_single_sample(tmp_path_factory, source, whole, limit):
    out = tmp_path_factory.mktemp("limit") / "out"
    make(source, out, ShardSize(1000, limit))
    assert samples_in(out) == samples_in(whole)
    assert all(Path(url).stat().st_size <= limit or len(index_shard(url)) == 1 for url in expand_shards(str(out)))


def test_a_byte_limit_is_used_as_far_as_whole_samples_allow(tmp_path):
    files = {f"{n}.{end}": picture() if end == "png" else "x" for n in range(10) for end in ("png", "txt")}
    make(put(tmp_path / "in", files), tmp_path / "out", ShardSize(1000, 20_480))
    room = (20_480 - 1024) // stored_bytes("0", {"png": picture(), "txt": b"x"})
    assert [len(index_shard(url)) for url in expand_shards(str(tmp_path / "out"))] == [room, 10 - room]


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lost=st.sets(st.tuples(st.integers(0, 4), st.sampled_from(["tar", "state"]))), leftover=st.booleans())
def test_whatever_is_missing_is_made_again_and_the_rest_stays_untouched(
    tmp_path_factory, source, whole, lost, leftover
):
    out = tmp_path_factory.mktemp("resume") / "train"
    make(source, out)
    for number, part in lost:
        (out / (f"train-{number:06d}.tar" if part == "tar" else f"done/train-{number:06d}.json")).unlink()
    if leftover:
        put(out, {".train-000002.tar.0123.tmp": "half a tar"})
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar") if (int(path.stem[-6:]), "state") not in lost}
    made, tars = make(source, out)
    assert (made.samples, made.skipped.total(), tars) == (COUNT, 6, 5)
    (out / ".train-000002.tar.0123.tmp").unlink(missing_ok=True)
    assert files_in(out) == files_in(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_a_failing_storage_ends_the_run_and_the_next_one_goes_on(tmp_path, source, whole, monkeypatch):
    read = LocalFileSystem.cat_file

    def failing(self, path, **range_):
        if path.endswith("/17.png"):
            raise OSError(errno.EIO, "Input/output error", path)
        return read(self, path, **range_)

    monkeypatch.setattr(LocalFileSystem, "cat_file", failing)
    with pytest.raises(OSError, match="Input/output error"):
        make(source, tmp_path / "train")
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.glob("train/*.tar")) == [f"train-{n:06d}.tar" for n in range(3)]
    make(source, tmp_path / "train")
    assert files_in(tmp_path / "train") == files_in(whole)


@pytest.mark.parametrize("full", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_with_the_file_that_had_no_room(tmp_path, source, monkeypatch, full):
    def write(*_):
        raise OSError(full, os.strerror(full))

    monkeypatch.setattr("goal_ray.shards.make.write_samples", write)
    with pytest.raises(OSError, match=rf"{os.strerror(full)}: '.*/train-000000\.tar'"):
        make(source, tmp_path / "train")


HELD = """
import sys
from fsspec.implementations.local import LocalFileSystem
from goal_ray.shards.__main__ import main

pipe, read = sys.argv[1], LocalFileSystem.cat_file

def held(self, path, **range_):
    if path.endswith("/22.png"):
        open(pipe, "rb").read()
    return read(self, path, **range_)

LocalFileSystem.cat_file = held
main(sys.argv[2:])
"""


def test_a_killed_run_is_gone_on_with(tmp_path, source):
    copy = put(tmp_path / "source", {path.name: path.read_bytes() for path in source.parent.iterdir()})
    os.mkfifo(tmp_path / "hold")
    arguments = ["make", str(copy / "list.csv"), str(tmp_path / "train"), "--samples-per-shard", "5"]
    process = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path / "hold"), *arguments])
    # It blocks until the run reads the last picture; the run then waits for the bytes of the pipe.
    with open(tmp_path / "hold", "wb"):
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, "-m", "goal_ray.shards", *arguments], check=True, capture_output=True)
    make(copy / "list.csv", tmp_path / "undisturbed", name="train")
    left = {name: data for name, data in files_in(tmp_path / "train").items() if not name.endswith(".tmp")}
    assert left == files_in(tmp_path / "undisturbed")


def test_a_changed_source_or_other_settings_are_refused(tmp_path, source):
    copy = put(tmp_path / "source", {path.name: path.read_bytes() for path in source.parent.iterdir()})
    make(copy / "list.csv", tmp_path / "out")
    with pytest.raises(GoalRayError, match=r"other settings .*size_bytes"):
        make(copy / "list.csv", tmp_path / "out", ShardSize(5, 77))
    (copy / "list.csv").write_text("image,caption\n0.png,x\n")
    with pytest.raises(GoalRayError, match=r"another input \(parts"):
        make(copy / "list.csv", tmp_path / "out")


def test_a_folder_that_changed_before_the_place_to_go_on_from_is_refused(tmp_path):
    folder = put(
        tmp_path / "in", {f"{n}.{end}": picture() if end == "png" else "x" for n in range(9) for end in ("png", "txt")}
    )
    make(folder, tmp_path / "out")
    (tmp_path / "out" / "out-000001.tar").unlink()
    (folder / "3.png").unlink()
    (folder / "3.txt").unlink()
    with pytest.raises(GoalRayError, match="changed since these shards were begun"):
        make(folder, tmp_path / "out")


def test_the_output_is_kept_away_from_the_source_and_from_other_shards(tmp_path, source):
    folder = put(tmp_path / "in", {"a.png": picture(), "a.txt": "x"})
    for out in (folder, folder / "shards"):
        with pytest.raises(GoalRayError, match="mix with the input"):
            make(folder, out)
    put(tmp_path / "other", {"x.tar": "y"})
    with pytest.raises(GoalRayError, match=r"holds x\.tar but no make\.json"):
        make(source, tmp_path / "other")


def test_source_and_output_may_lie_on_another_storage(source, whole):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in source.parent.iterdir():
        memory.pipe_file(f"/make-source/{path.name}", path.read_bytes())
    for _ in range(2):
        make("memory://make-source/list.csv", "memory://make-out/train")
        memory.rm_file("/make-out/train/train-000001.tar")
    make("memory://make-source/list.csv", "memory://make-out/train")
    tars = {path.name: path.read_bytes() for path in whole.glob("*.tar")}
    assert {name: memory.cat_file(f"/make-out/train/{name}") for name in tars} == tars
    memory.rm("/make-source", recursive=True)
    memory.rm("/make-out", recursive=True)


def test_a_source_without_any_sample_is_an_error_that_tells_where_to_look(tmp_path):
    folder = put(tmp_path / "in", {"a.png": picture(), "b.txt": "x"})
    with pytest.raises(GoalRayError, match=r"no sample in it; .*skipped\.jsonl"):
        make(folder, tmp_path / "out")
    assert skipped(tmp_path / "out") == [("a", "no caption"), ("b", "no picture")]
