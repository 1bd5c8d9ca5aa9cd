"""`shards make` of lists: CSV, TSV, JSONL, Parquet."""

import csv
import datetime
import errno
import io
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_inputs import CAPTION, JPEG, PNG, WEBP, make, put, samples_in, skipped

from goal_ray.errors import GoalRayError, StageError
from goal_ray.shards.sources.candidate import Unusable, caption_text
from goal_ray.shards.sources.lists import parquet_rows

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
        '{"image": "github://x.png", "caption": "x"}',
        '{"image": "reference://x.png", "caption": "x"}',
        '{"image": "dir://x.png", "caption": "x"}',
        '{"image": "zip://x.png", "caption": "x"}',
        '{"image": "' + "n" * 300 + '.png", "caption": "x"}',
        '{"image": "c.png", "caption": "\\ud800"}',
        '{"image": "c\\u0000.png", "caption": "x"}',
        '{"image": "d.png", "caption": ["One", "Two"]}',
        "[" * 100_000,
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
        *["unreadable"] * 7,
        "bad caption",
        "unreadable",
        "bad row",
    ]


def test_a_row_on_a_storage_whose_library_is_missing_ends_the_run_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "paramiko", None)
    put(tmp_path, {"a.png": PNG, "list.csv": "image,caption\na.png,x\nsftp://h/b.png,x\n"})
    with pytest.raises(GoalRayError, match=r"sftp://h/b\.png: .*paramiko"):
        make(tmp_path / "list.csv", tmp_path / "out")


def test_only_a_list_is_said_to_have_a_key_column(tmp_path):
    put(
        tmp_path / "in",
        {"a.png": PNG, "a.jpg": JPEG, "a.txt": CAPTION, "list.csv": "image,caption\na.png,x\na.png,y\n"},
    )
    make(tmp_path / "in" / "list.csv", tmp_path / "list")
    make(tmp_path / "in", tmp_path / "folder", kind="folder")
    told = {name: (tmp_path / name / "skipped.jsonl").read_text() for name in ("list", "folder")}
    assert all("duplicate key" in text for text in told.values())
    assert [name for name, text in told.items() if "--key-column" in text] == ["list"]


def test_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a.png"], ["x"], ["y"]], names=["image", "text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(GoalRayError, match=r"x\.parquet: two columns share a name: .*'text'"):
        make(tmp_path / "x.parquet", tmp_path / "out")


class Counted(io.FileIO):
    """A file that tells how much of it was read."""

    read_bytes = 0

    def read(self, size=-1):
        data = super().read(size)
        self.read_bytes += len(data)
        return data


def test_of_a_parquet_file_no_more_is_read_than_its_rows_take(tmp_path):
    rows = [{"image": bytes([number]) * 100_000, "text": "x"} for number in range(40)]
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=10, compression="none", use_dictionary=False
    )
    with Counted(tmp_path / "x.parquet") as file:
        found = parquet_rows("x.parquet", file)
        assert next(found) == rows[0]
        assert file.read_bytes < 3_000_000
        assert list(found) == rows[1:]


# A picture in the list itself, which JSON cannot hold, has its key in a column `key`.
@pytest.mark.parametrize(("suffix", "column"), [("jsonl", "number"), ("parquet", "number"), ("parquet", "key")])
def test_a_key_may_be_the_number_zero(tmp_path, suffix, column):
    rows = [{column: n, "image": PNG if column == "key" else f"{n}.png", "caption": CAPTION} for n in (0, 1)]
    put(tmp_path, {"0.png": PNG, "1.png": PNG})
    WRITERS[suffix](tmp_path / f"list.{suffix}", rows)
    make(tmp_path / f"list.{suffix}", tmp_path / "out", key_column=None if column == "key" else column)
    assert list(samples_in(tmp_path / "out")) == ["0", "1"]


def test_a_long_field_beside_the_caption_costs_nothing(tmp_path):
    put(tmp_path, {"a.png": PNG})
    write_csv(tmp_path / "list.csv", [{"image": "a.png", "caption": CAPTION, "html": "x" * 200_000}])
    make(tmp_path / "list.csv", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a"]


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


def test_captions_that_are_no_text_are_listed_and_numbers_are_text(tmp_path):
    told = [2024, 1.5, ["One", None, 2], float("nan"), [], True, {"en": "x"}, [["x"]]]
    put(tmp_path, {f"{number}.png": PNG for number in range(len(told))})
    rows = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(told)]
    WRITERS["jsonl"](tmp_path / "list.jsonl", rows)
    make(tmp_path / "list.jsonl", tmp_path / "out")
    assert [members["txt"] for members in samples_in(tmp_path / "out").values()] == [b"2024", b"1.5", b"One. 2."]
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["no caption"] * 2 + ["bad caption"] * 3


