"""LISM's output folder: one paired tar per input tar, the quarantine, and what is done.

OUT/NAME.tar               input members unchanged + KEY.pairs.json, renamed into place when complete
OUT/index/NAME.tar.parquet where the tar's members lie (see goal_ray.tar_index)
OUT/quarantine/NAME.jsonl  samples left out: shard, number in it, key, stage, reason
OUT/done/NAME.json         counts of a finished shard, written last: a shard without it is done again, whole
OUT/lism.json              the summary
OUT/gallery.html           the summary as a page, with pictures

All but the summary, its page, and the seconds of work in `done` is the same bytes in every run with the same settings
on devices of one kind: others round otherwise, and so does one with too little memory for a group of pictures.
"""

import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from goal_ray.lism.picks import Picks
from goal_ray.lism.work import PHASES, Work
from goal_ray.shard_urls import shard_name
from goal_ray.storage import (
    exists,
    join,
    list_names,
    open_atomic,
    open_read,
    patiently,
    read_all,
    remove,
    remove_abandoned,
    write_bytes,
)
from goal_ray.tar_index import remove_index, write_index
from goal_ray.tar_places import MemberPlace
from goal_ray.tars import (
    DAMAGE,
    LARGEST_MEMBER_BYTES,
    PAIRS_EXTENSION,
    Member,
    end_mark,
    iter_members,
    member_info,
    open_tar,
    padded_bytes,
    read_member,
)
from goal_ray.timing import measure

SIMILARITY_BINS = 40
FIRST_BAD = 5
# What is of one sample in a reason: an address, a quotation or list, a number.
SPECIFIC = ((r"\S+\.tar\b", "….tar"), (r"""b?'[^']*'|b?"[^"]*"|\[[^\]]*\]""", "…"), (r"(?<![-\w])[0-9][\w.,×]*", "N"))


@dataclass
class ShardCounts:
    """What came out of one shard, or of a whole run: sums, and a histogram of pair similarities over [-1, 1].

    source_bytes  size of the input tar
    pairs         of a sentence and a region, at most matcher.regions_per_sentence for each sentence
    whole_image   pairs whose region is the whole image
    first_bad     the first records of the quarantine
    reasons       stage and kind of reason -> samples in the quarantine
    picks         pairs to show
    work          phase -> seconds of work and images it was done for, over all workers. Work lost with a worker that
                  died is not in it
    """

    source_bytes: int = 0
    samples: int = 0
    paired: int = 0
    quarantined: int = 0
    regions: int = 0
    sentences: int = 0
    pairs: int = 0
    whole_image: int = 0
    similarity_histogram: list[int] = field(default_factory=lambda: [0] * SIMILARITY_BINS)
    first_bad: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    picks: Picks = field(default_factory=Picks)
    work: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add_pairs(self, regions: int, sentences: int, similarities: Sequence[float], whole_image: int) -> None:
        """Counts one paired sample."""
        self.samples += 1
        self.paired += 1
        self.regions += regions
        self.sentences += sentences
        self.pairs += len(similarities)
        self.whole_image += whole_image
        for value in similarities:
            bin_ = int((value + 1) / 2 * SIMILARITY_BINS)
            self.similarity_histogram[min(max(bin_, 0), SIMILARITY_BINS - 1)] += 1

    def add_bad(self, record: dict[str, Any]) -> None:
        """Counts one quarantined sample."""
        self.samples += 1
        self.quarantined += 1
        self.first_bad = [*self.first_bad, record][:FIRST_BAD]
        kind = kind_of(record)
        self.reasons[kind] = self.reasons.get(kind, 0) + 1

    def add_work(self, phase: str, seconds: float, images: int) -> None:
        """Counts work for a number of images."""
        before = self.work.get(phase, (0.0, 0))
        self.work[phase] = (before[0] + seconds, before[1] + images)

    def merge(self, other: "ShardCounts") -> None:
        """Adds another's sums."""
        for name in (
            "source_bytes",
            "samples",
            "paired",
            "quarantined",
            "regions",
            "sentences",
            "pairs",
            "whole_image",
        ):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        both = zip(self.similarity_histogram, other.similarity_histogram, strict=True)
        self.similarity_histogram = [a + b for a, b in both]
        self.first_bad = [*self.first_bad, *other.first_bad][:FIRST_BAD]
        for kind, count in other.reasons.items():
            self.reasons[kind] = self.reasons.get(kind, 0) + count
        self.picks = self.picks.merged(other.picks)
        for phase, (seconds, images) in other.work.items():
            self.add_work(phase, seconds, images)


