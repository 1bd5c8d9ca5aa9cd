"""The shard contract: WebDataset tars of `KEY.{jpg,jpeg,png,webp}` + `KEY.txt` (+ `KEY.pairs.json` + anything else).

A member's name splits at the first dot of its base name, as in WebDataset: `a/b.c/img.pairs.json` has the key
`a/b.c/img` and the extension `pairs.json`. Members of one key stand side by side. Nothing is ever extracted to disk.
"""

import io
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import IO, Literal, Self

from goal_ray.atomic import open_atomic
from goal_ray.errors import CaptionError, ShardError
from goal_ray.storage import open_read

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
CAPTION_EXTENSION = "txt"
PAIRS_EXTENSION = "pairs.json"
LARGEST_MEMBER_BYTES = 2**30
TWO_PLACES = "the key stands at two places of the tar; put its members side by side, or rename one"
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
CORRUPT = "corrupt or truncated tar"
# What tarfile raises on a damaged tar; ValueError, where a number in an extended header makes no sense.
DAMAGE = (tarfile.TarError, EOFError, ValueError)


@dataclass(frozen=True)
class Sample:
    """One sample, its members in memory: `members` maps a lower-case extension to the bytes.

    `repeated` names extensions that stand more than once under the key; such a sample is ambiguous. `too_large` names
    the member with which the sample takes more than LARGEST_MEMBER_BYTES of the tar; neither it nor those behind it
    were read.
    """

    key: str
    members: dict[str, bytes]
    repeated: tuple[str, ...] = ()
    too_large: tuple[str, ...] = ()

    def check_sizes(self) -> None:
        """Raises ShardError where the sample is too large to be read."""
        if self.too_large:
            raise ShardError(
                f"sample {self.key!r} takes more than {LARGEST_MEMBER_BYTES} bytes, up to and with its member "
                f".{self.too_large[0]}; leave large members out"
            )

    def image_bytes(self) -> bytes:
        """The encoded picture. Raises ShardError unless exactly one picture is there."""
        self.check_sizes()
        return self.members[image_extension(self.key, self.members, self.repeated)]

    def caption(self) -> str:
        """The caption, exactly as stored. Raises CaptionError if missing, empty or not UTF-8."""
        self.check_sizes()
        if CAPTION_EXTENSION not in self.members:
            raise CaptionError(f"sample {self.key!r} has no .txt caption (members: {sorted(self.members)}); add one")
        if CAPTION_EXTENSION in self.repeated:
            raise CaptionError(f"sample {self.key!r} has more than one .txt caption; keep one")
        try:
            text = self.members[CAPTION_EXTENSION].decode("utf-8")
        except UnicodeDecodeError as error:
            raise CaptionError(f"caption of sample {self.key!r} is not UTF-8: {error}; re-encode it") from None
        if not text.strip("\ufeff \t\r\n"):
            raise CaptionError(f"caption of sample {self.key!r} is empty; write one")
        return text


def image_extension(key: str, extensions: Mapping[str, object], repeated: tuple[str, ...] = ()) -> str:
    """The extension of a sample's one picture. Raises ShardError where there is none, or more than one."""
    present = [extension for extension in IMAGE_EXTENSIONS if extension in extensions]
    if not present:
        wanted = "/".join(IMAGE_EXTENSIONS)
        raise ShardError(f"sample {key!r} has no picture ({wanted}; members: {sorted(extensions)}); add one")
    if len(present) > 1 or present[0] in repeated:
        raise ShardError(f"sample {key!r} has more than one picture ({present}); keep the one that the caption means")
    return present[0]


class Gathering:
    """A sample in the making. A member costs the same however many stand before it, and all together are bounded."""

    def __init__(self, key: str):
        self.key = key
        self._members: dict[str, bytes] = {}
        self._repeated: list[str] = []
        self._too_large: tuple[str, ...] = ()
        self._tar_bytes = 0

    def add(self, extension: str, size_bytes: int, read: Callable[[], bytes]) -> None:
        """Adds the next member; reads it, unless the sample is too large."""
        if self._too_large:
            return
        self._tar_bytes += tarfile.BLOCKSIZE + size_bytes
        if self._tar_bytes > LARGEST_MEMBER_BYTES:
            self._too_large = (extension,)
            return
        if extension in self._members:
            self._repeated.append(extension)
        self._members[extension] = read()

    def sample(self) -> Sample:
        """The sample."""
        return Sample(self.key, self._members, tuple(self._repeated), self._too_large)


