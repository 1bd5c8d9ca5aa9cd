"""An index beside a tar: where its members lie, so that a training starts without reading the tar.

`FOLDER/index/NAME.tar.parquet` for `FOLDER/NAME.tar`: a row for every member of a sample, in the tar's order: `sample`
(from 0), `key`, `extension`, `offset` and `size` in bytes. The file's metadata holds the tar's size; an index of a tar
of another size is not used, and whoever reads a member by it looks at the member's header (`tar_places.check_header`).
"""

import io
from collections.abc import Sequence

import pyarrow
import pyarrow.parquet

from goal_ray.atomic import write_bytes
from goal_ray.shard_urls import shard_name
from goal_ray.storage import join, read_bytes, remove, size_bytes
from goal_ray.tar_places import MemberPlace, member_places

FOLDER = "index"
VERSION = "1"
SCHEMA = pyarrow.schema(
    [
        ("sample", pyarrow.int32()),
        ("key", pyarrow.binary()),
        ("extension", pyarrow.string()),
        ("offset", pyarrow.int64()),
        ("size", pyarrow.int64()),
    ]
)


def index_url(tar: str) -> str:
    """Where the index of a tar stands."""
    folder, slash, _ = tar.rpartition("/")
    return join(join(folder + slash if folder else slash or ".", FOLDER), f"{shard_name(tar)}.parquet")


def write_index(tar: str, places: Sequence[MemberPlace], tar_bytes: int) -> None:
    """Writes the index of a tar of so many bytes, atomically; same places, same bytes."""
    columns = [list(column) for column in zip(*places, strict=True)] or [[] for _ in SCHEMA]
    columns[1] = [key.encode(errors="surrogateescape") for key in columns[1]]
    # Text, so what is not UTF-8 stands as escapes; no reader looks for such an extension.
    columns[2] = [extension.encode(errors="backslashreplace").decode() for extension in columns[2]]
    metadata = {"goal_ray.index": VERSION, "goal_ray.tar_bytes": str(tar_bytes)}
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    table = pyarrow.table(arrays, schema=SCHEMA.with_metadata(metadata))
    stream = io.BytesIO()
    pyarrow.parquet.write_table(table, stream, compression="zstd")
    write_bytes(index_url(tar), stream.getvalue())


def read_index(tar: str) -> list[MemberPlace] | None:
    """What the index of a tar says; None where none can be read that fits the tar's size and this version."""
    try:
        data = read_bytes(index_url(tar))
    # S3 says "forbidden" of what is missing to those who may not list.
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
        columns = [column.to_pylist() for column in table.columns]
    # Of a damaged index; Arrow has an OSError of its own, and text may not be UTF-8.
    except (pyarrow.ArrowException, OSError, ValueError):
        return None
    metadata = table.schema.metadata or {}
    if (
        metadata.get(b"goal_ray.index") != VERSION.encode()
        or metadata.get(b"goal_ray.tar_bytes") != str(size_bytes(tar)).encode()
        or table.schema.remove_metadata() != SCHEMA
        or any(column.null_count for column in table.columns)
    ):
        return None
    samples, keys, *others = columns
    names = [key.decode(errors="surrogateescape") for key in keys]
    return [MemberPlace(*row) for row in zip(samples, names, *others, strict=True)]


def remove_index(tar: str) -> None:
    """Deletes the index of a tar, if there is one."""
    remove(index_url(tar))


def make_index(tar: str) -> bool:
    """Writes the index of a tar from its headers, unless a fitting one is there. Returns whether it wrote one.

    Raises ShardError on a corrupt or truncated tar.
    """
    if read_index(tar) is not None:
        return False
    write_index(tar, member_places(tar), size_bytes(tar))
    return True
