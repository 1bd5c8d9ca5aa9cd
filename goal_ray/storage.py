"""Files on any storage fsspec reaches. A file written here is visible only when complete."""

import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{32})\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")
ABANDONED_S = 3600.0
FEW = 100
PARALLEL_READS = 32


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path there. Remembers no listing: other processes write, too."""
    return url_to_fs(url, use_listings_cache=False)


def open_read(url: str) -> IO[bytes]:
    """Opens a file for reading; seekable, buffered. The caller closes it."""
    fs, path = file_system(url)
    return fs.open(path, "rb")


@contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only if the block succeeds.

    Local: a hidden temporary file beside it, synced, then renamed. Object stores show an object only after a complete
    upload, and the upload is discarded on an error.
    """
    fs, path = file_system(url)
    fs.makedirs(fs._parent(path), exist_ok=True)
    if isinstance(fs, LocalFileSystem):
        name = f".{os.path.basename(path)}.{process_place()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
        temporary = os.path.join(os.path.dirname(path), name)
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
        file.closed = True  # or it would be stored after all when Python frees it
        raise
    file.close()


@cache
def process_place() -> str:
    """What all processes share among which a process id means one process; never that of another machine."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return uuid.uuid5(uuid.UUID(boot), os.readlink("/proc/self/ns/pid")).hex
    except (OSError, ValueError):
        return uuid.uuid4().hex


def is_running(pid: int) -> bool:
    """Whether a process of this place runs; one that is dead but not yet buried does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def remove_abandoned(folder: str) -> None:
    """Deletes the hidden files that killed processes left in a local folder.

    They are those of a process of this machine that runs no more, and those of others that nobody wrote to for
    ABANDONED_S seconds. Object stores keep unfinished uploads out of sight; a rule of the bucket ends them.
    """
    fs, path = file_system(folder)
    if not isinstance(fs, LocalFileSystem) or not os.path.isdir(path):
        return
    for entry in os.scandir(path):
        if not (name := TEMPORARY.fullmatch(entry.name)):
            continue
        with suppress(FileNotFoundError):
            dead = name["place"] == process_place() and not is_running(int(name["pid"]))
            if dead or time.time() - entry.stat().st_mtime > ABANDONED_S:
                os.unlink(entry.path)


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
    fs, path = file_system(url)
    return int(fs.info(path)["size"])


def sizes_bytes(urls: Sequence[str]) -> dict[str, int]:
    """The lengths of files. Many of one folder are looked up in one listing of it."""
    folders: dict[str, list[str]] = {}
    for url in urls:
        folders.setdefault(url.rpartition("/")[0], []).append(url)
    sizes: dict[str, int] = {}
    for folder, inside in folders.items():
        if len(inside) > FEW:
            fs, path = file_system(folder)
            listed = {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in fs.ls(path, detail=True)}
            sizes |= {url: int(listed[name]) for url in inside if (name := url.rsplit("/", 1)[-1]) in listed}
    return {url: sizes[url] if url in sizes else size_bytes(url) for url in urls}


def read_all(urls: Sequence[str]) -> Iterator[bytes]:
    """The contents of small files, in order, several read at a time."""
    with ThreadPoolExecutor(PARALLEL_READS) as pool:
        yield from pool.map(read_bytes, urls)


def remove(url: str) -> None:
    """Deletes a file, if it is there."""
    fs, path = file_system(url)
    with suppress(FileNotFoundError):
        fs.rm_file(path)


def read_range(url: str, start: int, length: int) -> bytes:
    """Part of a file, by one request. Raises OSError where the file ends before the part does."""
    fs, path = file_system(url)
    if isinstance(fs, LocalFileSystem):  # fsspec takes several times as long
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(length)
    else:
        data = bytes(fs.cat_file(path, start=start, end=start + length))
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
    fs, path = file_system(url)
    return bool(fs.exists(path))


def join(folder: str, name: str) -> str:
    """A file's address inside a folder, local or remote."""
    return f"{str(folder).rstrip('/')}/{name}"


def list_names(folder: str) -> list[str]:
    """Sorted names of the files and folders directly inside a folder; empty where the folder is missing."""
    fs, path = file_system(folder)
    if not fs.isdir(path):
        return []
    return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, detail=False))
