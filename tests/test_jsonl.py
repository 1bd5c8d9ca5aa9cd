"""JSON Lines files: what was written before and after a kill can be read."""

import json

import pytest

from goal_ray.errors import StageError
from goal_ray.jsonl import append_records, read_records


def test_records_survive_odd_signs_and_a_line_torn_inside_one(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    record = {"key": "a\u2028b", "reason": "日本"}
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(line + line[:-4])
    assert read_records(path) == [record]
    assert read_records(tmp_path / "missing.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"key": "c', b'{"key": {"a": 1}', b'{"key": "\xe6'])
def test_what_is_added_behind_a_torn_line_can_be_read(tmp_path, torn):
    path = tmp_path / "evaluations.jsonl"
    append_records(path, [{"key": "a"}])
    path.write_bytes(path.read_bytes() + torn)
    append_records(path, [{"key": "b"}, {"key": "caf\udce9"}])
    append_records(path, [])
    append_records(path, [{"key": "d"}])
    assert [record["key"] for record in read_records(path)] == ["a", "b", "caf\udce9", "d"]


def test_a_last_line_that_lacks_its_end_alone_is_a_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert [record["step"] for record in read_records(path)] == [1, 2]
    append_records(path, [{"step": 3}])
    assert [record["step"] for record in read_records(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", ["", '{"key": "c', "[]", "3", '{"other": 1}'])
def test_a_damaged_line_that_has_its_end_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"key": "a"}\n' + line + '\n{"key": "b"}\n')
    with pytest.raises(StageError, match=r"metrics\.jsonl: line 2 .*; delete that line"):
        read_records(path, ("key",))