def kind_of(record: Mapping[str, Any]) -> str:
    """Stage and reason of a quarantine record without what only this sample has: addresses, quotations, numbers."""
    reason = record["reason"].replace(record["shard"], "….tar")
    for pattern, instead in SPECIFIC:
        reason = re.sub(pattern, instead, reason)
    return f"{record['stage']}: {reason}"


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
        """
        tars, done, bad = (set(list_names(join(self.url, part))) for part in ("", "done", "quarantine"))
        shards = [shard for shard in sizes if f"{shard_name(shard)}.json" in done]
        found = {}
        for shard, data in zip(shards, read_all([self._done(shard) for shard in shards]), strict=True):
            name, counts = shard_name(shard), _COUNTS.validate_json(data)
            complete = (name in tars or not counts.paired) and (f"{name}.jsonl" in bad or not counts.quarantined)
            if complete and counts.source_bytes == sizes[shard]:
                found[shard] = counts
        return found

    def is_finished(self, shard: str) -> bool:
        """Whether the shard's output was complete, and nobody has begun to replace it."""
        return exists(self._done(shard))

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
        self, shard: str, pairs: Mapping[int, bytes], bad: Sequence[dict[str, Any]], counts: ShardCounts
    ) -> Work:
        """Writes a shard's outputs, in place of earlier ones; the order makes a kill at any moment harmless.

        pairs  sample number -> its pairs.json; samples that are not in it are left out of the tar
        bad    a record for every sample left out

        Returns the work that it was. It is also added to `counts`, whose picks learn their places.
        """
        with measure("write") as seconds:
            remove(self._done(shard))
            if bad:
                lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in bad)
                write_bytes(self._quarantine(shard), lines.encode())
            else:
                remove(self._quarantine(shard))
            remove_index(self.tar(shard))
            if pairs:
                written = patiently(partial(write_paired_tar, shard, self.tar(shard), pairs), self.tar(shard))
                write_index(self.tar(shard), written.places, written.size_bytes)
                counts.picks = counts.picks.placed(written.parts)
            else:
                remove(self.tar(shard))
        counts.add_work("write", seconds["write"], len(pairs))
        write_bytes(self._done(shard), json.dumps(asdict(counts), ensure_ascii=False).encode())
        return Work.done_here("write", len(pairs), seconds)


class PairedTar(NamedTuple):
    """What was written.

    parts       sample number in the input tar -> (offset, size) in bytes of the part that holds the sample's members
    places      of the members of all samples
    size_bytes  of the tar
    """

    parts: dict[int, tuple[int, int]]
    places: list[MemberPlace]
    size_bytes: int


def write_paired_tar(source: str, target: str, pairs: Mapping[int, bytes]) -> PairedTar:
    """Copies a tar member by member, adding each sample's pairs.json behind its members; no tar is held in memory.

    Samples that are not in `pairs` are left out; members of no sample are kept, unless they have more than
    LARGEST_MEMBER_BYTES; an earlier pairs.json is replaced.
    Reads up to the damage of a truncated tar, whose samples beyond it cannot be in `pairs`.
    """
    starts: dict[int, int] = {}
    parts: dict[int, tuple[int, int]] = {}
    places: list[MemberPlace] = []
    with (
        open_read(source) as input_file,
        open_atomic(target) as output_file,
        tarfile.open(fileobj=output_file, mode="w", format=tarfile.PAX_FORMAT) as output,
    ):

        def add(header: tarfile.TarInfo, data: bytes, key: str, extension: str) -> None:
            """Adds a member, of a sample where it has a key."""
            output.addfile(header, io.BytesIO(data))
            if key:
                # As a reader counts them: two samples of one key are one where what stood between them is left out.
                sample = places[-1].sample + (places[-1].key != key) if places else 0
                place = output.offset - padded_bytes(len(data))
                places.append(MemberPlace(sample, key, extension, place, len(data)))

        def end_sample(member: Member) -> None:
            """Adds the pairs.json of the sample that `member` belongs to."""
            if member.sample in pairs:
                data = pairs[member.sample]
                name = f"{member.key}.{PAIRS_EXTENSION}"
                add(member_info(name, len(data)), data, member.key, PAIRS_EXTENSION)
                start = starts[member.sample]
                parts[member.sample] = (start, output.offset - start)

        last: Member | None = None
        try:
            with open_tar(input_file, "r|") as tar:
                for member in iter_members(tar):
                    if last is not None and member.sample != last.sample and member.sample >= 0:
                        end_sample(last)
                    if member.sample >= 0:
                        last = member
                        starts.setdefault(member.sample, output.offset)
                        if member.sample not in pairs or member.extension == PAIRS_EXTENSION:
                            continue
                    if member.info.size > LARGEST_MEMBER_BYTES:  # of no sample, or it would not be in `pairs`
                        continue
                    # Links and folders, too, may give a size, but only what tarfile does not know has that much data.
                    holds = member.info.isreg() or member.info.type not in tarfile.SUPPORTED_TYPES
                    data = read_member(tar, member.info) if holds else b""
                    add(resized(member.info, len(data)), data, member.key, member.extension)
        except DAMAGE:
            if last is not None and last.sample in pairs:
                raise
        else:
            if last is not None:
                end_sample(last)
        content_bytes = output.offset
    return PairedTar(parts, places, content_bytes + len(end_mark(content_bytes)))


