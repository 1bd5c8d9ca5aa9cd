"""Files that appear whole, or not at all, on every kind of storage."""

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from goal_ray import atomic
from goal_ray.atomic import open_atomic, remove_abandoned, write_bytes
from goal_ray.storage import (
    exists,
    kind,
    list_names,
    read_bytes,
)

HALF_WRITTEN = """
import sys
from goal_ray.atomic import open_atomic
with open_atomic(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def half_written(tmp_path):
    """A folder in which another process is just writing a file; the process."""
    writer = subprocess.Popen(
        [sys.executable, "-c", HALF_WRITTEN, str(tmp_path / "a.tar")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdout.readline() == b"writing\n"
    yield writer
    writer.kill()
    writer.communicate()


def test_a_file_appears_when_it_is_complete(tmp_path):
    with open_atomic(str(tmp_path / "new" / "a")) as file:
        file.write(b"text")
        assert [name for name in list_names(str(tmp_path / "new")) if not name.startswith(".")] == []
    assert os.listdir(tmp_path / "new") == ["a"]
    assert read_bytes(str(tmp_path / "new" / "a")) == b"text"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_bytes(str(tmp_path / "a"), b"old")
    with pytest.raises(TypeError), open_atomic(str(tmp_path / "a")) as file:
        file.writelines([b"new", None])
    assert os.listdir(tmp_path) == ["a"]
    assert read_bytes(str(tmp_path / "a")) == b"old"


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "🐶" * 63, "\udce9" * 255], ids=[1, 2, 4, "not UTF-8"])
def test_a_name_may_be_as_long_as_the_file_system_takes_it(tmp_path, name):
    with open_atomic(str(tmp_path / name)) as file:
        file.write(b"text")
        (temporary,) = os.listdir(tmp_path)
    assert atomic.TEMPORARY.fullmatch(temporary)
    assert os.listdir(tmp_path) == [name]


@pytest.fixture
def memory():
    """The address of an empty folder on a storage that shows what is half written and can move files."""
    yield "memory://folder"
    fsspec.filesystem("memory").rm("/folder", recursive=True)


def test_a_file_of_a_storage_without_uploads_appears_when_it_is_complete(memory):
    for content, before in ((b"old", []), (b"new", ["a"])):
        with open_atomic(f"{memory}/a") as file:
            file.write(content)
            temporary, *visible = list_names(memory)
            assert atomic.TEMPORARY.fullmatch(temporary)
            assert visible == before
        assert list_names(memory) == ["a"]
        assert read_bytes(f"{memory}/a") == content


def test_a_write_that_fails_on_such_a_storage_leaves_the_old_file_and_nothing_else(memory):
    write_bytes(f"{memory}/a", b"old")
    with pytest.raises(TypeError), open_atomic(f"{memory}/a") as file:
        file.writelines([b"new", None])
    assert list_names(memory) == ["a"]
    assert read_bytes(f"{memory}/a") == b"old"


@pytest.mark.parametrize(
    ("place", "undoing"),
    [("memory", "fsspec.implementations.memory.MemoryFileSystem.rm_file"), ("s3", "s3fs.core.S3File.discard")],
)
def test_what_made_a_write_fail_is_raised_also_where_it_cannot_be_undone(request, monkeypatch, caplog, place, undoing):
    url = request.getfixturevalue(place)

    def fail(*_):
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(undoing, fail)
        with pytest.raises(TypeError), open_atomic(f"{url}/a") as file:
            file.writelines([b"new", None])
    gc.collect()
    assert not exists(f"{url}/a")
    assert "could not be removed: OSError: gone" in caplog.text


def test_what_a_killed_process_left_is_removed_even_before_it_is_buried(half_written, tmp_path):
    (tmp_path / ".mine.tmp").touch()
    half_written.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, half_written.pid, os.WEXITED | os.WNOWAIT)
    assert len(os.listdir(tmp_path)) == 2
    remove_abandoned(str(tmp_path))
    assert os.listdir(tmp_path) == [".mine.tmp"]


def test_what_a_running_process_writes_is_left_alone(half_written, tmp_path):
    remove_abandoned(str(tmp_path))
    half_written.communicate(b"go on")
    assert os.listdir(tmp_path) == ["a.tar"]


@pytest.mark.parametrize(("age_s", "left"), [(atomic.ABANDONED_S / 2, 1), (atomic.ABANDONED_S * 2, 0)])
@pytest.mark.usefixtures("half_written")
def test_what_another_machine_wrote_is_removed_when_it_is_old(tmp_path, monkeypatch, age_s, left):
    monkeypatch.setattr(atomic, "process_place", lambda: "0" * 32)
    (path,) = tmp_path.iterdir()
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    remove_abandoned(str(tmp_path))
    assert len(os.listdir(tmp_path)) == left


@pytest.mark.parametrize("size", [10, 60_000_000])
def test_an_upload_that_fails_leaves_the_old_object_and_nothing_else(s3, size):
    write_bytes(f"{s3}/a", b"old")
    with pytest.raises(TypeError), open_atomic(f"{s3}/a") as file:
        file.writelines([bytes(size), None])
    gc.collect()
    assert read_bytes(f"{s3}/a") == b"old"
    assert list_names(s3) == ["a"]
    assert not fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=s3.removeprefix("s3://")).get("Uploads")


def test_a_pipe_and_a_device_are_written_and_stay_what_they_are(tmp_path):
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    read = []
    reader = Thread(target=lambda: read.append(Path(pipe).read_bytes()))
    reader.start()
    write_bytes(pipe, b"text")
    reader.join()
    assert read == [b"text"]
    assert kind(pipe) == "other"
    write_bytes("/dev/null", b"text")
    assert kind("/dev/null") == "other"


def test_of_a_link_the_file_it_leads_to_is_replaced(tmp_path):
    write_bytes(str(tmp_path / "folder" / "a"), b"old")
    (tmp_path / "link").symlink_to("folder/a")
    write_bytes(str(tmp_path / "link"), b"new")
    assert (tmp_path / "link").is_symlink()
    assert read_bytes(str(tmp_path / "folder" / "a")) == b"new"


def test_a_bucket_that_is_missing_is_not_made(s3):
    with pytest.raises(FileNotFoundError, match="make the bucket first"):
        write_bytes(f"{s3}-mistyped/folder/a", b"text")
    assert not exists(f"{s3}-mistyped")
