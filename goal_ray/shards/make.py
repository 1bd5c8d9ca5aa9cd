"""Shards from a source of pictures and captions. Interrupted and begun again, the bytes come out the same.

OUT/NAME-000000.tar, …        the shards, each renamed into place when complete
OUT/skipped.jsonl             written at the end: everything in the source that became no sample, and why
OUT/make.json                 what the folder is made of
OUT/done/NAME-000000.json     where in the source the shard ends, and counts; .keys its keys' hashes, .skipped.jsonl
                              its part of skipped.jsonl; these are there before their tar is
"""

import errno
import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import IO

from goal_ray.atomic import open_atomic, remove_abandoned, write_bytes
from goal_ray.claim import claim_folder
from goal_ray.errors import ConfigError, StageError
from goal_ray.progress import Progress
from goal_ray.shard_urls import shard_name
from goal_ray.shards.keys import HASH_BYTES, KeySet, key_hash
from goal_ray.shards.outcomes import Outcome, Place, read_outcomes
from goal_ray.shards.output import refuse_overlap, shards_called, tar_name
from goal_ray.shards.sources.candidate import Candidate, Unusable
from goal_ray.shards.sources.detect import SourceSettings, open_source
from goal_ray.storage import exists, join, open_read, read_bytes, sizes_bytes
from goal_ray.tars import end_mark, stored_bytes, write_samples

SETTINGS_FILE = "make.json"
SKIPPED_FILE = "skipped.jsonl"
_FIRST_UNREADABLE = 100


@dataclass(frozen=True)
class ShardSize:
    """A shard is full at so many samples, or when the next one would make the tar larger than so many bytes."""

    samples: int = 1000
    size_bytes: int = 1_000_000_000

    def __post_init__(self) -> None:
        if self.samples < 1 or self.size_bytes < 1:
            raise ConfigError("--samples-per-shard and --max-shard-bytes must be at least 1")


@dataclass
class Made:
    """What became of a stretch of the source: its end, samples, and what was skipped, by kind."""

    end: Place = field(default_factory=Place)
    samples: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    exhausted: bool = False


@dataclass
class Ledger:
    """A shard in the making: what came of it, its keys, its lines of skipped.jsonl, and what had no room in it."""

    made: Made
    lines: IO[bytes]
    hashes: list[bytes] = field(default_factory=list)
    left_over: list[Outcome] = field(default_factory=list)

    def skip(self, candidate: Candidate, why: Unusable) -> None:
        """Counts and lists a candidate that is no sample."""
        self.made.skipped[why.kind] += 1
        record = {"key": candidate.key, "source": candidate.origin, "kind": why.kind, "reason": str(why)}
        # Names that are not UTF-8 stand in it as JSON's own escapes.
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        with naming(tempfile.gettempdir()):
            self.lines.write(line)


@dataclass(frozen=True)
class OutputFolder:
    """The output folder, on any storage."""

    url: str
    name: str

    def tar(self, number: int) -> str:
        """The address of a shard."""
        return join(self.url, tar_name(self.name, number))

    def _done(self, number: int, suffix: str) -> str:
        return join(self.url, f"done/{self.name}-{number:06d}.{suffix}")

    def finished(self, number: int, seen: KeySet) -> Made | None:
        """What a shard holds, if it is complete; then its keys are put among those that were seen."""
        if not exists(self._done(number, "json")):
            return None
        tree = json.loads(read_bytes(self._done(number, "json")))
        made = Made(Place(**tree["end"]), tree["samples"], Counter(tree["skipped"]), tree["exhausted"])
        if made.samples and not exists(self.tar(number)):
            return None
        packed = read_bytes(self._done(number, "keys"))
        seen.add(packed[start : start + HASH_BYTES] for start in range(0, len(packed), HASH_BYTES))
        return made

    def record(self, number: int, ledger: Ledger) -> None:
        """Writes what is to be known of a shard beside its tar."""
        with naming(tempfile.gettempdir()):
            ledger.lines.seek(0)
        with open_atomic(self._done(number, SKIPPED_FILE)) as file:
            shutil.copyfileobj(ledger.lines, file)
        write_bytes(self._done(number, "keys"), b"".join(ledger.hashes))
        tree = {**vars(ledger.made), "end": asdict(ledger.made.end)}
        write_bytes(self._done(number, "json"), json.dumps(tree).encode())

    def list_skipped(self, shards: int) -> None:
        """Puts all that was skipped into one file."""
        url = join(self.url, SKIPPED_FILE)
        with naming(url), open_atomic(url) as file:
            for number in range(shards):
                with open_read(self._done(number, SKIPPED_FILE)) as part:
                    shutil.copyfileobj(part, file)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Names what had no room on a disk: the error of a write to an open file does not."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            raise OSError(error.errno, error.strerror, path) from error
        raise


