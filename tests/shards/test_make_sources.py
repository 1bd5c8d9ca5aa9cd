"""`shards make`: every kind of source becomes shards, and whatever cannot is listed with its reason."""

import csv
import datetime
import json
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_inputs import CAPTION, picture, put, samples_in, skipped, write_members

from goal_ray.errors import GoalRayError
from goal_ray.shards.make import ShardSize, make_shards
from goal_ray.shards.sources.detect import SourceSettings, open_source, tell_kind

PNG, JPEG, WEBP = picture("PNG"), picture("JPEG"), picture("WEBP")


def make(source, out, **settings):
    """Makes shards with default sizes."""
    return make_shards(SourceSettings(str(source), **settings), str(out), None, ShardSize())


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


def coco(folder, images, annotations):
    """Writes a COCO file with its pictures in `train/`."""
    names = {
        image["file_name"]: PNG for image in images if image.get("file_name") and "missing" not in image["file_name"]
    }
    tree = json.dumps({"info": {}, "images": images, "annotations": annotations})
    return put(folder, {"captions.json": tree, **{f"train/{name}": data for name, data in names.items()}})


def test_captions_of_one_coco_image_are_joined_into_one_long_caption(tmp_path):
    folder = coco(
        tmp_path / "coco",
        [{"id": 7, "file_name": "b.jpg", "license": 3}, {"id": 3, "file_name": "a.jpg"}],
        [
            {"image_id": 3, "caption": "One only, as it is "},
            {"image_id": 7, "caption": "A man rides "},
            {"image_id": 7, "caption": "Two people."},
            {"image_id": 7, "caption": ""},
            {"image_id": 7, "caption": "A horse"},
        ],
    )
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    made = samples_in(tmp_path / "out")
    assert [members["txt"] for members in made.values()] == [
        b"A man rides. Two people. A horse.",
        b"One only, as it is ",
    ]
    assert json.loads(made["b"]["json"]) == {
        "id": 7,
        "license": 3,
        "captions": ["A man rides ", "Two people.", "", "A horse"],
    }
    make(folder / "captions.json", tmp_path / "first", images=str(folder / "train"), captions="first")
    assert samples_in(tmp_path / "first")["b"]["txt"] == b"A man rides "


def test_coco_images_without_captions_and_annotations_without_images_are_listed(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "b.jpg"},
        {"id": 3, "file_name": "missing.jpg"},
        {"id": 4},
    ]
    annotations = [{"image_id": 1, "caption": "x"}, {"image_id": 3, "caption": "x"}, {"image_id": 99, "caption": "x"}]
    folder = coco(tmp_path / "coco", images, annotations)
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    assert list(samples_in(tmp_path / "out")) == ["a"]
    expected = [("b", "no caption"), ("missing", "unreadable"), ("", "bad row"), ("", "no picture")]
    assert skipped(tmp_path / "out") == expected


ROWS = [
    {"image": "p/a.png", "caption": 'A "quoted", long\ncaption.', "views": 3},
    {"image": "p/b.jpg", "caption": "日本。", "views": 4},
]


def write_csv(path, rows, **dialect):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)


