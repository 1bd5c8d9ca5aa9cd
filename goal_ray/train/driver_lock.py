"""One driver at a time in a run folder: RUN/driver.json names it while it lives, and workers see by it that they share
the folder with it.
"""

import json
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from goal_ray.atomic import is_running, process_place
from goal_ray.errors import StageError
from goal_ray.run_folder import DRIVER_FILE

REFRESH_S = 5.0
FRESH_S = 30.0
SEEN_S = 60.0  # as long as a network file system may show a folder as it was
LOOK_S = 0.5


@dataclass(frozen=True)
class DriverLock:
    """What a driver wrote into its run's folder; it goes to the workers as it is."""

    path: Path
    text: str

    def check_held(self) -> None:
        """Raises StageError where another driver has taken the run over, as after a pause of this machine."""
        with suppress(OSError):  # a storage that is away for a moment
            found = read(self.path)
            if found not in (None, self.text):
                raise StageError(f"{self.path.parent}: taken over by {describe(found)}; this driver ends")

    def check_seen(self) -> None:
        """Raises StageError where this process, a worker's, sees another folder than the driver does."""
        until = time.monotonic() + SEEN_S
        while (wrong := self._difference()) is not None:
            if time.monotonic() > until:
                raise not_shared(self.path.parent, f"on {platform.node()}, a worker's node, {self.path.name} {wrong}")
            time.sleep(LOOK_S)

    def _difference(self) -> str | None:
        try:
            found = read(self.path)
        except OSError as error:
            return f"cannot be read: {error}"
        return None if found == self.text else "is not there" if found is None else "is another driver's"


def not_shared(run_dir: Path, sign: str) -> StageError:
    """For a run folder that driver and workers do not share; `sign` says how that was seen."""
    return StageError(
        f"storage_path: {run_dir} is not one folder for the driver and all workers ({sign}); set storage_path to the "
        "absolute path of a folder that all nodes share; a path inside a job's working folder is a copy on every node"
    )


@contextmanager
def driver_lock(run_dir: Path, say: Callable[[str], None]) -> Iterator[DriverLock]:
    """Makes a run's folder this driver's within the block.

    A folder made for it goes again if nothing else comes into it. Raises StageError where another driver is at work in
    it. A driver that was killed holds nothing: not for a moment on this machine, elsewhere FRESH_S seconds at most.
    """
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    path = run_dir / DRIVER_FILE
    try:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock = DriverLock(path, take(path, say))
        except OSError as error:
            raise StageError(f"storage_path: {path} cannot be written: {error}; mend it, or choose another") from None
        ended = threading.Event()
        threading.Thread(target=refresh, args=(lock, ended), name="driver-lock", daemon=True).start()
        try:
            yield lock
        finally:
            ended.set()
            with suppress(OSError):
                if read(path) == lock.text:
                    path.unlink()
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def take(path: Path, say: Callable[[str], None]) -> str:
    """Writes a driver's file, which no living driver may have. Returns its text."""
    own = {"place": process_place(), "pid": os.getpid(), "started": started(os.getpid()), "host": platform.node()}
    text = json.dumps({**own, "id": uuid.uuid4().hex})
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            refuse_living(path, say)
            path.unlink(missing_ok=True)
        except OSError:
            with suppress(OSError):
                path.unlink()  # empty for want of room, it would be taken for another machine's
            raise
        else:
            return text


def refuse_living(path: Path, say: Callable[[str], None]) -> None:
    """Raises StageError where the driver that a file names lives."""
    found = read(path)
    if found is None:
        return
    owner = parsed(found)
    if owner.get("place") == process_place():
        # A container that starts again may have the process ids of the one before.
        alive = is_running(owner["pid"]) and started(owner["pid"]) == owner["started"]
    else:
        say(f"{path.parent} may be in use by {describe(found)}; looking for {FRESH_S:.0f} s whether that is alive")
        alive = is_refreshed(path)
    if alive:
        raise StageError(
            f"{path.parent} is in use by {describe(read(path) or found)}; wait for its end, or end it with `kill`, or "
            "`ray job stop` where it is a job, then go on with --resume; or choose another name"
        )


def is_refreshed(path: Path) -> bool:
    """Whether the driver of another machine still refreshes its file. The machines' clocks may differ."""
    until, before = time.monotonic() + FRESH_S, mark(path)
    while time.monotonic() < until:
        time.sleep(LOOK_S)
        if (now := mark(path)) != before:
            return now is not None
    return False


def refresh(lock: DriverLock, ended: threading.Event) -> None:
    """Shows that the driver lives, until it ends."""
    while not ended.wait(REFRESH_S):
        with suppress(OSError):
            if read(lock.path) == lock.text:
                os.utime(lock.path)


def mark(path: Path) -> tuple[int, str] | None:
    """What a refresh changes; None where the file is gone."""
    try:
        with path.open(encoding="utf-8") as file:  # opened: network file systems look up the time then
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None


def read(path: Path) -> str | None:
    """The file's text; None where it is gone."""
    found = mark(path)
    return None if found is None else found[1]


def parsed(text: str) -> dict[str, Any]:
    """Who wrote the file; empty where it was torn."""
    try:
        return dict(json.loads(text))
    except ValueError:
        return {}


def describe(text: str) -> str:
    """Who wrote the file, for people."""
    owner = parsed(text)
    return f"another driver (process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')})"


def started(pid: int) -> str:
    """When a process of this place started; empty where it does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""
