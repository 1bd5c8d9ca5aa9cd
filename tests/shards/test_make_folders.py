"""`shards make` of a folder of pictures with captions beside them."""

import errno
import os
import socket
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from shard_inputs import CAPTION, JPEG, PNG, WEBP, make, put, samples_in, skipped


def test_a_folder_of_pictures_with_captions_beside_them(tmp_path):
    source = put(
        tmp_path / "pictures",
        {
            "a.png": PNG,
            "a.txt": CAPTION,
            "deep/er.d/b.JPG": JPEG,
            "deep/er.d/b.txt": "Ein Café.\n",
            "deep/er.d/b.json": '{"from": "us"}',
            "c.webp": WEBP,
            "c.txt": CAPTION,
        },
    )
    made, tars = make(source, tmp_path / "out")
    assert (made.samples, tars, skipped(tmp_path / "out")) == (3, 1, [])
    assert samples_in(tmp_path / "out") == {
        "a": {"png": PNG, "txt": CAPTION.encode()},
        "c": {"webp": WEBP, "txt": CAPTION.encode()},
        "deep/er.d/b": {"jpg": JPEG, "txt": "Ein Café.\n".encode(), "json": b'{"from": "us"}'},
    }


def test_the_extension_says_what_the_picture_is_whatever_its_file_was_called(tmp_path):
    source = put(
        tmp_path / "in", {"a.jpg": PNG, "a.txt": "x", "b.png": JPEG, "b.txt": "x", "c.JPEG": WEBP, "c.txt": "x"}
    )
    make(source, tmp_path / "out")
    assert [sorted(members) for members in samples_in(tmp_path / "out").values()] == [
        ["png", "txt"],
        ["jpg", "txt"],
        ["txt", "webp"],
    ]


def test_dots_in_a_base_name_are_escaped_so_that_no_two_names_become_one_key(tmp_path):
    names = ["IMG.1.5", "IMG_1_5", "IMG%2E1%2E5", "x.y/IMG"]
    source = put(
        tmp_path / "in", {f"{name}.{end}": PNG if end == "png" else "x" for name in names for end in ("png", "txt")}
    )
    make(source, tmp_path / "out")
    assert set(samples_in(tmp_path / "out")) == {"IMG%2E1%2E5", "IMG_1_5", "IMG%252E1%252E5", "x.y/IMG"}
    assert all(len(members) == 2 for members in samples_in(tmp_path / "out").values())


def test_whatever_in_a_folder_is_no_sample_is_listed_with_its_reason(tmp_path):
    source = put(
        tmp_path / "in",
        {
            "good.png": PNG,
            "good.txt": CAPTION,
            "good.jpg": JPEG,
            "no-caption.png": PNG,
            "no-picture.txt": CAPTION,
            "blank.png": PNG,
            "blank.txt": " \n",
            "latin.png": PNG,
            "latin.txt": b"caf\xe9",
            "gif.gif": b"GIF89a....",
            "gif.txt": CAPTION,
            "empty.jpg": b"",
            "empty.txt": CAPTION,
            "README.md": "hello",
            ".DS_Store": "hidden things are ignored",
        },
    )
    (source / "gone.png").symlink_to("nowhere.png")
    put(source, {"gone.txt": CAPTION})
    (source / "round.png").symlink_to("round.png")
    put(source, {"round.txt": CAPTION})
    (source / "sub").mkdir()
    (source / "sub" / "loop").symlink_to(source)
    made, _ = make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["good"]
    assert sorted(skipped(tmp_path / "out")) == [
        ("README", "not a picture"),
        ("blank", "bad caption"),
        ("empty", "not a picture"),
        ("gif", "not a picture"),
        ("gone", "unreadable"),
        ("good", "duplicate key"),
        ("latin", "bad caption"),
        ("no-caption", "no caption"),
        ("no-picture", "no picture"),
        ("round", "unreadable"),
        ("sub/loop", "unreadable"),
    ]
    assert made.skipped.total() == 11


