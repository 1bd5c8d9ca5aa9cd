"""A candidate for a sample, as every kind of source yields it, and what can be wrong with one."""

import errno
import math
import os
import socket
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol

import pydantic_core
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from goal_ray.errors import StageError
from goal_ray.patience import is_refused, may_pass, patiently
from goal_ray.storage import protocols

Kind = Literal[
    "bad caption",
    "bad key",
    "bad row",
    "damaged tar",
    "duplicate key",
    "failed download",
    "no caption",
    "no picture",
    "not a picture",
    "repeated members",
    "too large",
    "unreadable",
]


class Unusable(Exception):
    """Why a candidate becomes no sample: `kind` is counted, the message is listed."""

    def __init__(self, kind: Kind, reason: str):
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Found:
    """What a source holds for a sample: the picture's bytes, the caption's (None: there is none), other members."""

    picture: bytes
    caption: bytes | None
    others: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """Something in a source that may be a sample.

    origin    where it stands, for people: file, or file and row
    content   reads it, in a thread, or raises Unusable; or why it is known to be no sample
    repeated  what to say where a sample before it has its key
    """

    key: str
    origin: str
    content: Callable[[], Found] | Unusable
    repeated: str = "a sample before it has this key"


class Source(Protocol):
    """A source in parts, each of which can be read without the others.

    in_folders  whether the parts are folders, not files
    """

    in_folders: bool

    @property
    def parts(self) -> Sequence[str]:
        """Addresses of the parts, in order."""

    def candidates(self, part: str) -> Iterator[Candidate]:
        """The candidates of a part, the same ones in the same order each time."""


def tar_key(path: str) -> str:
    """A key for a path without its suffix: dots of the base name, which would end the key, are written `%2E`.

    Different paths have different keys, apart from what is dropped: `s3://` and its like, `/` at the start, and empty
    parts, `.` and `..`.
    """
    parts = [part for part in path.partition("://")[2 * ("://" in path)].split("/") if part not in ("", ".", "..")]
    *folders, base = parts or [""]
    return "/".join([*folders, base.replace("%", "%25").replace(".", "%2E")])


def stem_and_suffix(path: str) -> tuple[str, str]:
    """A path without its suffix, and the suffix in lower case without its dot: `a.b/c.d.JPG` -> `a.b/c.d`, `jpg`."""
    folder, slash, base = path.rpartition("/")
    stem, dot, suffix = base.rpartition(".")
    return (folder + slash + stem, suffix.lower()) if dot and stem else (path, "")


def read_file(fs: AbstractFileSystem, path: str, what: str) -> bytes:
    """The bytes of a file. Raises Unusable for a file that cannot be had; a failing storage's error passes through."""
    read = partial(cat_file, fs, path)
    local = isinstance(fs, LocalFileSystem)
    web = "http" in protocols(fs)
    try:
        data = read() if local else patiently(read, fs.unstrip_protocol(path))
        if web:
            _WEB.answered = fs, path
        return data
    except Exception as error:
        if isinstance(error, PermissionError) and not local:
            # Of credentials that expired: it says nothing against the file.
            raise PermissionError(
                f"{fs.unstrip_protocol(path)}: access is refused: {error}; renew the credentials, or allow listing, "
                "since S3 says the same of what is missing; then run the same command again"
            ) from error
        if not is_missing(error) and not (web and (is_refused(error) or (may_pass(error) and _WEB.answers()))):
            raise
        problem = error
    raise Unusable("unreadable", f"the {what} cannot be read: {type(problem).__name__}: {problem}")


class _Web:
    """Tells an address that is bad for good from a network that is down: then the last one that answered is, too.

    answered  that one; it is set and read whole, by threads
    """

    answered: tuple[AbstractFileSystem, str] | None = None

    def answers(self) -> bool:
        """Whether that address answers now."""
        answered = self.answered
        if answered is None:
            return False
        try:
            answered[0].cat_file(answered[1])
        except Exception as error:
            return is_refused(error)
        return True


_WEB = _Web()


def cat_file(fs: AbstractFileSystem, path: str) -> bytes:
    """One request for a file. Raises FileNotFoundError for a web address that no repeating will mend.

    Raises ValueError for what is no file although a local folder lists it: a pipe would never end.
    """
    if isinstance(fs, LocalFileSystem) and stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
        raise ValueError("a pipe, socket or device, not a file")
    try:
        return bytes(fs.cat_file(path))
    except Exception as error:
        if "http" in protocols(fs) and is_lasting(error):
            raise FileNotFoundError(f"{type(error).__name__}: {error}") from None
        raise


def is_lasting(error: Exception) -> bool:
    """Whether an error that looks like a network's says that this web address is bad: its host, certificate, or way."""
    if type(error).__name__ in ("ClientConnectorCertificateError", "TooManyRedirects"):
        return True
    return isinstance(error, OSError) and error.errno == socket.EAI_NONAME


def is_missing(error: Exception) -> bool:
    """Whether the error says that no file can be read at this path, whatever becomes of its storage."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
    numbers = (errno.ENAMETOOLONG, errno.ELOOP)
    return isinstance(error, kinds) or (isinstance(error, OSError) and error.errno in numbers)


def caption_text(value: Any) -> str | None:
    """A caption as a list or a COCO file holds it, as text; None for none. Raises Unusable for what is no caption."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise Unusable("bad caption", f"the caption is no text but a value of type {type(value).__name__}")


def one_caption(captions: Sequence[str], several: Literal["join", "first"]) -> bytes | None:
    """The caption of a picture that has any number of them; None where none says anything.

    Joined captions keep their order; a full stop is put behind those that end without a sign, so that sentences stay
    apart. A single caption stays exactly as it is.
    """
    told = [caption for caption in captions if caption.strip()]
    if not told:
        return None
    text = told[0]
    if several == "join" and len(told) > 1:
        stripped = [caption.strip() for caption in told]
        text = " ".join(caption if caption[-1] in ".!?…。！？\"'”’»)" else f"{caption}." for caption in stripped)
    return text.encode("utf-8", "surrogatepass")


def fields_json(fields: Mapping[str, Any]) -> dict[str, bytes]:
    """The other fields of a record as the member KEY.json; no member for no fields."""
    if not fields:
        return {}
    try:
        return {"json": pydantic_core.to_json(dict(fields), bytes_mode="base64", inf_nan_mode="null")}
    except pydantic_core.PydanticSerializationError as error:
        raise Unusable("bad row", f"the other fields cannot be written as JSON: {error}") from None


def choose_column(columns: Sequence[str], wanted: str | None, known: Sequence[str], what: str, list_url: str) -> str:
    """The column that holds `what`: the wanted one, or else the only one of a known name.

    Raises StageError that names the columns that are there.
    """
    there = f"the columns are {', '.join(map(repr, columns))}"
    option = f"--{what}-column"
    if wanted is not None:
        if wanted not in columns:
            raise StageError(f"{list_url}: no column {wanted!r} for {option}; {there}")
        return wanted
    found = [name for name in columns if name.lower() in known]
    if len(found) != 1:
        problem = f"several columns may hold the {what}: {', '.join(found)}" if found else f"no known {what} column"
        raise StageError(f"{list_url}: {problem}; name it with {option}; {there}")
    return found[0]
