"""What is there on any storage, and reading it."""

import errno
import os
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import pytest

from goal_ray import patience, storage
from goal_ray.atomic import write_bytes
from goal_ray.errors import ConfigError, ShardError
from goal_ray.shard_urls import expand_shards
from goal_ray.storage import (
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