def resized(info: tarfile.TarInfo, size_bytes: int) -> tarfile.TarInfo:
    """A member's header for so many bytes of data: the same, where it tells of them, and of no holes between them."""
    if info.issparse():
        return member_info(info.name, size_bytes)
    if info.size == size_bytes:
        return info
    other = copy(info)
    other.size = size_bytes
    other.pax_headers = {name: value for name, value in info.pax_headers.items() if name != "size"}
    return other


def summary(finished: Iterable[ShardCounts], seconds: float) -> dict[str, Any]:
    """The summary of a run's shards, as stored in OUT/lism.json."""
    total = ShardCounts()
    for counts in finished:
        total.merge(counts)
    all_work = sum(busy for busy, _ in total.work.values())
    return {
        **asdict(total),
        "work": {
            phase: {
                "seconds": round(busy, 3),
                "images": images,
                "images_per_s": images / max(busy, 1e-9),
                "share": busy / max(all_work, 1e-9),
            }
            for phase, (busy, images) in sorted(total.work.items(), key=lambda item: (*PHASES, item[0]).index(item[0]))
        },
        "regions_per_image": total.regions / max(1, total.paired),
        "sentences_per_image": total.sentences / max(1, total.paired),
        "pairs_per_image": total.pairs / max(1, total.paired),
        "whole_image_share": total.whole_image / max(1, total.pairs),
        "seconds": round(seconds, 1),
    }


def print_summary(result: Mapping[str, Any]) -> None:
    """Prints a summary for people, with the histogram as bars, and why samples were left out."""
    print(
        f"samples {result['samples']}: paired {result['paired']}, quarantined {result['quarantined']} · "
        f"{result['regions_per_image']:.1f} regions and {result['sentences_per_image']:.1f} sentences, "
        f"{result['pairs_per_image']:.1f} pairs per image · "
        f"{100 * result['whole_image_share']:.1f} % of the pairs are with the whole image"
    )
    histogram = result["similarity_histogram"]
    most = max(histogram) or 1
    for number, count in enumerate(histogram):
        if count:
            low = -1 + 2 * number / len(histogram)
            bar = "█" * max(1, 40 * count // most)
            print(f"  similarity {low:+.2f}..{low + 2 / len(histogram):+.2f} {count:>8} {bar}")
    print(f"  {'work':<8}{'busy, s':>12}{'images/s per worker':>22}{'share':>8}")
    for phase, work in result["work"].items():
        share = f"{100 * work['share']:.1f} %"
        print(f"  {phase:<8}{work['seconds']:>12.1f}{work['images_per_s']:>22.1f}{share:>8}")
    for record in result["first_bad"]:
        print(f"  quarantined: {describe_bad(record)}")
    if result["quarantined"] > len(result["first_bad"]):
        print(f"  quarantined: {result['quarantined'] - len(result['first_bad'])} more")


def describe_bad(record: Mapping[str, Any]) -> str:
    """A quarantine record as one line."""
    return f"{record['shard']} {record['key']!r} ({record['stage']}): {record['reason']}"
