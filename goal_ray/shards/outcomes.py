"""Reading what a source holds: every candidate, in order, becomes members of a sample or the reason why it is none."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from goal_ray.ahead import read_ahead
from goal_ray.errors import CaptionError, StageError
from goal_ray.images import EXTENSIONS, format_name
from goal_ray.shards.keys import KeySet
from goal_ray.shards.sources.candidate import Candidate, Found, Source, Unusable
from goal_ray.tars import CAPTION_EXTENSION, Sample, split_name

_AHEAD = 64
Content = dict[str, bytes] | Unusable


@dataclass(frozen=True)
class Place:
    """A place in a source: so many candidates of a part are behind it; the last one's key tells a changed source."""

    part: int = 0
    candidates: int = 0
    last_key: str = ""


class Outcome(NamedTuple):
    """A candidate, the place behind it, and what came of reading it: nothing where its key had been seen."""

    candidate: Candidate
    after: Place
    content: Content | None

    def verdict(self, seen: KeySet) -> Content:
        """The members, or why it is no sample; the same however far ahead the threads had read."""
        if isinstance(self.candidate.content, Unusable):
            return self.candidate.content
        if self.candidate.key in seen:
            return Unusable("duplicate key", self.candidate.repeated)
        assert self.content is not None
        return self.content


def read_outcomes(source: Source, start: Place, seen: KeySet) -> Iterator[Outcome]:
    """The candidates from a place on, in order, read by threads somewhat ahead; those whose keys were seen are not."""
    found = candidates_from(source, start)
    return read_ahead(read_outcome, ((candidate, after, candidate.key in seen) for candidate, after in found), _AHEAD)


def read_outcome(item: tuple[Candidate, Place, bool]) -> Outcome:
    """What comes of one candidate."""
    candidate, after, known = item
    load = candidate.content
    content = None if known or isinstance(load, Unusable) else read_sample(candidate.key, load)
    return Outcome(candidate, after, content)


def candidates_from(source: Source, start: Place) -> Iterator[tuple[Candidate, Place]]:
    """The candidates behind a place, each with the place behind itself. Raises StageError for a changed source."""
    for part in range(start.part, len(source.parts)):
        candidates = source.candidates(source.parts[part])
        skip = start.candidates if part == start.part else 0
        behind = list(deque(islice(candidates, skip), maxlen=1))
        if skip and (not behind or behind[0].key != start.last_key):
            raise StageError(
                f"{source.parts[part]}: changed since these shards were begun; delete them or use another OUT"
            )
        for number, candidate in enumerate(candidates, skip + 1):
            yield candidate, Place(part, number, candidate.key)


def read_sample(key: str, load: Callable[[], Found]) -> Content:
    """The members of a sample, its picture named for what it holds; or why it is none."""
    try:
        found = load()
        check_key(key)
        name = format_name(found.picture)
        if name is None:
            problem = (
                f"not JPEG, PNG or WebP: it starts with {found.picture[:8]!r}" if found.picture else "0 bytes long"
            )
            raise Unusable("not a picture", f"the picture is {problem}")
        if found.caption is None:
            raise Unusable("no caption", "no caption, or nothing in it")
        members = {EXTENSIONS[name]: found.picture, CAPTION_EXTENSION: found.caption, **found.others}
        Sample(key, members).caption()
    except CaptionError as error:
        return Unusable("bad caption", str(error))
    except Unusable as why:
        return why
    return members


def check_key(key: str) -> None:
    """Raises Unusable for a key that no tar can hold, or that would be read as another."""
    try:
        key.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise Unusable("bad key", f"the key {key!r} cannot be stored: {error.reason}") from None
    if (
        not key.rpartition("/")[2]
        or "\0" in key
        or split_name(f"{key}.{CAPTION_EXTENSION}") != (key, CAPTION_EXTENSION)
    ):
        raise Unusable("bad key", f"{key!r} cannot be a key: it must not be empty, and without dots behind the last /")
