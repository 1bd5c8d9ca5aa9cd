"""Files on any storage fsspec reaches. A file written here is visible only when complete."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def open_read(url: str) -> IO[bytes]:
    """Opens a file for reading; seekable, buffered. The caller closes it."""
    return fsspec.open(url, "rb").open()


@contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only if the block succeeds.

    Local: a hidden temporary file beside it, synced, then renamed. Object stores show an object only after a complete
    upload, and the upload is discarded on an error.
    """
    fs, path = url_to_fs(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        return
    file = fs.open(path, "wb")
    try:
        yield file
    except BaseException:
        file.discard()
        raise
    file.close()


def write_bytes(url: str, data: bytes) -> None:
    """Writes a whole file, atomically."""
    with open_atomic(url) as file:
        file.write(data)


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    with open_read(url) as file:
        return file.read()


def size_bytes(url: str) -> int:
    """The length of a file."""
    fs, path = url_to_fs(url)
    return int(fs.info(path)["size"])


def remove(url: str) -> None:
    """Deletes a file, if it is there."""
    fs, path = url_to_fs(url)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def read_range(url: str, start: int, length: int) -> bytes:
    """Part of a file, by one request. Raises OSError where the file ends before the part does."""
    fs, path = url_to_fs(url)
    data = bytes(fs.cat_file(path, start=start, end=start + length))
    if len(data) != length:
        raise OSError(f"{url}: holds {len(data)} of the {length} bytes from {start} on; was it changed meanwhile?")
    return data


def resolved(url: str) -> tuple[str, str]:
    """What two addresses of one file have in common: protocol and path, without links."""
    fs, path = url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        return "file", os.path.realpath(path)
    return fs.to_json(), path


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = url_to_fs(url)
    return bool(fs.exists(path))


def join(folder: str, name: str) -> str:
    """A file's address inside a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder; empty where the folder is missing."""
    fs, path = url_to_fs(folder)
    if not fs.isdir(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
