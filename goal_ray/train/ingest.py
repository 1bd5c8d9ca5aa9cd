"""Ray Data ingest: every worker's micro-batches, read and decoded by CPU tasks anywhere in the cluster.

What a worker sees is a function of seed and step alone (goal_ray.order), never of which task finished first: that makes
runs comparable and resumable. So each worker streams its own plan instead of sharing one split stream.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from goal_ray.batches import ExampleBuilder, collate, pack
from goal_ray.errors import CaptionError, ImageError, ShardError
from goal_ray.ray_session import quiet_ray_data
from goal_ray.shards import (
    CAPTION_EXTENSION,
    PAIRS_EXTENSION,
    Sample,
    SampleIndex,
    image_extension,
    index_shard,
)
from goal_ray.storage import open_read

PREFETCH_BATCHES = 4


@lru_cache(maxsize=64)
def scan_shard(url: str, needs_pairs: bool) -> tuple[list[SampleIndex], list[dict[str, str]]]:
    """The usable samples of a tar and the records of the others, from the tar's headers alone.

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


def scan_shards(urls: Sequence[str], needs_pairs: bool) -> tuple[list[int], list[dict[str, str]]]:
    """Usable samples per tar and the records of all unusable ones; the tars are scanned in parallel."""
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


@dataclass(frozen=True)
class BatchReader:
    """Reads a micro-batch by its (shard, sample) rows; runs in Ray Data tasks.

    Samples that turn out unreadable are left out of their batch and reported beside it.
    """

    urls: tuple[str, ...]
    builder: ExampleBuilder
    seed: int

    def __call__(self, row: dict) -> dict:
        examples, bad = [], []
        for shard, number in np.asarray(row["rows"]).reshape(-1, 2).tolist():
            url = self.urls[shard]
            entry = scan_shard(url, self.builder.pairs > 0)[0][number]
            try:
                sample = read_sample(url, entry)
                examples.append(self.builder(sample, url, self.seed + int(row["epoch"])))
            except (ImageError, CaptionError, ShardError) as error:
                bad.append(bad_record(url, entry.key, "decode", error))
        return {"batch": pack(collate(examples)) if examples else b"", "bad": json.dumps(bad)}


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


def stream_batches(
    plan: Sequence[np.ndarray], reader: BatchReader, epoch: int
) -> Iterator[tuple[bytes, list[dict[str, str]]]]:
    """Packed micro-batches in the plan's order, each with the records of the samples it had to leave out."""
    import ray.data

    if not len(plan):
        return
    quiet_ray_data(preserve_order=True)
    items = [{"rows": rows.ravel(), "epoch": epoch} for rows in plan]
    # One block per micro-batch, up to a point: a block is a task's unit of work and of prefetch.
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 2000)).map(reader)
    for batch in dataset.iter_batches(batch_size=1, batch_format="numpy", prefetch_batches=PREFETCH_BATCHES):
        yield bytes(batch["batch"][0]), json.loads(batch["bad"][0])
