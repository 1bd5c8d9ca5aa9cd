"""The run folder's JSONL files."""

import json

from goal_ray.train.recorder import read_records


def test_records_survive_odd_signs_and_a_line_torn_inside_one(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    record = {"key": "a\u2028b", "reason": "日本"}
    line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
    path.write_bytes(line + line[:-4])
    assert read_records(path) == [record]
    assert read_records(tmp_path / "missing.jsonl") == []
