"""`shards make` tells what a source is, and refuses what is none."""

import socket
import ssl
import subprocess
import tarfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import aiohttp
import pytest
from shard_inputs import CAPTION, PNG, make, put, samples_in, skipped, write_members

from goal_ray import atomic, patience
from goal_ray.errors import GoalRayError
from goal_ray.shards.sources.detect import SourceSettings, open_source, tell_kind


def test_a_damaged_source_tar_gives_its_complete_samples_and_the_loss_is_listed(tmp_path):
    source = tmp_path / "in" / "x.tar"
    write_members(source, [(f"{n}.{end}", PNG if end == "png" else b"c") for n in "abc" for end in ("png", "txt")])
    with tarfile.open(source) as tar:
        inside_last = tar.getmembers()[-1].offset_data
    source.write_bytes(source.read_bytes()[:inside_last])
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a", "b"]
    assert skipped(tmp_path / "out") == [("c", "damaged tar")]


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"a.png": "", "a.txt": ""}, "folder"),
        ({"00000.tar": "", "done/x-000000.json": "{}"}, "img2dataset"),
        ({"a.png": "", "a.txt": "", "a.json": "{}"}, "folder"),
        ({"deep/a.png": ""}, "folder"),
        ({"x.csv": ""}, "list"),
        ({"x-0.parquet": "", "x-1.parquet": ""}, "list"),
        ({"00000.tar": "", "00000.parquet": ""}, "img2dataset"),
        ({"00000/000000000.jpg": "", "00000.parquet": ""}, "img2dataset"),
        ({"00000.parquet": "", "00000_stats.json": ""}, "list"),
    ],
)
def test_the_kind_of_a_folder_is_told_by_what_is_in_it(tmp_path, files, kind):
    assert tell_kind(str(put(tmp_path / "in", files))) == kind


def test_a_folder_that_may_be_two_kinds_is_refused_and_from_decides(tmp_path):
    source = put(tmp_path / "in", {"a.png": PNG, "a.txt": CAPTION, "metadata.csv": "file_name,text\na.png,other\n"})
    with pytest.raises(GoalRayError, match=r"metadata\.csv .*--images .*--from folder"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "folder", kind="folder")
    make(source / "metadata.csv", tmp_path / "list")
    assert samples_in(tmp_path / "folder")["a"]["txt"] == CAPTION.encode()
    assert samples_in(tmp_path / "list")["a"]["txt"] == b"other"


@pytest.mark.parametrize(
    ("pictures", "others"),
    [
        ("", {"backup.tar": None}),
        ("red/", {"backup.tar": None}),
        ("", {"00000.tar": None, "00000.parquet": ""}),
        ("", {"00000/000000000.png": PNG, "00000/000000000.txt": CAPTION, "00000.parquet": "no table"}),
    ],
)
def test_pictures_beside_tars_or_tables_are_not_passed_over_in_silence(tmp_path, pictures, others):
    source = put(tmp_path / "in", {f"{pictures}a.png": PNG, f"{pictures}a.txt": CAPTION})
    for name, content in others.items():
        if content is None:
            write_members(source / name, [("old.png", PNG), ("old.txt", b"c")])
        else:
            put(source, {name: content})
    with pytest.raises(GoalRayError, match=r"holds .* and beside it .*a\.png.*--from folder.*--from img2dataset"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "files", kind="folder")
    assert f"{pictures}a" in samples_in(tmp_path / "files")
    make(source, tmp_path / "packed", kind="img2dataset")
    assert f"{pictures}a" not in samples_in(tmp_path / "packed")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.json", "{", "not JSON"),
        ("x.json", "[" * 100_000, "not JSON"),
        ("x.json", "[]", "not a COCO file"),
        ("x.json", '{"images": [], "annotations": [{"image_id": 1, "bbox": []}]}', r"captions_\*\.json"),
        ("x.parquet", "nonsense", "not a readable Parquet file"),
        ("x.csv", "image,image,caption\n", "share a name"),
        ("x.csv", "image,caption\n", "no sample in it"),
        ("x.xlsx", "", "no folder, and not named as a list"),
    ],
)
def test_a_source_that_is_not_what_it_seems_is_refused(tmp_path, name, content, words):
    with pytest.raises(GoalRayError, match=words):
        make(put(tmp_path / "in", {name: content}) / name, tmp_path / "out")


def test_a_wrong_images_folder_ends_the_run_after_a_hundred_pictures(tmp_path):
    put(tmp_path, {"list.csv": "image,caption\n" + "".join(f"{n}.png,x\n" for n in range(500))})
    with pytest.raises(GoalRayError, match=r"none of the first 100 pictures .*--images"):
        make(tmp_path / "list.csv", tmp_path / "out")


