"""`shards make` of img2dataset's output."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
from shard_inputs import JPEG, PNG, make, put, samples_in, skipped, write_members

STATUS = [
    ("000000000", "success", None),
    ("000000001", "failed_to_download", "HTTP 404"),
    ("000000002", "success", None),
]


def img2dataset_table(path, rows):
    table = [
        {"key": key, "status": status, "error_message": why, "caption": "c", "url": "u"} for key, status, why in rows
    ]
    pq.write_table(pa.Table.from_pylist(table), path)


def fields(key, status="success"):
    return json.dumps({"key": key, "status": status, "error_message": "HTTP 404", "url": "u"}, indent=4).encode()


def test_img2dataset_tars_and_the_failures_in_their_tables(tmp_path):
    source = tmp_path / "laion"
    members = [("000000000.jpg", PNG), ("000000000.txt", b"c"), ("000000000.json", fields("000000000"))]
    failed = [("000000005.txt", b"c"), ("000000005.json", fields("x", "failed_to_resize"))]
    write_members(source / "00000.tar", [*members, *failed])
    write_members(source / "00001.tar", [("000010000.jpg", JPEG), ("000010000.txt", b"c"), ("000010000.cls", b"5")])
    img2dataset_table(source / "00000.parquet", [*STATUS, ("000000005", "failed_to_resize", "x")])
    put(source, {"00000_stats.json": "{}", "00001_stats.json": "{}"})
    make(source, tmp_path / "out")
    assert samples_in(tmp_path / "out") == {
        "000000000": {"png": PNG, "txt": b"c", "json": fields("000000000")},
        "000010000": {"jpg": JPEG, "txt": b"c", "cls": b"5"},
    }
    assert skipped(tmp_path / "out") == [
        ("000000005", "failed download"),
        ("000000001", "failed download"),
        ("000000002", "no picture"),
    ]


def test_img2dataset_files_and_the_failures_in_their_tables(tmp_path):
    source = tmp_path / "laion"
    for key in ("000000000", "000000002"):
        put(source / "00000", {f"{key}.jpg": JPEG, f"{key}.txt": "c", f"{key}.json": fields(key)})
    img2dataset_table(source / "00000.parquet", STATUS)
    put(source, {"00000_stats.json": "{}"})
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["000000000", "000000002"]
    assert samples_in(tmp_path / "out")["000000002"]["json"] == fields("000000002")
    assert skipped(tmp_path / "out") == [("000000001", "failed download")]


def test_a_picture_that_is_there_was_downloaded_whatever_status_its_json_tells(tmp_path):
    members = {"a.jpg": JPEG, "a.txt": b"c", "a.json": b'{"status": "approved"}'}
    write_members(tmp_path / "tars" / "00000.tar", list(members.items()))
    put(tmp_path / "files" / "00000", members)
    img2dataset_table(tmp_path / "files" / "00000.parquet", [("a", "success", None)])
    for source in ("tars", "files"):
        make(tmp_path / source, tmp_path / "out" / source)
        assert list(samples_in(tmp_path / "out" / source)) == ["a"]
        assert skipped(tmp_path / "out" / source) == []


def test_what_an_interrupted_img2dataset_left_is_told_of(tmp_path):
    source = tmp_path / "laion"
    write_members(source / "00000.tar", [("000000000.jpg", PNG), ("000000000.txt", b"c")])
    put(source, {"00000.parquet": "half a table"})
    img2dataset_table(source / "00001.parquet", [("000010000", "success", None)])
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["000000000"]
    assert skipped(tmp_path / "out") == [("", "bad row"), ("000010000", "no picture")]


def test_img2dataset_parquet_that_holds_the_pictures(tmp_path):
    source = tmp_path / "laion"
    source.mkdir()
    rows = [{"key": "000000000", "jpg": JPEG, "txt": "c", "status": "success", "error_message": None}]
    rows += [{"key": "000000001", "jpg": None, "txt": None, "status": "failed_to_download", "error_message": "404"}]
    pq.write_table(pa.Table.from_pylist(rows), source / "00000.parquet")
    put(source, {"00000_stats.json": "{}"})
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["000000000"]
    assert skipped(tmp_path / "out") == [("000000001", "failed download")]


def test_a_sample_with_a_member_that_is_too_large_is_listed_not_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("goal_ray.tars.LARGEST_MEMBER_BYTES", 4000)
    members = [("a.png", PNG), ("a.txt", b"c"), ("a.npy", b"x" * 4001), ("b.png", PNG), ("b.txt", b"c")]
    write_members(tmp_path / "in" / "00000.tar", members)
    make(tmp_path / "in", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["b"]
    assert skipped(tmp_path / "out") == [("a", "too large")]
