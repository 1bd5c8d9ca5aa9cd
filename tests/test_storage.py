"""Files that are there when complete, and what is left of the others."""

import errno
import gc
import os
import signal
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import aiohttp
import fsspec
import gcsfs.retry
import pytest

from goal_ray import atomic, patience, storage
from goal_ray.atomic import open_atomic, remove_abandoned, write_bytes
from goal_ray.errors import ConfigError, ShardError
from goal_ray.patience import may_pass
from goal_ray.shard_urls import expand_shards
from goal_ray.storage import (
    exists,
    file_system,
    kind,
    list_names,
    open_read,
    read_all,
    read_bytes,
    read_range,
    size_bytes,
    sizes_bytes,
)
from goal_ray.tar_places import member_places
from goal_ray.tars import stream_samples, write_tar

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


@pytest.mark.parametrize("count", [3, storage.FEW + 1])
def test_sizes_of_few_and_of_many_files_are_the_same_question(tmp_path, count):
    files = {str(tmp_path / f"{number} é.tar"): number for number in range(count)}
    for path, size in files.items():
        write_bytes(path, bytes(size))
    assert sizes_bytes(list(files)) == files
    with pytest.raises(FileNotFoundError, match="none"):
        sizes_bytes([*files, str(tmp_path / "none")])


def test_many_files_are_read_in_order(tmp_path):
    for number in range(100):
        write_bytes(str(tmp_path / str(number)), str(number).encode())
    assert list(read_all([str(tmp_path / str(n)) for n in range(100)])) == [str(n).encode() for n in range(100)]


def test_what_others_write_into_a_bucket_is_seen_at_once(s3):
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    write_bytes(f"{s3}/out/a", b"1")
    assert list_names(f"{s3}/out") == ["a"]
    other.pipe(f"{s3}/out/b", b"22")
    other.pipe(f"{s3}/out/a", b"333")
    assert list_names(f"{s3}/out") == ["a", "b"]
    assert sizes_bytes([f"{s3}/out/a", f"{s3}/out/b"]) == {f"{s3}/out/a": 3, f"{s3}/out/b": 2}


@pytest.mark.parametrize("size", [10, 60_000_000])
def test_an_upload_that_fails_leaves_the_old_object_and_nothing_else(s3, size):
    write_bytes(f"{s3}/a", b"old")
    with pytest.raises(TypeError), open_atomic(f"{s3}/a") as file:
        file.writelines([bytes(size), None])
    gc.collect()
    assert read_bytes(f"{s3}/a") == b"old"
    assert list_names(s3) == ["a"]
    assert not fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=s3.removeprefix("s3://")).get("Uploads")


@pytest.fixture(autouse=True)
def no_other_patience(monkeypatch):
    """s3fs itself would bridge the first ten seconds."""
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)


def test_a_read_goes_on_at_its_place_when_its_storage_comes_back(s3, s3_server, caplog):
    data = os.urandom(70_000_000)  # s3fs reads 50 MB ahead
    write_bytes(f"{s3}/a", data)
    with open_read(f"{s3}/a") as file:
        begun = file.read(5_000_000)
        back = s3_server.fail_for(seconds=2)
        assert begun + file.read() == data
    back.join()
    assert "trying again for" in caplog.text


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (lambda s3: read_range(f"{s3}/a", 1, 2), b"bc"),
        (lambda s3: write_bytes(f"{s3}/b", b"new") or read_bytes(f"{s3}/b"), b"new"),
        (lambda s3: exists(f"{s3}/a"), True),
        (lambda s3: exists(f"{s3}/none"), False),
        (lambda s3: list_names(s3), ["a"]),
        (lambda s3: [*sizes_bytes([f"{s3}/a"]).values()], [4]),
        (lambda s3: [url.rpartition("/")[2] for url in expand_shards(f"{s3}/a")], ["a"]),
    ],
)
def test_a_storage_that_is_away_is_waited_for(s3, s3_server, request_, answer):
    write_bytes(f"{s3}/a", b"abcd")
    back = s3_server.fail_for(seconds=1)
    assert request_(s3) == answer
    back.join()


def test_a_part_without_bytes_is_read_anywhere(s3, tmp_path):
    for folder in (s3, tmp_path):
        write_bytes(f"{folder}/a", b"abc")
        assert [read_range(f"{folder}/a", start, 0) for start in (0, 1, 3)] == [b"", b"", b""]


@pytest.fixture
def web(tmp_path):
    """The address of a server of whole files in a folder.

    It tells no length of those under /streamed/, and that it serves no parts of those under /whole/.
    """
    (tmp_path / "streamed").mkdir()

    class Files(SimpleHTTPRequestHandler):
        def send_header(self, keyword, value):
            if keyword != "Content-Length" or not self.path.startswith("/streamed/"):
                super().send_header(keyword, value)

        def end_headers(self):
            if self.path.startswith("/whole/"):
                self.send_header("Accept-Ranges", "none")
            super().end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path)))
    Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_tells_no_length_is_an_error_that_names_file_and_remedy(web, tmp_path):
    for place in ("a.tar", "streamed/a.tar"):
        write_bytes(str(tmp_path / place), b"abcd")
    assert (size_bytes(f"{web}/a.tar"), read_bytes(f"{web}/a.tar")) == (4, b"abcd")
    for ask in (size_bytes, open_read, lambda url: sizes_bytes([url])):
        with pytest.raises(ShardError, match=r"streamed/a\.tar: its server does not tell how long it is; copy it"):
            ask(f"{web}/streamed/a.tar")


