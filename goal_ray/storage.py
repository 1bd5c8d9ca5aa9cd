"""Files on any storage fsspec reaches. A file written here is visible only when complete.

A storage that fails for a while is asked again, for GOAL_RAY_STORAGE_PATIENCE_S seconds (600) each time: a remote one
for what is read, listed or deleted, any for a whole file that is written (`write_bytes`). What is written bit by bit
(`open_atomic`) is not repeated here: where it fails, running the same command again goes on. What fails for good (no
such file, no rights, no room, refused by a server) is raised at once.
"""

import errno
import io
import logging
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path
from threading import Event
from typing import IO, Any, TypeVar

import tenacity
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from goal_ray.errors import ConfigError, ShardError

TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{32})\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")
ABANDONED_S = 3600.0
FEW = 100
PARALLEL_READS = 32
READ_BYTES = 1 << 20
PATIENCE_S = float(os.environ.get("GOAL_RAY_STORAGE_PATIENCE_S", "600"))
LASTING_NUMBERS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.EOPNOTSUPP),
)
NETWORK_LIBRARIES = (
    "aiohttp",
    "botocore",
    "gcsfs",
    "google",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "urllib3",
)
PASSING_REFUSALS = (408, 425, 429)  # too slow, too early, too many requests
# What storages tell of a file that is another one when it is replaced, the surest first.
VERSIONS = ("generation", "ETag", "etag", "mtime", "LastModified", "last_modified", "Last-Modified")
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "tos", "hf"}
NAME_CHARS = 40  # of 4 bytes at most: with what a temporary name adds they fit into the 255 bytes of a name
Result = TypeVar("Result")
log = logging.getLogger(__name__)
_at_most_s: ContextVar[float] = ContextVar("_at_most_s", default=math.inf)
_over: ContextVar[Event] = ContextVar("_over", default=Event())  # noqa: B039 (nobody sets the default)


class FileReplaced(OSError):
    """A file is another one than when its reading began."""


LASTING = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    FileReplaced,
)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if is_refused(error):
        return False
    if isinstance(error, OSError):
        return not isinstance(error, LASTING) and error.errno not in LASTING_NUMBERS
    lasting = isinstance(error, ValueError) or re.search("Credential|Validation", type(error).__name__)
    return is_storage_error(error) and not lasting


def is_storage_error(error: BaseException) -> bool:
    """Whether a network library raised it, whose errors are no OSErrors."""
    return type(error).__module__.partition(".")[0] in NETWORK_LIBRARIES


def is_refused(error: BaseException) -> bool:
    """Whether a network library raised it for a server's answer that stays the same (HTTP 4xx, but for a few)."""
    answer = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(answer, "status_code", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in PASSING_REFUSALS
    return refused and is_storage_error(error)


def patiently(request: Callable[[], Result], url: str) -> Result:
    """What a request to a storage returns, asked again while it fails with what may pass; raises what lasts.

    The pauses are random and grow to half a minute, so that a thousand workers do not come back at the same moment.
    """
    patience_s, over = min(PATIENCE_S, _at_most_s.get()), _over.get()

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        left_s = max(0.0, patience_s - (state.seconds_since_start or 0))
        log.warning("%s: %s: %s; trying again for %.0f s", url, type(error).__name__, error, left_s)

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=30),
        stop=tenacity.stop_any(tenacity.stop_after_delay(patience_s), tenacity.stop_when_event_set(over)),
        sleep=tenacity.sleep_using_event(over),
        before_sleep=say,
        reraise=True,
    )(request)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """A block that can do without what it asks for: its requests, in this thread, are repeated for so long at most."""
    token = _at_most_s.set(seconds)
    try:
        yield
    finally:
        _at_most_s.reset(token)


@contextmanager
def threads(number: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for requests. Where the block ends, those that wait for a failing storage give up, and no more begin."""
    over = Event()
    pool = ThreadPoolExecutor(number, initializer=_over.set, initargs=(over,))
    try:
        yield pool
    finally:
        over.set()
        pool.shutdown(cancel_futures=True)


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


@contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only if the block succeeds.

    A hidden temporary file beside it, on a local disk synced, is moved into place. Object stores show an object only
    after a complete upload, and the upload is discarded on an error. A device or a pipe is written as it is; of a link,
    the file it leads to is replaced. Raises ConfigError for a storage that takes no files.
    """
    fs, path = file_system(url)
    local = isinstance(fs, LocalFileSystem)
    if local and os.path.exists(path) and not os.path.isfile(path):
        with open(path, "wb") as file:
            yield file
        return
    path = os.path.realpath(path) if local else path
    object_store = bool(OBJECT_STORES.intersection(protocols(fs)))
    if not object_store:  # s3fs would make a bucket
        fs.makedirs(fs._parent(path), exist_ok=True)
    temporary = temporary_beside(path)
    if local:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
    elif object_store:
        file = fs.open(path, "wb")
        with undone_on_error(partial(_discard, file), url):
            yield file
            try:
                file.close()
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    errno.ENOENT, f"{error}; make the bucket first, or mend its name", url
                ) from None
    else:
        try:
            file = fs.open(temporary, "wb")
        except NotImplementedError:
            raise ConfigError(f"{url}: no files can be written there; use a disk or an object store") from None
        with undone_on_error(partial(_remove_written, fs, file, temporary), url):
            yield file
            file.close()
            if fs.exists(path):  # not every storage moves a file to where one is
                fs.rm_file(path)
            fs.mv(temporary, path)


def temporary_beside(path: str) -> str:
    """A hidden name of its own, TEMPORARY, in the folder of a file."""
    folder, slash, base = path.rpartition("/")
    return f"{folder}{slash}.{base[:NAME_CHARS]}.{process_place()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"


@contextmanager
def undone_on_error(undo: Callable[[], object], url: str) -> Iterator[None]:
    """Calls `undo` where the block fails. The block's error is raised, whether or not undoing fails as well."""
    try:
        yield
    except BaseException:
        try:
            undo()
        except Exception as error:
            log.warning("%s: what was half written could not be removed: %s: %s", url, type(error).__name__, error)
        raise


def _discard(file: Any) -> None:
    try:
        file.discard()
    finally:
        file.closed = True  # or it would be stored after all when Python frees it


def _remove_written(fs: Any, file: Any, path: str) -> None:
    try:
        file.close()
    finally:
        fs.rm_file(path)


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

    def write() -> None:
        with open_atomic(url) as file:
            file.write(data)

    patiently(write, url)


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
