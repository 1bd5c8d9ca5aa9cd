"""Which samples of the shards can be trained on, from the tars' headers alone. No torch here: it runs in many tasks."""

from collections.abc import Sequence
from functools import lru_cache

from goal_ray.errors import ShardError
from goal_ray.storage import open_read
from goal_ray.tars import (
    CAPTION_EXTENSION,
    PAIRS_EXTENSION,
    Sample,
    SampleIndex,
    image_extension,
    index_shard,
)

QUARANTINE_FILE = "quarantine.jsonl"


@lru_cache(maxsize=64)
def scan_shard(url: str, needs_pairs: bool) -> tuple[list[SampleIndex], list[dict[str, str]]]:
    """The usable samples of a tar and the records of the others.

    Raises ShardError on a corrupt tar.
    """
    usable, bad = [], []
    needed = [CAPTION_EXTENSION, *([PAIRS_EXTENSION] if needs_pairs else [])]
    for sample in index_shard(url):
        try:
            image_extension(sample.key, sample.members, sample.repeated)
            for extension in needed:
                if extension not in sample.members or extension in sample.repeated:
                    remedy = "; run `goal-ray lism` on these shards" if extension == PAIRS_EXTENSION else ""
                    raise ShardError(f"sample {sample.key!r} needs exactly one .{extension} member{remedy}")
        except ShardError as error:
            bad.append(bad_record(url, sample.key, "scan", error))
        else:
            usable.append(sample)
    return usable, bad


def bad_record(url: str, key: str, stage: str, error: Exception) -> dict[str, str]:
    """The quarantine's record of one sample."""
    return {"shard": url, "key": key, "stage": stage, "reason": f"{type(error).__name__}: {error}"}


def describe_bad(record: dict[str, str]) -> str:
    """A quarantine record on one line."""
    return f"{record['shard']}: {record['key']!r}: {record['reason']}"


def scan_shards(urls: Sequence[str], needs_pairs: bool) -> tuple[list[int], list[dict[str, str]]]:
    """Usable samples per tar and the records of all unusable ones; the tars are scanned in parallel, on Ray.

    Raises ShardError on a corrupt tar.
    """
    import ray

    @ray.remote
    def scan(url: str) -> tuple[int, list[dict[str, str]]]:
        usable, bad = scan_shard(url, needs_pairs)
        return len(usable), bad

    try:
        results = ray.get([scan.remote(url) for url in urls])
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return [count for count, _ in results], [record for _, records in results for record in records]


def read_sample(url: str, entry: SampleIndex) -> Sample:
    """Reads the members that training uses, and no others."""
    picture = image_extension(entry.key, entry.members, entry.repeated)
    members = {}
    with open_read(url) as file:
        for extension in (picture, CAPTION_EXTENSION, PAIRS_EXTENSION):
            if extension in entry.members:
                offset, size = entry.members[extension]
                file.seek(offset)
                members[extension] = file.read(size)
    return Sample(entry.key, members, entry.repeated)
