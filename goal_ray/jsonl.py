"""JSON Lines files that a killed program leaves readable: a torn last line does not count."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from goal_ray.errors import StageError


def read_records(path: Path, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The records of a file, which must have `keys`; none where the file is missing.

    A torn last line is left out: its writer goes on, or was killed. Raises StageError, naming file and line, for any
    other line that is not a record.
    """
    # Bytes: a key may hold a sign that str.splitlines takes for a line's end, and a torn line may end inside a sign.
    *lines, last = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines += [last] if is_whole(last) else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise StageError(f"{path}: line {number} is not JSON ({error}); delete that line") from None
        missing = [key for key in keys if key not in record] if isinstance(record, dict) else keys or ["keys"]
        if missing:
            raise StageError(f"{path}: line {number} has no {', '.join(missing)}; delete that line")
        records.append(record)
    return records


def append_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Adds records to a file, in place of a line that a kill or a full disk tore."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    # A key's bytes that are not UTF-8, Python's surrogates, become JSON's escapes, which give them back.
    text = "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace")
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                data = path.read_bytes()
                begin = data.rfind(b"\n") + 1
                if is_whole(data[begin:]):
                    file.write(b"\n")
                else:
                    file.truncate(begin)
        file.write(text)


def is_whole(last: bytes) -> bool:
    """Whether a last line lacks its end alone: no part of a JSON object, but the whole, is one."""
    try:
        return isinstance(json.loads(last), dict)
    except ValueError:
        return False