WRITERS = {
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "jsonl": lambda path, rows: path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n"),
    "parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_list_of_paths_and_captions(tmp_path, suffix):
    put(tmp_path / "data", {"p/a.png": PNG, "p/b.jpg": JPEG})
    WRITERS[suffix](tmp_path / "data" / f"list.{suffix}", ROWS)
    make(tmp_path / "data" / f"list.{suffix}", tmp_path / "out")
    made = samples_in(tmp_path / "out")
    views = (lambda number: str(number)) if suffix in ("csv", "tsv") else int
    assert {key: (set(members), members["txt"].decode()) for key, members in made.items()} == {
        "p/a": ({"png", "txt", "json"}, ROWS[0]["caption"]),
        "p/b": ({"jpg", "txt", "json"}, ROWS[1]["caption"]),
    }
    assert [json.loads(members["json"]) for members in made.values()] == [{"views": views(3)}, {"views": views(4)}]


@pytest.mark.parametrize("suffix", WRITERS)
def test_columns_are_named_by_options_and_paths_start_from_images(tmp_path, suffix):
    put(tmp_path / "photos", {"a.png": PNG})
    rows = [
        {"where": "a.png", "what": CAPTION, "text": "not this", "no": "n.1"},
        {"where": str(tmp_path / "photos/a.png"), "what": CAPTION, "text": "", "no": "n2"},
    ]
    WRITERS[suffix](tmp_path / f"list.{suffix}", rows)
    options = {
        "images": str(tmp_path / "photos"),
        "picture_column": "where",
        "caption_column": "what",
        "key_column": "no",
    }
    make(tmp_path / f"list.{suffix}", tmp_path / "out", **options)
    made = samples_in(tmp_path / "out")
    assert list(made) == ["n%2E1", "n2"]
    assert {members["txt"] for members in made.values()} == {CAPTION.encode()}


@pytest.mark.parametrize(
    ("row", "options", "words"),
    [
        ({"photo": "a.png", "caption": "x"}, {}, ["no known picture column", "--picture-column", "'photo', 'caption'"]),
        ({"image": "a.png", "words": "x"}, {}, ["no known caption column", "--caption-column", "'image', 'words'"]),
        ({"image": "a", "path": "b", "text": "x"}, {}, ["several", "image, path", "--picture-column"]),
        ({"image": "a.png", "text": "x"}, {"caption_column": "txt"}, ["no column 'txt'", "'image', 'text'"]),
        ({"image": "a.png", "text": "x"}, {"key_column": "id"}, ["no column 'id'", "--key-column"]),
    ],
)
@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_that_is_not_there_is_refused_with_those_that_are(tmp_path, suffix, row, options, words):
    WRITERS[suffix](tmp_path / f"list.{suffix}", [row])
    with pytest.raises(GoalRayError) as refusal:
        make(tmp_path / f"list.{suffix}", tmp_path / "out", **options)
    assert all(word in str(refusal.value) for word in words)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_rows_that_cannot_be_samples_are_listed_by_row(tmp_path):
    lines = [
        '{"image": "a.png", "caption": "good"}',
        '{"image": "a.png", "caption": "again"}',
        "{broken",
        "[1]",
        '{"image": "b.png", "caption": null}',
        '{"image": null, "caption": "x"}',
        '{"image": "none.png", "caption": "x"}',
        '{"image": "nope://x.png", "caption": "x"}',
        '{"image": "' + "n" * 300 + '.png", "caption": "x"}',
        '{"image": "c.png", "caption": "\\ud800"}',
        '{"image": "c\\u0000.png", "caption": "x"}',
        '{"image": "d.png", "caption": ["One", "Two"]}',
    ]
    put(tmp_path, {"list.jsonl": "\n".join(lines), "a.png": PNG, "b.png": PNG, "c.png": PNG, "d.png": PNG})
    make(tmp_path / "list.jsonl", tmp_path / "out")
    assert {key: members["txt"] for key, members in samples_in(tmp_path / "out").items()} == {
        "a": b"good",
        "d": b"One. Two.",
    }
    assert [kind for _, kind in skipped(tmp_path / "out")] == [
        "duplicate key",
        "bad row",
        "bad row",
        "no caption",
        "no picture",
        "unreadable",
        "unreadable",
        "unreadable",
        "bad caption",
        "unreadable",
    ]


def test_a_byte_that_is_not_utf8_costs_one_row_of_a_list(tmp_path):
    put(
        tmp_path,
        {
            "list.csv": b"\xef\xbb\xbfimage,caption\na.png,caf\xe9\nb.png,fine\nc.png,too,many\n",
            "a.png": PNG,
            "b.png": PNG,
        },
    )
    make(tmp_path / "list.csv", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["b"]
    assert skipped(tmp_path / "out") == [("a", "bad caption"), ("", "bad row")]


def test_unbalanced_quotation_marks_are_refused_and_can_be_taken_as_they_stand(tmp_path):
    put(tmp_path, {"list.tsv": 'image\tcaption\na.png\t"Hi" he said\nb.png\t5" wide\n', "a.png": PNG, "b.png": PNG})
    with pytest.raises(GoalRayError, match=r"list\.tsv: line 2: .*--no-quotes"):
        make(tmp_path / "list.tsv", tmp_path / "out")
    make(tmp_path / "list.tsv", tmp_path / "plain", quotes=False)
    assert [members["txt"] for members in samples_in(tmp_path / "plain").values()] == [b'"Hi" he said', b'5" wide']


def test_parquet_may_hold_the_pictures_themselves(tmp_path):
    nested = [{"image": {"bytes": PNG, "path": "x/a.png"}, "text": "x", "when": datetime.date(2024, 5, 1)}]
    nested += [{"image": {"bytes": JPEG, "path": None}, "text": "y", "when": None}]
    (tmp_path / "lists").mkdir()
    pq.write_table(pa.Table.from_pylist(nested), tmp_path / "lists" / "part-1.parquet")
    pq.write_table(
        pa.Table.from_pylist([{"image": {"bytes": WEBP}, "text": "z"}]), tmp_path / "lists" / "part-2.parquet"
    )
    make(tmp_path / "lists", tmp_path / "out")
    made = samples_in(tmp_path / "out")
    assert list(made) == ["x/a", "part-1-000000002", "part-2-000000001"]
    assert [sorted(members)[-2:] for members in made.values()] == [["png", "txt"], ["json", "txt"], ["txt", "webp"]]
    assert json.loads(made["x/a"]["json"]) == {"when": "2024-05-01"}


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
    failed = [("000000005.jpg", PNG), ("000000005.txt", b"c"), ("000000005.json", fields("x", "failed_to_resize"))]
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
    put(source / "00001", {"000010000.jpg": JPEG, "000010000.txt": "c", "000010000.json": fields("k", "failed")})
    img2dataset_table(source / "00000.parquet", STATUS)
    img2dataset_table(source / "00001.parquet", [])
    put(source, {"00000_stats.json": "{}"})
    make(source, tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["000000000", "000000002"]
    assert samples_in(tmp_path / "out")["000000002"]["json"] == fields("000000002")
    assert skipped(tmp_path / "out") == [("000000001", "failed download"), ("000010000", "failed download")]


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
    ("name", "content", "words"),
    [
        ("x.json", "{", "not JSON"),
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