def make_shards(settings: SourceSettings, out: str, name: str | None, size: ShardSize) -> tuple[Made, int]:
    """Makes the shards that `out` lacks. Returns what became of the whole source, and how many tars there are.

    name  shards are called NAME-000000.tar, …; None for the last part of `out`

    Raises StageError for an unusable source, or a folder begun with other settings; OSError where a storage fails.
    """
    kind, source = open_source(settings)
    refuse_overlap(out, [settings.place, *source.parts])
    folder = OutputFolder(out, shards_called(name, out))
    sizes = {} if source.in_folders else sizes_bytes(source.parts)
    parts = [[shard_name(part), sizes.get(part)] for part in source.parts]
    claim_folder(
        out, SETTINGS_FILE, {**asdict(settings), "kind": kind, "name": folder.name, **asdict(size), "parts": parts}
    )
    remove_abandoned(join(out, "done"))
    seen, total, number, tars = KeySet(), Made(), 0, 0
    outcomes: Iterator[Outcome] | None = None
    left_over: list[Outcome] = []
    with Progress("make", "sample") as progress:
        while not total.exhausted:
            made = folder.finished(number, seen)
            if made is None:
                outcomes = outcomes or read_outcomes(source, total.end, seen)
                ledger = make_shard(folder, number, chain(left_over, outcomes), seen, size, progress)
                made, left_over = ledger.made, ledger.left_over
            else:
                outcomes, left_over = None, []
                progress.add(made.samples)
            total = Made(made.end, total.samples + made.samples, total.skipped + made.skipped, made.exhausted)
            progress.add(0, f"{total.skipped.total():,} skipped")
            number, tars = number + 1, tars + (made.samples > 0)
    folder.list_skipped(number)
    if not total.samples:
        raise StageError(f"{settings.place}: no sample in it; {join(out, SKIPPED_FILE)} tells of all that was found")
    return total, tars


def make_shard(
    folder: OutputFolder, number: int, outcomes: Iterator[Outcome], seen: KeySet, size: ShardSize, progress: Progress
) -> Ledger:
    """Writes one shard from the next outcomes; no tar where they hold no sample."""
    with tempfile.TemporaryFile() as lines, naming(folder.tar(number)):
        ledger = Ledger(Made(), lines)
        samples = fill(ledger, outcomes, seen, size, progress)
        first = next(samples, None)
        if first is None:
            folder.record(number, ledger)
        else:
            with open_atomic(folder.tar(number)) as file:
                write_samples(file, chain([first], samples))
                # Before the tar appears, so that one that is there need never be written again.
                folder.record(number, ledger)
    return ledger


def fill(
    ledger: Ledger, outcomes: Iterator[Outcome], seen: KeySet, size: ShardSize, progress: Progress
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of one shard until it is full; the ledger tells what became of everything on the way."""
    made, content_bytes = ledger.made, 0
    for outcome in outcomes:
        key, verdict = outcome.candidate.key, outcome.verdict(seen)
        if isinstance(verdict, Unusable):
            ledger.skip(outcome.candidate, verdict)
            if made.skipped["unreadable"] == _FIRST_UNREADABLE and not len(seen):
                raise StageError(
                    f"none of the first {_FIRST_UNREADABLE} pictures can be read; one of them: {verdict}; "
                    "relative paths start from the list's folder, or from --images"
                )
        else:
            stored = stored_bytes(key, verdict)
            if made.samples and content_bytes + stored + len(end_mark(content_bytes + stored)) > size.size_bytes:
                ledger.left_over.append(outcome)
                return
            content_bytes += stored
            made.samples += 1
            ledger.hashes.append(key_hash(key))
            seen.add(ledger.hashes[-1:])
            progress.add(1)
            yield key, verdict
        made.end = outcome.after
        if made.samples == size.samples:
            return
    made.exhausted = True