@pytest.mark.parametrize("listed", [True, False])
def test_sizes_of_many_files_of_a_web_server_are_asked_one_by_one(web, tmp_path, listed):
    for number in range(storage.FEW + 1):
        write_bytes(str(tmp_path / "tars" / f"{number}.tar"), bytes(number))
    if not listed:
        (tmp_path / "tars" / "index.html").write_text("Nothing to see.")
    urls = [f"{web}/tars/{number}.tar" for number in range(storage.FEW + 1)]
    assert list(sizes_bytes(urls).values()) == list(range(storage.FEW + 1))


def test_a_page_of_links_is_a_folder_of_a_web_server(web, tmp_path):
    write_bytes(str(tmp_path / "tars" / "a.tar"), b"abcd")
    assert [kind(f"{web}/{place}") for place in ("tars", "tars/a.tar", "none")] == ["directory", "file", None]
    assert expand_shards(f"{web}/tars/") == [f"{web}/tars/a.tar"]


def answer(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((answer(status), False) for status in (400, 401, 403, 404, 410, 451)),
        *((answer(status), True) for status in (408, 425, 429, 500, 502, 503)),
        (gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}), False),
        (gcsfs.retry.HttpError({"code": 503, "message": "later"}), True),
        (aiohttp.InvalidURL("http://"), False),
        (aiohttp.ServerDisconnectedError(), True),
    ],
)
def test_what_a_server_refuses_does_not_pass(error, passes):
    assert may_pass(error) == passes


def test_patience_ends(s3, s3_server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    s3_server.stop()
    try:
        with pytest.raises(Exception, match="connect"):
            read_bytes(f"{s3}/a")
    finally:
        s3_server.start()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("a"),
        PermissionError("a"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.ELOOP, "a link to itself"),
        OSError(errno.EFBIG, "too large for a file"),
        TypeError(),
    ],
)
def test_what_lasts_is_raised_at_once(error):
    calls = []

    def request():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        patience.patiently(request, "s3://bucket/a")
    assert len(calls) == 1


def test_a_storage_whose_library_is_missing_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gs://bucket/x: .*gcsfs.*: pip install .*goal_ray\[gcs\]"):
        file_system("gs://bucket/x")


@pytest.mark.parametrize("place", ["a.tar", "whole/a.tar"])
def test_a_server_of_whole_files_only_is_told_of_and_says_nothing_against_the_tar(web, tmp_path, place):
    pictures = ((f"{number}", {"png": os.urandom(2**20), "txt": b"A cat."}) for number in range(12))
    (tmp_path / "whole").mkdir()
    write_tar(str(tmp_path / place), pictures)
    for ask in (lambda url: list(stream_samples(url)), member_places, lambda url: read_range(url, 6_000_000, 10)):
        with pytest.raises(OSError, match=r"its server serves no parts of files; copy it") as caught:
            ask(f"{web}/{place}")
        assert caught.value.errno == errno.EOPNOTSUPP


def test_an_object_that_is_replaced_while_it_is_read_is_an_error_not_half_of_each(s3):
    write_bytes(f"{s3}/a", b"old" * 40_000_000)  # s3fs reads 50 MB ahead
    with open_read(f"{s3}/a") as file:
        file.read(1000)
        write_bytes(f"{s3}/a", b"new" * 40_000_000)
        with pytest.raises(patience.FileReplaced, match="was replaced while it was read"):
            file.read()


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


@pytest.mark.parametrize("url", ["nosuch://a.tar", "nosuch://a/b::c"])
def test_an_unknown_kind_of_storage_is_an_error_that_names_it(url):
    with pytest.raises(ConfigError, match=f"{url}: Protocol not known: nosuch"):
        read_bytes(url)


def test_a_server_that_takes_no_files_is_an_error_that_names_the_file(web):
    with pytest.raises(ConfigError, match=r"/a\.tar: no files can be written there"):
        write_bytes(f"{web}/a.tar", b"text")


def test_two_colons_may_be_part_of_a_local_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("x::y.tar", f"{tmp_path}/folder::1/y.tar"):
        write_bytes(name, b"text")
        assert (Path(name).read_bytes(), read_bytes(name)) == (b"text", b"text")


def test_threads_that_wait_for_a_failing_storage_give_up_where_their_block_ends():
    failed = Event()

    def request():
        failed.set()
        raise ConnectionError("away")

    with patience.threads(1) as pool:
        waiting = pool.submit(patience.patiently, request, "s3://bucket/a")
        assert failed.wait(60)
    with pytest.raises(ConnectionError, match="away"):
        waiting.result(0)


def hub_error(status: int) -> Exception:
    httpx = pytest.importorskip("httpx2")
    answer = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return pytest.importorskip("huggingface_hub.errors").HfHubHTTPError("no", response=answer)


def test_what_the_hub_refuses_lasts_and_what_it_fails_at_passes():
    assert [may_pass(hub_error(status)) for status in (401, 404, 429, 503)] == [False, False, True, True]
    assert may_pass(pytest.importorskip("httpx2").ConnectError("away"))