def test_a_column_of_numbers_in_parquet_is_text(tmp_path):
    put(tmp_path, {"0.png": PNG, "1.png": PNG})
    WRITERS["parquet"](tmp_path / "x.parquet", [{"image": "0.png", "text": 2024}, {"image": "1.png", "text": None}])
    make(tmp_path / "x.parquet", tmp_path / "out")
    assert [members["txt"] for members in samples_in(tmp_path / "out").values()] == [b"2024"]
    assert skipped(tmp_path / "out") == [("1", "no caption")]


@pytest.mark.parametrize("value", [b"bytes", datetime.date(2024, 5, 1), True, (1, 2)])
def test_what_is_no_caption_is_named_by_its_type(value):
    with pytest.raises(Unusable, match=type(value).__name__) as refusal:
        caption_text(value)
    assert refusal.value.kind == "bad caption"


@pytest.mark.parametrize(
    ("parts", "keys"),
    [
        (["in/train.part0", "in/train.part1"], ["train%2Epart0-000000001", "train%2Epart1-000000001"]),
        (["in/2023/x", "in/2024/en/x"], ["2023/x-000000001", "2024/en/x-000000001"]),
        (["in/2023/x", "in/2024/x", "in/2024/y"], ["2023/x-000000001", "2024/x-000000001", "y-000000001"]),
    ],
)
def test_pictures_in_different_lists_have_different_keys(tmp_path, parts, keys):
    for part in parts:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        WRITERS["parquet"](tmp_path / f"{part}.parquet", [{"image": PNG, "text": part}])
    make(f"{tmp_path}/{{{','.join(parts)}}}.parquet", tmp_path / "out")
    assert {key: members["txt"].decode() for key, members in samples_in(tmp_path / "out").items()} == dict(
        zip(keys, parts, strict=True)
    )


def test_a_value_that_python_cannot_hold_costs_just_its_row(tmp_path):
    put(tmp_path, {f"{number}.png": PNG for number in range(4)})
    texts = pa.Array.from_buffers(
        pa.string(), 4, [None, pa.array(range(5), pa.int32()).buffers()[1], pa.py_buffer(b"ab\xffd")]
    )
    days = pa.array([0, -800_000, 0, 0], pa.int32()).cast(pa.date32())
    table = pa.table({"image": [f"{number}.png" for number in range(4)], "text": texts, "day": days})
    pq.write_table(table, tmp_path / "x.parquet")
    make(tmp_path / "x.parquet", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["0", "3"]
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["bad row", "bad row"]


@pytest.mark.parametrize("damage", ["footer", "data"])
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    WRITERS["parquet"](tmp_path / "x.parquet", [{"image": f"{n}.png", "text": f"text {n}"} for n in range(500)])
    data = (tmp_path / "x.parquet").read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    start, end = {"footer": (footer, len(data) - 8), "data": (4, footer)}[damage]
    (tmp_path / "x.parquet").write_bytes(data[:start] + b"\xff" * (end - start) + data[end:])
    with pytest.raises(StageError, match=r"x\.parquet: not a readable Parquet file"):
        make(tmp_path / "x.parquet", tmp_path / "out")


class Failing(io.BytesIO):
    """A file whose storage fails."""

    def __init__(self, error):
        super().__init__(bytes(100))
        self.error = error

    def read(self, *_):
        raise self.error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken disk"), ConnectionError("no route")])
def test_a_storage_that_fails_under_a_parquet_file_is_no_damage(error):
    with pytest.raises(type(error), match=error.args[-1]):
        list(parquet_rows("x.parquet", Failing(error)))


def test_columns_are_told_by_the_first_good_row_however_many_bad_ones_are_before_it(tmp_path):
    put(tmp_path, {"a.png": PNG, "b.png": PNG})
    bad = ["{broken", "{}", "[1]"] * 50
    good = [json.dumps({"image": f"{name}.png", "caption": CAPTION}) for name in "ab"]
    put(tmp_path, {"list.jsonl": "\n".join([*bad, *good])})
    make(tmp_path / "list.jsonl", tmp_path / "out")
    assert list(samples_in(tmp_path / "out")) == ["a", "b"]
    assert skipped(tmp_path / "out") == [("", "bad row")] * 150