@pytest.mark.parametrize("special", ["pipe", "socket"])
def test_what_is_no_file_costs_its_sample(tmp_path, special):
    source = put(tmp_path / "in", {"a.png": PNG, "a.txt": CAPTION, "f.txt": CAPTION})
    with socket.socket(socket.AF_UNIX) as unix:
        if special == "pipe":
            os.mkfifo(source / "f.png")
        else:
            unix.bind(str(source / "f.png"))
        make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a"]
    assert skipped(tmp_path / "out") == [("f", "unreadable")]


def test_a_folder_without_rights_is_listed_and_the_others_are_read(tmp_path, monkeypatch):
    source = put(tmp_path / "in", {"a.png": PNG, "a.txt": CAPTION, "lost+found/b.png": PNG, "z/c.png": PNG})
    put(source, {"z/c.txt": CAPTION})
    ls = LocalFileSystem.ls

    def refused(self, path, **more):  # root, as whom tests may run, has all rights
        if path.endswith("/lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return ls(self, path, **more)

    monkeypatch.setattr(LocalFileSystem, "ls", refused)
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a", "z/c"]
    assert skipped(tmp_path / "out") == [("lost+found", "unreadable")]


def test_objects_in_a_folder_without_a_name_are_told_of_and_the_others_are_read(s3, tmp_path):
    fs = fsspec.filesystem("s3")
    for name in ("in/a.png", "in//b.png", "in/c/d.png", "in/c//e.png"):
        fs.pipe_file(f"{s3}/{name}", PNG)
        fs.pipe_file(f"{s3}/{name[:-4]}.txt", CAPTION.encode())
    make(f"{s3}/in", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a", "c/d"]
    assert skipped(tmp_path / "out") == [("", "unreadable"), ("c", "unreadable")]


def test_links_to_folders_are_followed(tmp_path):
    put(tmp_path / "elsewhere", {"a.png": PNG, "a.txt": CAPTION})
    source = put(tmp_path / "in", {"b.png": PNG, "b.txt": CAPTION})
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["b", "linked/a"]


def test_file_names_that_are_not_utf8_keep_their_bytes(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    for end, data in ((b"png", PNG), (b"txt", b"x"), (b"gif", b"GIF")):
        with open(os.fsencode(source) + b"/caf\xe9." + end, "wb") as file:
            file.write(data)
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["caf\udce9"]
    assert skipped(tmp_path / "out") == [("caf\udce9", "not a picture")]


def test_objects_that_mark_folders_of_an_object_store_are_no_candidates(s3, tmp_path):
    store = fsspec.filesystem("s3")
    for key in ("in/", "in/deep/"):
        store.call_s3("put_object", Bucket=s3.removeprefix("s3://"), Key=key, Body=b"")
    store.pipe({f"{s3}/in/a.png": PNG, f"{s3}/in/a.txt": b"x", f"{s3}/in/deep/b.png": PNG, f"{s3}/in/deep/b.txt": b"x"})
    make(f"{s3}/in", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a", "deep/b"]
    assert skipped(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [None, "folder", "img2dataset"])
def test_a_folder_on_a_storage_that_is_away_is_waited_for(s3, s3_server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)  # s3fs itself would bridge the first ten seconds
    fsspec.filesystem("s3").pipe({f"{s3}/in/00000/a.png": PNG, f"{s3}/in/00000/a.txt": b"x"})
    if kind == "img2dataset":
        fsspec.filesystem("s3").pipe({f"{s3}/in/00000.parquet": b""})
    back = s3_server.fail_for(seconds=1)
    make(f"{s3}/in", tmp_path / "out", kind=kind)
    back.join()
    assert list(samples_in(tmp_path / "out")) == ["a" if kind == "img2dataset" else "00000/a"]


def test_a_folder_of_a_web_server_whose_pages_have_no_length(tmp_path):
    put(tmp_path / "web", {"in/a.png": PNG, "in/a.txt": CAPTION, "in/deep/b.png": PNG, "in/deep/b.txt": CAPTION})

    class Files(SimpleHTTPRequestHandler):
        def send_header(self, keyword, value):
            if keyword != "Content-Length":
                super().send_header(keyword, value)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path / "web")))
    Thread(target=server.serve_forever).start()
    make(f"http://127.0.0.1:{server.server_port}/in", tmp_path / "out")
    server.shutdown()
    server.server_close()
    assert list(samples_in(tmp_path / "out")) == ["a", "deep/b"]