def test_opening_a_source_reads_no_picture(tmp_path):
    kind, source = open_source(SourceSettings(str(put(tmp_path, {"a.png": b"", "a.txt": b""}))))
    assert (kind, len(source.parts)) == ("folder", 1)


def test_refused_access_to_a_store_ends_the_run_and_renewed_credentials_go_on(s3, tmp_path, monkeypatch):
    put(tmp_path / "in", {"list.csv": f"image,caption\n{s3}/a.png,x\n{s3}/none.png,x\n"})
    atomic.write_bytes(f"{s3}/a.png", PNG)

    async def refuse(*_, **__):
        raise PermissionError("The provided token has expired.")

    with monkeypatch.context() as patch:
        patch.setattr("s3fs.S3FileSystem._call_s3", refuse)
        with pytest.raises(PermissionError, match=r"s3://.*/a\.png: .*token has expired.*renew the credentials"):
            make(tmp_path / "in" / "list.csv", tmp_path / "out")
    make(tmp_path / "in" / "list.csv", tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 1
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"]


@pytest.fixture
def web():
    """The address of a server whose `/STATUS/` answers so each time, and `/STATUS-once/` only the first time.

    `/302/` leads to itself.
    """
    met = Counter()

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            status, _, once = self.path.split("/")[1].partition("-")
            met[self.path] += 1
            self.send_response(200 if once and met[self.path] > 1 else int(status))
            if status == "302":
                self.send_header("Location", self.path)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def listed(folder, *urls):
    """A list of pictures somewhere else."""
    return put(folder, {"list.csv": "image,caption\n" + "".join(f"{url},x\n" for url in urls)}) / "list.csv"


def test_a_dead_link_costs_its_row_and_a_server_that_is_busy_is_asked_again(web, tmp_path):
    statuses = ("200", "404", "403", "410", "503-once", "429-once")
    make(listed(tmp_path / "in", *(f"{web}/{status}/a.png" for status in statuses)), tmp_path / "out")
    assert [key.split("/")[1] for key in samples_in(tmp_path / "out")] == ["200", "503-once", "429-once"]
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"] * 3


def test_a_host_that_is_gone_costs_its_row(web, tmp_path, monkeypatch):
    ask = socket.getaddrinfo

    def asked(host, *more, **named):
        if host == "gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ask(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    make(listed(tmp_path / "in", f"{web}/200/a.png", "http://gone.example/a.png"), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 1
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"]


def test_a_way_that_leads_in_a_circle_costs_its_row_at_once(web, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(patience, "PATIENCE_S", 3)
    make(listed(tmp_path / "in", f"{web}/302/a.png", f"{web}/200/a.png"), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 1
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"]
    assert "trying again" not in caplog.text


def test_a_certificate_that_is_refused_costs_its_row_at_once(web, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(patience, "PATIENCE_S", 3)
    folder, server = tmp_path / "in", ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    subject = ["-subj", "/CN=localhost", "-days", "1", "-nodes", "-keyout", tmp_path / "key", "-out", tmp_path / "cert"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", *subject], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None
    Thread(target=server.serve_forever).start()
    try:
        url = f"https://127.0.0.1:{server.server_port}/a.png"
        make(listed(folder, url, f"{web}/200/a.png"), tmp_path / "out")
    finally:
        server.shutdown()
        server.server_close()
    assert len(samples_in(tmp_path / "out")) == 1
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"]
    assert "trying again" not in caplog.text


@pytest.mark.parametrize("place", ["{web}/503/a.png", "http://127.0.0.1:1/a.png"])
@pytest.mark.parametrize("last", [False, True])
def test_an_address_that_never_answers_costs_its_row_where_the_network_works(web, tmp_path, monkeypatch, place, last):
    monkeypatch.setattr(patience, "PATIENCE_S", 2)
    urls = [place.format(web=web), f"{web}/200/a.png"]
    make(listed(tmp_path / "in", *(urls[::-1] if last else urls)), tmp_path / "out")
    assert len(samples_in(tmp_path / "out")) == 1
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["unreadable"]


@pytest.mark.parametrize(
    ("place", "error"), [("{web}/503/a.png", aiohttp.ClientResponseError), ("http://127.0.0.1:1/a.png", OSError)]
)
def test_a_server_that_stays_away_ends_the_run(web, tmp_path, monkeypatch, place, error):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.2)
    with pytest.raises(error):
        make(listed(tmp_path / "in", place.format(web=web)), tmp_path / "out")