def split_name(member_name: str) -> tuple[str, str] | None:
    """(key, lower-case extension) of a tar member, or None for a name that is no part of a sample."""
    folder, slash, base = member_name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or not extension:
        return None
    return folder + slash + stem, extension.lower()


@dataclass(frozen=True)
class Member:
    """A tar member and the sample it belongs to: `sample` counts from 0; -1 is a member of no sample."""

    info: tarfile.TarInfo
    sample: int
    key: str
    extension: str


class NotOneTar(tarfile.ReadError):
    """A file is whole, and all members up to its first end mark are, but it is not one plain tar."""


def describe_damage(error: BaseException) -> str:
    """What one of DAMAGE says about a tar."""
    return str(error) if isinstance(error, NotOneTar) else f"{CORRUPT}: {error}"


class _MarkedInfo(tarfile.TarInfo):
    """Notes on the tar that its end mark was read; `tarfile` itself takes a cut between two members for the end."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.saw_end_mark = True  # type: ignore[attr-defined]
            raise


def open_tar(file: IO[bytes], mode: Literal["r|", "r:"]) -> tarfile.TarFile:
    """Opens a tar for `iter_members`: `r|` reads it once from the front, `r:` seeks from header to header.

    Raises one of DAMAGE.
    """
    start = file.tell()
    try:
        return tarfile.open(fileobj=file, mode=mode, tarinfo=_MarkedInfo)
    except tarfile.ReadError:
        file.seek(start)
        magic = file.read(max(map(len, COMPRESSED)))
        programs = [program for known, program in COMPRESSED.items() if magic.startswith(known)]
        if not programs:
            raise
        raise NotOneTar(f"the tar is compressed; unpack it with {programs[0]}") from None


def iter_members(tar: tarfile.TarFile) -> Iterator[Member]:
    """The members of a tar from `open_tar` with their samples: the one place that says where a sample ends.

    Raises one of DAMAGE on damage, at the end of a tar that lacks its end mark, since it was cut short, and where
    another tar stands behind it, as `cat` leaves it.
    """
    sample, key = -1, None
    for info in tar:
        forget_members(tar)
        if info.size < 0:  # tarfile would come back to the same header again and again
            raise tarfile.ReadError(f"member {info.name!r} has {info.size} bytes")
        name = split_name(info.name)
        if not info.isreg() or name is None:
            yield Member(info, -1, "", "")
        else:
            if name[0] != key:
                sample, key = sample + 1, name[0]
            yield Member(info, sample, *name)
        _skip_data(tar)
    if not getattr(tar, "saw_end_mark", False):
        raise tarfile.ReadError("the end-of-archive mark is missing")
    if _tar_follows(tar):
        raise NotOneTar("another tar stands behind the end mark, which no reader sees; part them")


def forget_members(tar: tarfile.TarFile) -> None:
    """Frees the headers of all members so far, which tarfile keeps, half a kilobyte each."""
    tar.members.clear()  # type: ignore[attr-defined]


def _tar_follows(tar: tarfile.TarFile) -> bool:
    """Whether a member's header stands where one of a second tar would, behind the zeros that end the first.

    Zeros may follow without end, and some programs fill the last record with anything.
    """
    assert tar.fileobj is not None
    rest = tar.fileobj.read(tarfile.RECORDSIZE + 2 * tarfile.BLOCKSIZE)
    for start in range(0, len(rest), tarfile.BLOCKSIZE):
        block = rest[start : start + tarfile.BLOCKSIZE]
        if any(block):
            try:
                tarfile.TarInfo.frombuf(block, tar.encoding or "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                return False
            return True
    return False


def _skip_data(tar: tarfile.TarFile) -> None:
    """Goes to the end of the last member of a tar that is read from the front.

    tarfile itself, where a header claims more than the file holds, reads on behind its end, for as long as that takes.
    """
    if not isinstance(tar.fileobj, tarfile._Stream):  # type: ignore[attr-defined]
        return
    left = tar.offset - tar.fileobj.tell()
    while left > 0:
        skipped = len(tar.fileobj.read(min(left, tarfile.RECORDSIZE)))
        if not skipped:
            raise tarfile.ReadError("the last member reaches beyond the end of the file")
        left -= skipped


def read_member(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    """The bytes of a regular member. Raises tarfile.ReadError when the tar ends before them."""
    stream = tar.extractfile(info)
    assert stream is not None  # a regular file always has one
    data = stream.read()
    if len(data) != info.size:
        raise tarfile.ReadError(f"member {info.name!r} ends after {len(data)} of {info.size} bytes")
    return data


def sparse_problem(info: tarfile.TarInfo) -> str:
    """What is wrong with a sparse member: it can be streamed, but its bytes do not stand side by side."""
    return f"the member {info.name!r} is sparse; pack the tar without -S, or anew with `goal-ray shards make`"


def stream_samples(url: str, wanted: Callable[[int], bool] = lambda number: True) -> Iterator[Sample]:  # noqa: ARG005
    """The samples of one tar, in order, reading it once from front to back.

    wanted  asked with a sample's number, from 0, when its first member is met and all samples before it are yielded;
            a sample that is not wanted comes without members, and they are not held in memory

    Raises ShardError on a corrupt or truncated tar, after every sample that stands complete before the damage, and for
    two tars in one file, after those of the first. What a
    failing storage raises passes through: it says nothing against the tar.
    """
    current: Gathering | None = None
    number, reading = -1, False
    damage: BaseException | None = None
    with open_read(url) as file:
        try:
            with open_tar(file, "r|") as tar:
                for member in iter_members(tar):
                    if member.sample < 0:
                        continue
                    if member.sample != number:
                        if current is not None:
                            yield current.sample()
                        current, number = Gathering(member.key), member.sample
                        reading = wanted(number)
                    if reading:
                        assert current is not None
                        current.add(member.extension, member.info.size, partial(read_member, tar, member.info))
        except DAMAGE as error:
            damage = error
    if damage is not None and not isinstance(damage, NotOneTar):
        key = current.key if current is not None else ""
        last = f"; its last sample, {key!r}, may be incomplete" if key else ""
        raise ShardError(f"{url}: {describe_damage(damage)}{last}", key)
    if current is not None:
        yield current.sample()
    if damage is not None:
        raise ShardError(f"{url}: {describe_damage(damage)}")


def write_tar(url: str, samples: Iterator[tuple[str, Mapping[str, bytes]]]) -> int:
    """Writes samples, (key, extension -> bytes), as one tar; same samples, same bytes. Returns how many."""
    with open_atomic(url) as file:
        return write_samples(file, samples)


def write_samples(file: IO[bytes], samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> int:
    """As `write_tar`, into an open file."""
    count = 0
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for key, members in samples:
            for extension, data in members.items():
                tar.addfile(member_info(f"{key}.{extension}", len(data)), io.BytesIO(data))
            forget_members(tar)
            count += 1
    return count


def stored_bytes(key: str, members: Mapping[str, bytes]) -> int:
    """How many bytes a sample takes in a tar of `write_samples`, headers and padding included."""
    sizes = {f"{key}.{extension}": len(data) for extension, data in members.items()}
    headers = sum(len(member_info(name, size).tobuf(tarfile.GNU_FORMAT)) for name, size in sizes.items())
    return headers + sum(map(padded_bytes, sizes.values()))


def end_mark(content_bytes: int) -> bytes:
    """The zeros that end a tar of so many bytes of members: two blocks, and what fills the last record."""
    whole = -(-(content_bytes + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    return bytes(whole - content_bytes)


def padded_bytes(size_bytes: int) -> int:
    """What a member of so many bytes takes in a tar, its header not counted."""
    return -(-size_bytes // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def member_info(name: str, size_bytes: int) -> tarfile.TarInfo:
    """A tar header without time, owner or machine in it, so that equal content gives equal bytes."""
    info = tarfile.TarInfo(name)
    info.size = size_bytes
    info.mode = 0o644
    return info
