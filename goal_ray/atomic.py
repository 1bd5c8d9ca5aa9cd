"""Files on any storage fsspec reaches that are visible only when complete.

A whole file (`write_bytes`) is written again where its storage fails for a while. What is written bit by bit
(`open_atomic`) is not: where it fails, running the same command again goes on.
"""

import errno
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from goal_ray.errors import ConfigError
from goal_ray.patience import patiently
from goal_ray.storage import OBJECT_STORES, file_system, protocols

TEMPORARY = re.compile(r"\..+\.(?P<place>[0-9a-f]{32})\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp")
ABANDONED_S = 3600.0
NAME_CHARS = 40  # of 4 bytes at most: with what a temporary name adds they fit into the 255 bytes of a name
log = logging.getLogger(__name__)


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
