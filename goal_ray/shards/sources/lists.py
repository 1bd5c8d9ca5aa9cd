"""Lists with a row per picture: CSV, TSV, JSON Lines, Parquet. Read a few rows at a time."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice, takewhile
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from goal_ray.errors import ConfigError, StageError
from goal_ray.shards.sources.candidate import (
    Candidate,
    Found,
    Unusable,
    caption_text,
    choose_column,
    fields_json,
    one_caption,
    read_file,
    stem_and_suffix,
    tar_key,
)
from goal_ray.storage import file_system, open_read

JSON_SUFFIXES = (".jsonl", ".jsonlines", ".ndjson")
LIST_SUFFIXES = (".csv", ".tsv", *JSON_SUFFIXES, ".parquet")
PICTURE_COLUMNS = (
    "image_path", "image_file", "image", "img", "jpg", "file_name", "filename", "filepath", "file_path", "file", "path",
    "picture",
)  # fmt: skip
CAPTION_COLUMNS = (
    "caption", "captions", "text", "txt", "long_caption", "description", "sentence", "sentences",
)  # fmt: skip
LARGEST_FIELD_CHARS = 1 << 24  # quotation marks that do not match make one field of all that follows
_BATCH_ROWS = 16  # a row may hold a picture
_HEAD_ROWS = 100
Row = Mapping[str, Any]


class ListSource:
    """The rows of one or more lists; the key is the picture's path as the list gives it, or that of a key column.

    A picture that stands in the list itself, without a path, takes its key from a column `key`, or list and row.

    images   folder that relative paths start from; None: each list's own folder
    columns  names of the columns of pictures, captions and keys; None: told by well-known names
    quotes   whether quotation marks enclose fields of CSV and TSV
    """

    in_folders = False

    def __init__(
        self,
        urls: Sequence[str],
        images: str | None,
        columns: tuple[str | None, str | None, str | None],
        several: Literal["join", "first"],
        quotes: bool,
    ):
        self.parts = list(urls)
        self._names = telling_names(self.parts)
        self._images, self._columns, self._several, self._quotes = images, columns, several, quotes

    def candidates(self, part: str) -> Iterator[Candidate]:
        """One candidate per row."""
        folder = self._images or part.rpartition("/")[0] or "."
        found = rows(part, self._quotes)
        list_name = part.rsplit("/", 1)[-1]
        head: list[tuple[int, Row | Unusable]] = []
        for number, row in found:
            if not isinstance(row, Unusable):
                head = [(number, row)]
                break
            yield Candidate("", f"{list_name} row {number}", row)
        if not head:
            return
        # Rows of JSON may leave columns out, so the names are those of many.
        head += islice(found, _HEAD_ROWS - 1)
        names = list(dict.fromkeys(name for _, row in head if not isinstance(row, Unusable) for name in row))
        picture_column, caption_column, key_column = self._choose(names, part)
        for number, row in chain(head, found):
            origin = f"{list_name} row {number}"
            if isinstance(row, Unusable):
                yield Candidate("", origin, row)
                continue
            rest = {name: value for name, value in row.items() if name not in (picture_column, caption_column)}
            path, data = path_and_bytes(row.get(picture_column))
            if key_column is not None:
                value = row.get(key_column)
                key = tar_key("" if value is None else str(value))
            else:
                value = row.get("key")
                named = f"{self._names[part]}-{number:09d}" if value in (None, "") else str(value)
                key = tar_key(stem_and_suffix(path)[0] if path else named)
            captions = row.get(caption_column)
            load = partial(self._load, folder, path, data, captions, rest)
            yield Candidate(key, origin, load, "a row before it has this key; --key-column names unique keys")

    def _choose(self, names: list[str], part: str) -> tuple[str, str, str | None]:
        picture, caption, key = self._columns
        if key is not None:
            choose_column(names, key, (), "key", part)
        return (
            choose_column(names, picture, PICTURE_COLUMNS, "picture", part),
            choose_column(names, caption, CAPTION_COLUMNS, "caption", part),
            key,
        )

    def _load(self, folder: str, path: str, data: bytes | None, captions: Any, rest: Row) -> Found:
        told = map(caption_text, captions if isinstance(captions, list) else [captions])
        caption = one_caption([text for text in told if text is not None], self._several)
        if data is None:
            if not path and rest.get("status", "success") != "success":  # img2dataset's
                raise Unusable("failed download", str(rest.get("error_message") or rest["status"]))
            data = read_listed(folder, path)
        return Found(data, caption, fields_json(rest))


def telling_names(urls: Sequence[str]) -> dict[str, str]:
    """What to call each list: its name without its suffix, behind the folders that tell it from others of that name."""
    paths = {url: stem_and_suffix(url)[0].split("/") for url in urls}
    names = Counter(path[-1] for path in paths.values())
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    common = sum(1 for _ in takewhile(lambda folders: len(set(folders)) == 1, levels))
    return {url: path[-1] if names[path[-1]] == 1 else "/".join(path[common:]) for url, path in paths.items()}


def path_and_bytes(value: Any) -> tuple[str, bytes | None]:
    """A picture column's value: a path, the picture's bytes, or {path, bytes} as the `datasets` library stores them."""
    if isinstance(value, bytes):
        return "", value
    if isinstance(value, dict):
        path, data = value.get("path"), value.get("bytes")
        return path if isinstance(path, str) else "", data if isinstance(data, bytes) else None
    return value if isinstance(value, str) else "", None


def read_listed(folder: str, path: str) -> bytes:
    """The bytes of a picture that a list names, relative to a folder or not. Raises Unusable."""
    if not path:
        raise Unusable("no picture", "the row names no picture")
    try:
        relative = "://" not in path and not path.startswith("/")
        fs, place = file_system(folder if relative else path)
    # Of an unknown protocol, or, fsspec's own, of one that needs more than an address.
    except (ConfigError, ValueError, TypeError, AttributeError, IsADirectoryError) as error:
        if isinstance(error.__context__, ImportError):  # installing the library mends it
            raise
        raise Unusable("unreadable", f"the picture {path!r} cannot be read: {error}") from None
    return read_file(fs, f"{place.rstrip('/')}/{path}" if relative else place, "picture")


def rows(url: str, quotes: bool) -> Iterator[tuple[int, Row | Unusable]]:
    """The rows of a list by their number, from 1, or what is wrong with one."""
    with open_read(url) as file:
        if url.lower().endswith(".parquet"):
            yield from enumerate(parquet_rows(url, file), 1)
            return
        # A byte that is not UTF-8 must not end the list: the caption with it is refused.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        if url.lower().endswith(JSON_SUFFIXES):
            yield from enumerate(json_rows(text), 1)
        else:
            yield from enumerate(csv_rows(url, text, quotes), 1)


def csv_rows(url: str, text: io.TextIOWrapper, quotes: bool) -> Iterator[Row | Unusable]:
    """Rows under a header. Raises StageError where quotation marks do not match: the rows behind would be wrong."""
    delimiter = "\t" if url.lower().endswith(".tsv") else ","
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    csv.field_size_limit(LARGEST_FIELD_CHARS)
    reader = csv.reader(text, delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
    header: list[str] | None = None
    try:
        for row in reader:
            if not row:
                continue
            if header is None:
                header = row
                check_names(header, url)
            elif len(row) != len(header):
                yield Unusable("bad row", f"line {reader.line_num}: {len(row)} fields under {len(header)} column names")
            else:
                yield dict(zip(header, row, strict=True))
    except csv.Error as error:
        remedy = "mend the line" + ("; --no-quotes takes quotation marks as they stand" if quotes else "")
        raise StageError(f"{url}: line {reader.line_num}: {error}; {remedy}") from None


def check_names(columns: Sequence[str], url: str) -> None:
    """Raises StageError where columns of a list cannot be told apart."""
    if len(set(columns)) < len(columns):
        raise StageError(f"{url}: two columns share a name: {', '.join(map(repr, columns))}; rename one")


def json_rows(text: io.TextIOWrapper) -> Iterator[Row | Unusable]:
    """One JSON object per line; empty lines are none."""
    for line in text:
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Unusable("bad row", f"not JSON: {error}")
            continue
        yield row if isinstance(row, dict) and row else Unusable("bad row", "not a JSON object with anything in it")


def parquet_rows(url: str, file: Any) -> Iterator[Row | Unusable]:
    """The rows of a Parquet file, in batches. Raises StageError for anything else."""
    try:
        # With pre_buffer Arrow would hold all row groups at once.
        parquet = pq.ParquetFile(file, pre_buffer=False)
        check_names(parquet.schema_arrow.names, url)
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
            yield from batch_rows(batch)
    except (pa.ArrowException, OverflowError, ValueError, OSError) as error:
        # Arrow's own OSError has no number and no type of its own; else the storage fails.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise StageError(f"{url}: not a readable Parquet file: {error}") from None


def batch_rows(batch: pa.RecordBatch) -> Iterator[Row | Unusable]:
    """The rows of a batch. A value that Python cannot hold, as a date in the year 0, costs just its row."""
    try:
        yield from batch.to_pylist()
    except (pa.ArrowException, OverflowError, ValueError) as error:
        if batch.num_rows > 1:
            for number in range(batch.num_rows):
                yield from batch_rows(batch.slice(number, 1))
        else:
            yield Unusable("bad row", f"a value cannot be read: {type(error).__name__}: {error}")
