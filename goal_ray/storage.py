"""Files on any storage fsspec reaches: what is there, and reading it.

A remote storage that fails for a while is asked again, as `goal_ray.patience` says.
"""

import errno
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from goal_ray.errors import ConfigError, ShardError
from goal_ray.patience import FileReplaced, patiently, threads

FEW = 100
PARALLEL_READS = 32
READ_BYTES = 1 << 20
# What storages tell of a file that is another one when it is replaced, the surest first.
VERSIONS = ("generation", "ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified")
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "hf"}


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path there. Remembers no listing: other processes write, too.

    Raises ConfigError for a kind of storage that is not known, or whose library is not installed.
    """
    if "::" in url and "://" not in url:  # a file's name; fsspec would take it for one storage behind another
        local = LocalFileSystem(use_listings_cache=False)
        return local, local._strip_protocol(url)
    try:
        return url_to_fs(url, use_listings_cache=False)
    except ValueError as error:
        raise ConfigError(f"{url}: {error}; is the address right?") from None
    except ImportError as error:
        raise ConfigError(f"{url}: {error}: pip install 'goal_ray[s3]' or 'goal_ray[gcs]', or that library") from None


def protocols(fs: Any) -> tuple[str, ...]:
    """What addresses of a file system may start with."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


class _RemoteFile(io.RawIOBase):
    """A remote file that is opened again, and read on from the same place, where its storage failed for a while."""

    def __init__(self, url: str):
        self.url = url
        self.fs, self.path = file_system(url)
        self.place = 0
        self.file: Any = None
        self.first: tuple[Any, str | None] | None = None
        size = patiently(self._open, url).size
        if size is None and patiently(lambda: self.fs.info(self.path), url).get("partial") is False:
            raise serves_no_parts(url)
        self.size = told_bytes(size, url)

    def _open(self) -> Any:
        if self.file is None:
            file = self.fs.open(self.path, "rb")
            opened = file.size, version(getattr(file, "details", None) or {})
            self.first = self.first or opened
            if opened != self.first:
                raise FileReplaced(errno.ESTALE, "was replaced while it was read; run the same command again", self.url)
            self.file = file
        return self.file

    def _read(self, length: int) -> bytes:
        try:
            file = self._open()
            file.seek(self.place)
            return file.read(length)
        except BaseException:
            self.file = None
            raise

    def readinto(self, buffer: Any) -> int:
        try:
            data = patiently(lambda: self._read(len(buffer)), self.url)
        except ValueError as error:
            if "range requests" not in str(error):
                raise
            raise serves_no_parts(self.url) from None
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, "negative seek position", self.url)
        self.place = start + offset
        return self.place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None
        super().close()


def serves_no_parts(url: str) -> OSError:
    """The error for a web server that sends files only whole."""
    return OSError(errno.EOPNOTSUPP, "its server serves no parts of files; copy it to a disk or an object store", url)


def open_read(url: str) -> IO[bytes]:
    """Opens a file for reading; seekable, buffered. The caller closes it. Raises ShardError as `size_bytes`."""
    fs, path = file_system(url)
    return fs.open(path, "rb") if isinstance(fs, LocalFileSystem) else io.BufferedReader(_RemoteFile(url), READ_BYTES)


def read_bytes(url: str) -> bytes:
    """The whole content of a file."""
    with open_read(url) as file:
        return file.read()


def size_bytes(url: str) -> int:
    """The length of a file. Raises ShardError where its storage, as a web server may do, tells none."""
    fs, path = file_system(url)
    return told_bytes(patiently(lambda: fs.info(path), url)["size"], url)


def told_bytes(size: int | None, url: str) -> int:
    """A length that a storage told. Raises ShardError where it told none."""
    if size is None:
        raise ShardError(f"{url}: its server does not tell how long it is; copy it to a disk or an object store")
    return int(size)


def version(info: Mapping[str, Any]) -> str | None:
    """What is another one when a file is replaced, of what its storage tells about it; None where it tells nothing."""
    return next((str(info[name]) for name in VERSIONS if info.get(name) is not None), None)


def identity(url: str) -> tuple[int, str | None]:
    """The length and `version` of a file. Raises as `size_bytes`."""
    fs, path = file_system(url)
    info = patiently(lambda: fs.info(path), url)
    return told_bytes(info["size"], url), version(info)


def sizes_bytes(urls: Sequence[str]) -> dict[str, int]:
    """The lengths of files, as `size_bytes`. Many of one folder are looked up in one listing of it."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    sizes: dict[str, int] = {}
    for folder, inside in folders.items():
        if len(inside) > FEW and kind(folder) == "directory":
            fs, path = file_system(folder)
            entries = patiently(partial(fs.ls, path, detail=True), folder)
            listed = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}
            found = {url: listed.get(url.rsplit("/", 1)[-1]) for url in inside}
            sizes |= {url: int(size) for url, size in found.items() if size is not None}
    return {url: sizes[url] if url in sizes else size_bytes(url) for url in urls}


def read_all(urls: Sequence[str]) -> Iterator[bytes]:
    """The contents of small files, in order, several read at a time."""
    with threads(PARALLEL_READS) as pool:
        yield from pool.map(read_bytes, urls)


def remove(url: str) -> None:
    """Deletes a file, if it is there."""
    fs, path = file_system(url)
    with suppress(FileNotFoundError):
        patiently(lambda: fs.rm_file(path), url)


def read_range(url: str, start: int, length: int) -> bytes:
    """Part of a file, by one request. Raises OSError where the file ends before the part does."""
    if not length:
        return b""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):  # fsspec takes several times as long
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(length)
    else:
        data = bytes(patiently(lambda: fs.cat_file(path, start=start, end=start + length), url))
        if len(data) > length:
            raise serves_no_parts(url)
    if len(data) != length:
        raise OSError(f"{url}: holds {len(data)} of the {length} bytes from {start} on; was it changed meanwhile?")
    return data


def resolved(url: str) -> tuple[str, str]:
    """What two addresses of one file have in common: protocol and path, without links."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):
        return "file", os.path.realpath(path)
    return fs.to_json(), path


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    return kind(url) is not None


def kind(url: str) -> str | None:
    """What an address is: "file", "directory" or another kind of thing; None where nothing is there.

    On a web server a page is a directory, that of its links.
    """
    fs, path = file_system(url)
    try:
        # Not fsspec's `exists` or `isdir`, to which a storage that fails is an empty one.
        info = patiently(lambda: fs.info(path), url)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return "directory" if info.get("mimetype") == "text/html" else str(info["type"])


def join(folder: str, name: str) -> str:
    """A file's address inside a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder; empty where the folder is missing."""
    fs, path = file_system(folder)
    if kind(folder) != "directory":
        return []
    names = patiently(lambda: fs.ls(path, detail=False), folder)
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in names)
