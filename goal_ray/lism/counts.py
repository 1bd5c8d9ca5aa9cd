"""What came out of a shard, or of a whole run, in numbers: summed up, stored, and printed for people."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from goal_ray.bad_samples import describe_bad, kind_of
from goal_ray.lism.picks import Pick, Picks
from goal_ray.lism.work import PHASES

SIMILARITY_BINS = 200  # of 0.01: nearly all similarities of a pretrained CLIP lie within 0.2
# How many bins a bar may hold. Each divides half of the bins, so that a bar begins at 0.
BINS_PER_BAR = (1, 2, 5, 10)
MOST_BARS = 30
QUANTILES = (5, 25, 50, 75, 95)
FIRST_BAD = 5
MOST_OF_ONE = 2


@dataclass
class ShardCounts:
    """What came out of one shard, or of a whole run: sums, and a histogram of pair similarities over [-1, 1].

    source_bytes      size of the input tar
    pairs             of a sentence and a region, at most matcher.regions_per_sentence for each sentence
    paired_sentences  sentences with a pair
    whole_image       pairs whose region is the whole image
    first_bad         the first records of the quarantine
    reasons           stage and kind of reason -> samples in the quarantine
    picks             pairs to show
    work              phase -> seconds of work and images it was done for, over all workers. Work lost with a worker
                      that died is not in it
    """

    source_bytes: int = 0
    samples: int = 0
    paired: int = 0
    quarantined: int = 0
    regions: int = 0
    sentences: int = 0
    pairs: int = 0
    paired_sentences: int = 0
    whole_image: int = 0
    similarity_histogram: Annotated[list[int], Field(min_length=SIMILARITY_BINS, max_length=SIMILARITY_BINS)] = field(
        default_factory=lambda: [0] * SIMILARITY_BINS
    )
    first_bad: list[dict[str, Any]] = field(default_factory=list)
    reasons: dict[str, int] = field(default_factory=dict)
    picks: Picks = field(default_factory=Picks)
    work: dict[str, tuple[float, int]] = field(default_factory=dict)

    def add_pairs(
        self, regions: int, sentences: int, similarities: Sequence[float], whole_image: int, paired_sentences: int
    ) -> None:
        """Counts one paired sample."""
        self.samples += 1
        self.paired += 1
        self.regions += regions
        self.sentences += sentences
        self.pairs += len(similarities)
        self.paired_sentences += paired_sentences
        self.whole_image += whole_image
        for value in similarities:
            # 0.29 is a bit less than 29 hundredths in binary, and yet belongs to the bin that begins there.
            bin_ = math.floor(round((value + 1) / 2 * SIMILARITY_BINS, 6))
            self.similarity_histogram[min(max(bin_, 0), SIMILARITY_BINS - 1)] += 1

    def add_picks(self, pairs: Sequence[Pick]) -> None:
        """Takes all pairs of one sample, to show some: at most MOST_OF_ONE of them as best pairs, and as worst ones.

        Else these could all be of one picture with many sentences.
        """
        mine = Picks.among(pairs)
        mine = replace(mine, best=mine.best[:MOST_OF_ONE], worst=mine.worst[:MOST_OF_ONE])
        self.picks = self.picks.merged(mine)

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
            "paired_sentences",
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


@dataclass(frozen=True)
class Bar:
    """Pairs with similarities from `low` to `high`: how many, and the bar's height, of 1."""

    low: float
    high: float
    count: int
    height: float


def histogram_bars(histogram: Sequence[int]) -> list[Bar]:
    """A histogram in at most MOST_BARS bars of equal width, the narrowest there can be, where there are pairs."""
    filled = [number for number, count in enumerate(histogram) if count]
    if not filled:
        return []
    bins = next(bins for bins in BINS_PER_BAR if filled[-1] // bins - filled[0] // bins < MOST_BARS)
    starts = range(filled[0] // bins * bins, filled[-1] + 1, bins)
    counts = [sum(histogram[start : start + bins]) for start in starts]
    half = SIMILARITY_BINS // 2
    return [
        Bar((start - half) / half, (start + bins - half) / half, count, count / max(counts))
        for start, count in zip(starts, counts, strict=True)
    ]


def quantiles(histogram: Sequence[int]) -> dict[str, float]:
    """Percent -> the similarity that so many of the pairs lie below, to about 0.01: pairs are even within their bin.

    Empty without a pair.
    """
    found = {}
    for percent in QUANTILES if sum(histogram) else ():
        wanted = percent / 100 * sum(histogram)
        for number, count in enumerate(histogram):
            if count >= wanted:
                found[str(percent)] = round((number + wanted / count) * 2 / SIMILARITY_BINS - 1, 3)
                break
            wanted -= count
    return found


def summary(finished: Iterable[ShardCounts], seconds: float, images: int) -> dict[str, Any]:
    """The summary of a run's shards, as stored in OUT/lism.json.

    seconds  that the last run took
    images   that it did, without those of earlier runs
    """
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
        "paired_sentence_share": total.paired_sentences / max(1, total.sentences),
        "whole_image_share": total.whole_image / max(1, total.pairs),
        "similarity_quantiles": quantiles(total.similarity_histogram),
        "seconds": round(seconds, 1),
        "images": images,
        "images_per_s": images / max(seconds, 1e-9),
    }


def print_summary(result: Mapping[str, Any]) -> None:
    """Prints a summary for people, with the histogram as bars, and why samples were left out."""
    print(
        f"samples {result['samples']:,}: paired {result['paired']:,}, quarantined {result['quarantined']:,} · "
        f"{result['regions_per_image']:.1f} regions and {result['sentences_per_image']:.1f} sentences, "
        f"{result['pairs_per_image']:.1f} pairs per image · "
        f"{100 * result['paired_sentence_share']:.1f} % of the sentences have a pair, "
        f"{100 * result['whole_image_share']:.1f} % of the pairs are with the whole image"
    )
    for bar in histogram_bars(result["similarity_histogram"]):
        drawn = "█" * max(1, int(40 * bar.height)) if bar.count else ""
        print(f"  similarity {bar.low:+.2f}..{bar.high:+.2f} {bar.count:>11,} {drawn}".rstrip())
    if result["similarity_quantiles"]:
        print(f"  of the pairs, {describe_quantiles(result)}")
    print(f"  {'work':<8}{'busy, s':>14}{'images/s per worker':>22}{'share':>8}")
    for phase, work in result["work"].items():
        share = f"{100 * work['share']:.1f} %"
        print(f"  {phase:<8}{work['seconds']:>14,.1f}{work['images_per_s']:>22,.1f}{share:>8}")
    for record in result["first_bad"]:
        print(f"  quarantined: {describe_bad(record)}")
    if result["quarantined"] > len(result["first_bad"]):
        print(f"  quarantined: {result['quarantined'] - len(result['first_bad']):,} more")


def describe_quantiles(result: Mapping[str, Any]) -> str:
    """A summary's quantiles in words: what matcher.min_similarity would leave out."""
    shares = (f"{percent} % below {value:z.2f}" for percent, value in result["similarity_quantiles"].items())
    return ", ".join(shares).replace(" below", " lie below", 1)
