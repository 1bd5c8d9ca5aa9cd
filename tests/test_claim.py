"""A folder belongs to what it was begun with."""

import json
import os

import pytest

from goal_ray.claim import claim_folder
from goal_ray.errors import StageError

WANTED = {"seed": 1, "name": "train", "inputs": [["a.tar", 3], ["caf\udce9.tar", 4]]}


def test_the_same_again_goes_on_and_what_killed_runs_left_is_removed(tmp_path):
    claim_folder(str(tmp_path), "made.json", WANTED)
    before = (tmp_path / "made.json").read_bytes()
    (tmp_path / "made-000000.tar").touch()
    left = tmp_path / f".made.json.{'0' * 32}.1.{'0' * 32}.tmp"
    left.touch()
    os.utime(left, (0, 0))
    claim_folder(str(tmp_path), "made.json", WANTED)
    assert (tmp_path / "made.json").read_bytes() == before
    assert not left.exists()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2}, r"\(seed 1, now 2; see .*made\.json\); use the same ones"),
        ({"inputs": []}, r"\(inputs; see"),
        ({"seed": None, "inputs": []}, r"\(seed 1, now None; inputs; see"),
        ({"more": True}, r"\(more None, now True; see"),
    ],
)
def test_something_else_is_refused_with_the_difference(tmp_path, changed, words):
    claim_folder(str(tmp_path), "made.json", WANTED)
    with pytest.raises(StageError, match=f"other settings or another input {words}"):
        claim_folder(str(tmp_path), "made.json", WANTED | changed)
    assert json.loads((tmp_path / "made.json").read_bytes().decode("utf-8"))["seed"] == 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.tar", "", r"holds x\.tar but no made\.json"),
        ("made.json", "{", "not JSON"),
        ("made.json", "[]", "not what a folder is made of"),
    ],
)
def test_a_folder_of_another_origin_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(StageError, match=rf"{words}.*use another OUT"):
        claim_folder(str(tmp_path), "made.json", WANTED)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "taken").touch()
    with pytest.raises(StageError, match=r"taken: cannot be used as the output folder: .*use another OUT"):
        claim_folder(str(tmp_path / "taken"), "made.json", WANTED)
