"""`goal-ray shards`: help that teaches, exit statuses, errors of one line."""

import json
import re

import pytest
from shard_inputs import good, picture, put, samples_in, write_members

from goal_ray.shards.__main__ import COMMANDS


@pytest.fixture
def shards(tmp_path):
    """Two tars of 3 samples."""
    for name in "ab":
        write_members(tmp_path / "shards" / f"{name}.tar", [m for n in range(3) for m in good(f"{name}{n}")])
    return tmp_path / "shards"


def test_the_help_lists_the_commands(call):
    status, printed, _ = call("shards", "--help")
    assert status == 0
    words = " ".join(printed.split())  # lines are broken for the terminal
    assert all(f"{name} {text}" in words for name, text in COMMANDS.items())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_with_an_example_and_every_argument_explained(call, command):
    status, printed, complaints = call("shards", command, "--help")
    assert (status, complaints) == (0, "")
    assert printed.startswith(f"usage: goal-ray shards {command} ")
    assert f"\nexample:\n  goal-ray shards {command} " in printed
    sections = printed.split("\npositional arguments:\n")[1].split("\nexample:")[0]
    blocks = re.split(r"\n  (?=\S)", "\n" + sections.replace("\n\noptions:\n", "\n"))[1:]
    assert len(blocks) >= 3
    assert [block for block in blocks if not re.search(r"\S(?: {2,}|\n +)\w", block)] == []
    assert max(map(len, printed.splitlines())) <= 120


def test_make_says_what_became_of_the_source(call, tmp_path):
    source = put(tmp_path / "in", {"a.png": picture(), "a.txt": "x", "b.png": picture(), "c.txt": "x", "d.txt": "x"})
    status, printed, _ = call("shards", "make", source, tmp_path / "out" / "train")
    assert (status, printed.splitlines()) == (
        0,
        [
            f"1 samples in 1 tars under {tmp_path}/out/train; 3 skipped:",
            "  no picture 2",
            "  no caption 1",
            f"listed in {tmp_path}/out/train/skipped.jsonl",
        ],
    )
    assert (tmp_path / "out" / "train" / "train-000000.tar").exists()
    assert call("shards", "make", source, tmp_path / "out" / "train")[:2] == (0, printed)


def test_validate_ends_with_0_for_clean_shards_and_1_for_others(call, shards, tmp_path):
    assert call("shards", "validate", shards, "--workers", 1) == (0, "6 samples in 2 tars: clean\n", "")
    write_members(shards / "c.tar", [("k.png", picture()), *good("a0")])
    status, printed, _ = call("shards", "validate", shards, "--workers", 1, "--json", tmp_path / "bad.jsonl")
    assert status == 1
    lines = printed.splitlines()
    assert lines[0].startswith(f"{shards}/c.tar: k: ")
    assert lines[1].startswith(f"{shards}/c.tar: a0: the key stands in {shards}/a.tar too")
    assert lines[2:] == ["8 samples in 3 tars: 2 violations"]
    told = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [f"{one['shard']}: {one['key']}: {one['problem']}" for one in told] == lines[:2]


def test_inspect_prints_a_table_or_json(call, shards):
    status, printed, _ = call("shards", "inspect", shards, "--workers", 1)
    assert (status, printed.split()[:2]) == (0, ["shard", "samples"])
    _, printed, _ = call("shards", "inspect", shards, "--workers", 1, "--json")
    assert json.loads(printed)["total"]["samples"] == 6


def test_reshard_says_what_came_out(call, shards, tmp_path):
    before = samples_in(shards)
    result = call(
        "shards", "reshard", shards, tmp_path / "out", "--shards", 4, "--workers", 1, "--shuffle", 0, "--name", "x"
    )
    assert result[:2] == (0, f"6 samples in 4 tars of 1 to 2 under {tmp_path}/out\n")
    assert samples_in(tmp_path / "out").keys() == before.keys()
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar"))[0] == "x-000000.tar"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["make", "{tmp}/nothing", "{tmp}/out"], ["nothing"]),
        (["make", "{tmp}/list.csv", "{tmp}/out"], ["no known picture column", "'where', 'what'"]),
        (["make", "{tmp}/list.csv", "{tmp}/out", "--samples-per-shard", "0"], ["at least 1"]),
        (["make", "{tmp}/list.csv", "{tmp}/out", "--name", "a/b"], ["--name 'a/b'"]),
        (["inspect", "{tmp}/nothing"], ["no such file or folder"]),
        (["inspect", "{shards}", "--workers", "0"], ["--workers must be at least 1"]),
        (["validate", "{tmp}"], ["holds no .tar file"]),
        (["reshard", "{shards}", "{tmp}/out"], ["--shards N or --samples-per-shard N"]),
        (["reshard", "{shards}", "{shards}", "--shards", "2"], ["mix with the input"]),
    ],
)
def test_a_users_error_is_one_line_on_stderr_and_status_2(call, shards, tmp_path, arguments, words):
    put(tmp_path, {"list.csv": "where,what\na,b\n"})
    status, printed, complaint = call(
        "shards", *(argument.format(tmp=tmp_path, shards=shards) for argument in arguments)
    )
    assert (status, printed) == (2, "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert all(word in complaint for word in words)


@pytest.mark.parametrize(
    "arguments", [[], ["mend"], ["make"], ["reshard", "a"], ["inspect"], ["make", "a", "b", "--from", "x"]]
)
def test_a_wrong_call_shows_the_usage(call, arguments):
    status, printed, complaint = call("shards", *arguments)
    assert (status, printed) == (2, "")
    assert complaint.startswith("usage: goal-ray shards")


def test_index_writes_what_is_missing(call, shards):
    assert call("shards", "index", shards, "--workers", 1)[:2] == (0, "2 indexes written, 0 were there\n")
    write_members(shards / "b.tar", [m for n in range(20) for m in good(f"b{n}")])
    write_members(shards / "c.tar", good("c"))
    assert call("shards", "index", shards, "--workers", 1)[:2] == (0, "2 indexes written, 1 were there\n")
    assert sorted(path.name for path in (shards / "index").iterdir()) == [f"{name}.tar.parquet" for name in "abc"]
