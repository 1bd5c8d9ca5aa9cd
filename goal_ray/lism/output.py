"""LISM's output folder: one paired tar per input tar, the quarantine, and what is done.

OUT/NAME.tar               input members unchanged + KEY.pairs.json, renamed into place when complete
OUT/index/NAME.tar.parquet where the tar's members lie (see goal_ray.tar_index)
OUT/quarantine/NAME.jsonl  samples left out: shard, number in it, key, stage, reason
OUT/done/NAME.json         counts of a finished shard, written last: a shard without it is done again, whole
OUT/settings.json          the settings that decide the pairs; a run with others is refused
OUT/config.yaml            all settings of the last run
OUT/lism.json              the summary
OUT/gallery.html           the summary as a page, with pictures

All but the summary, its page, and the seconds of work in `done` is the same bytes in every run with the same settings
on devices of one kind: others round otherwise, and so does one with too little memory for a group of pictures.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pydantic import TypeAdapter, ValidationError

from goal_ray.atomic import remove_abandoned, write_bytes
from goal_ray.errors import StageError
from goal_ray.lism.counts import ShardCounts
from goal_ray.lism.paired_tar import write_paired_tar
from goal_ray.lism.work import Work
from goal_ray.patience import patiently
from goal_ray.shard_urls import shard_name
from goal_ray.storage import exists, join, list_names, open_read, read_all, read_bytes, remove
from goal_ray.tar_index import remove_index, write_index
from goal_ray.tars import PAIRS_EXTENSION, iter_members, open_tar, read_member
from goal_ray.timing import measure

_COUNTS = TypeAdapter(ShardCounts)


@dataclass(frozen=True)
class OutputFolder:
    """The output folder of a run, on any storage."""

    url: str

    def tar(self, shard: str) -> str:
        """The paired tar of an input shard."""
        return join(self.url, shard_name(shard))

    def _done(self, shard: str) -> str:
        return join(join(self.url, "done"), f"{shard_name(shard)}.json")

    def _quarantine(self, shard: str) -> str:
        return join(join(self.url, "quarantine"), f"{shard_name(shard)}.jsonl")

    def remove_abandoned(self) -> None:
        """Deletes what killed runs left half written."""
        for part in ("", "done", "index", "quarantine"):
            remove_abandoned(join(self.url, part))

    def finished(self, sizes: Mapping[str, int]) -> dict[str, ShardCounts]:
        """The shards whose output is complete, and their counts.

        sizes  shard -> bytes of the input tar; a shard of another size than the one that was paired is done again

        Raises StageError for counts that another version of goal_ray stored otherwise.
        """
        tars, done, bad = (set(list_names(join(self.url, part))) for part in ("", "done", "quarantine"))
        shards = [shard for shard in sizes if f"{shard_name(shard)}.json" in done]
        found = {}
        for shard, data in zip(shards, read_all([self._done(shard) for shard in shards]), strict=True):
            name = shard_name(shard)
            try:
                counts = counts_of(data)
            except ValueError as error:
                problem = str(error)
                if isinstance(error, ValidationError):
                    first = error.errors()[0]
                    problem = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
                raise StageError(
                    f"{self._done(shard)}: not as this version of goal_ray writes it ({problem}); go on with the "
                    f"version that wrote it, use another OUT, or delete the files in {join(self.url, 'done')} to pair "
                    "all shards again"
                ) from None
            complete = (name in tars or not counts.paired) and (f"{name}.jsonl" in bad or not counts.quarantined)
            if complete and counts.source_bytes == sizes[shard]:
                found[shard] = counts
        return found

    def counts(self, shard: str) -> ShardCounts | None:
        """What came out of a shard whose output was complete; None where somebody has begun to replace it."""
        return counts_of(read_bytes(self._done(shard))) if exists(self._done(shard)) else None

    def quarantine(self, shards: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
        """For each of these finished shards, which all have some, the records of samples that were left out."""
        for data in read_all([self._quarantine(shard) for shard in shards]):
            yield [json.loads(line) for line in data.splitlines()]

    def paired(self, shard: str) -> Iterator[tuple[str, bytes]]:
        """(key, pairs.json) of the samples of a finished shard's paired tar, in order."""
        with open_read(self.tar(shard)) as file, open_tar(file, "r|") as tar:
            for member in iter_members(tar):
                if member.sample >= 0 and member.extension == PAIRS_EXTENSION:
                    yield member.key, read_member(tar, member.info)

    def finish(
        self,
        shard: str,
        pairs: Mapping[int, bytes],
        bad: Sequence[dict[str, Any]],
        counts: ShardCounts,
        keys: Mapping[int, str] | None = None,
    ) -> Work:
        """Writes a shard's outputs, in place of earlier ones; the order makes a kill at any moment harmless.

        pairs  sample number -> its pairs.json; samples that are not in it are left out of the tar
        bad    a record for every sample left out
        keys   sample number -> its key when it was read; raises ShardError where the tar holds another one now

        Returns the work that it was. It is also added to `counts`, whose picks learn their places.
        """
        with measure("write") as seconds:
            remove(self._done(shard))
            if bad:
                write_bytes(self._quarantine(shard), b"".join(json_bytes(record) + b"\n" for record in bad))
            else:
                remove(self._quarantine(shard))
            remove_index(self.tar(shard))
            if pairs:
                write = partial(write_paired_tar, shard, self.tar(shard), pairs, keys)
                written = patiently(write, self.tar(shard))
                write_index(self.tar(shard), written.places, written.size_bytes)
                counts.picks = counts.picks.placed(written.parts)
            else:
                remove(self.tar(shard))
        counts.add_work("write", seconds["write"], len(pairs))
        write_bytes(self._done(shard), json_bytes(asdict(counts)))
        return Work.done_here("write", len(pairs), seconds)


def json_bytes(tree: dict[str, Any], indent: int | None = None) -> bytes:
    """A tree as JSON. Bytes of a name that are not UTF-8, Python's surrogates, become JSON's escapes."""
    return json.dumps(tree, indent=indent, ensure_ascii=False).encode("utf-8", "backslashreplace")


def counts_of(data: bytes) -> ShardCounts:
    """The counts of a shard, as stored. Raises ValueError, a ValidationError where it is JSON."""
    return _COUNTS.validate_python(json.loads(data))  # pydantic's own parser refuses lone surrogates
