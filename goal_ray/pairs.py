"""The `KEY.pairs.json` member of a paired shard: which region of the picture each sentence of the caption speaks of.

    {"version": 1,
     "size": [W, H],                                    pixels of the stored picture
     "sentences": [[start, end], …],                    character offsets into the stored caption, half-open, in order
     "regions": [{"box": [x0, y0, x1, y1],              pixels of the stored picture, floats, x1 > x0, y1 > y0
                  "score": s,                           the proposer's own confidence
                  "source": "sam|grid|detector|…|image"}, …],       "image" is the whole picture
     "pairs": [{"sentence": i, "region": j, "similarity": c}, …],   indices into the lists above, c a cosine
     "provenance": {…}}                                 models, settings and versions that made the record

The file is compact UTF-8 JSON with its keys in this order, so equal records are equal bytes. Readers ignore keys they
do not know and refuse other versions.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from goal_ray.errors import ShardError
from goal_ray.tars import PAIRS_EXTENSION, Sample

VERSION = 1
_REMEDY = "run `goal-ray lism` again on this shard"
_BOX_TOLERANCE_PX = 0.01 + 1e-6
_SIMILARITY_LIMIT = 1.001


@dataclass(frozen=True)
class Region:
    """A part of the picture: box (x0, y0, x1, y1) in pixels of the stored picture · score · source, its proposer."""

    box: tuple[float, float, float, float]
    score: float
    source: str


@dataclass(frozen=True)
class Pair:
    """A sentence and a region, as indices into their record, and the cosine of their embeddings."""

    sentence: int
    region: int
    similarity: float


@dataclass(frozen=True)
class PairRecord:
    """All that LISM found for one sample; this module's docstring says what the fields hold."""

    size: tuple[int, int]
    sentences: tuple[tuple[int, int], ...]
    regions: tuple[Region, ...]
    pairs: tuple[Pair, ...]
    provenance: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The record as stored: boxes to 0.01 px, scores and similarities to 6 significant digits.

        Raises ShardError for a record that `from_bytes` would refuse, so that none is ever written.
        """
        for field, value, problem in _violations(self):
            raise ShardError(f"the record to write: {field} = {value!r}: {problem}")
        tree = {
            "version": VERSION,
            "size": self.size,
            "sentences": self.sentences,
            "regions": [
                {"box": _rounded(region.box), "score": _six_digits(region.score), "source": region.source}
                for region in self.regions
            ],
            "pairs": [
                {"sentence": pair.sentence, "region": pair.region, "similarity": _six_digits(pair.similarity)}
                for pair in self.pairs
            ],
            "provenance": self.provenance,
        }
        return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()

    @staticmethod
    def from_bytes(data: bytes, caption: str, where: str) -> "PairRecord":
        """Reads a stored record and checks all of it against this module's docstring.

        caption  the sample's caption exactly as stored
        where    names the tar and the sample in errors

        Raises ShardError that names `where`, the field and its value.
        """
        record, problems = examine(data, caption)
        if record is None or problems:
            raise ShardError(f"{where}: {problems[0]}")
        return record

    def check_size(self, size: tuple[int, int], where: str) -> None:
        """Raises ShardError where the sample's picture has another size (W, H) than the record's boxes are for."""
        if self.size != size:
            raise ShardError(f"{where}: pairs are for {self.size} pixels, the picture has {size}; {_REMEDY}")


def read_pairs(sample: Sample, shard: str, size: tuple[int, int] | None = None, otherwise: str = "") -> PairRecord:
    """The record of a sample, checked against its caption and, where it is known, its picture's size (W, H).

    otherwise  what else helps where there is none: ", or …"

    Raises ShardError, naming shard and sample, where there is none or it breaks the contract.
    """
    where = f"{shard}: sample {sample.key!r}"
    if PAIRS_EXTENSION not in sample.members:
        raise ShardError(
            f"{where} has no .{PAIRS_EXTENSION}; run `goal-ray lism` on these shards{otherwise}", sample.key
        )
    record = PairRecord.from_bytes(sample.members[PAIRS_EXTENSION], sample.caption(), where)
    if size is not None:
        record.check_size(size, where)
    return record


_ADAPTER = TypeAdapter(PairRecord)


def examine(data: bytes, caption: str | None) -> tuple[PairRecord | None, list[str]]:
    """A stored record, None where the bytes are none, and all that breaks this module's docstring in it.

    caption  the sample's caption exactly as stored; None where there is no usable one
    """
    try:
        tree = pydantic_core.from_json(data)
    except ValueError as error:
        return None, [f"the pairs are not JSON: {error}; {_REMEDY}"]
    version = tree.get("version") if isinstance(tree, dict) else None
    if type(version) is not int or version != VERSION:
        problem = f"the pairs have version = {version!r}, this goal_ray reads {VERSION}; {_REMEDY}, "
        return None, [f"{problem}or use the goal_ray that wrote it"]
    try:
        record = _ADAPTER.validate_json(data, strict=True)
    except ValidationError as error:
        return None, [f"pairs: {_explain(item)}; {_REMEDY}" for item in error.errors()]
    caption_chars = None if caption is None else len(caption)
    violations = _violations(record, caption_chars)
    return record, [f"pairs: {field} = {value!r}: {problem}; {_REMEDY}" for field, value, problem in violations]


def best_pairs(record: PairRecord, count: int) -> list[Pair]:
    """The `count` pairs of highest similarity, best first, at most one per sentence.

    Equal similarities are ordered by sentence, then by region. Fewer are returned where there are fewer sentences.
    """
    ranked = sorted(record.pairs, key=lambda pair: (-pair.similarity, pair.sentence, pair.region))
    best: dict[int, Pair] = {}
    for pair in ranked:
        best.setdefault(pair.sentence, pair)
    return list(best.values())[:count]


def _violations(record: PairRecord, caption_chars: int | None = None) -> Iterator[tuple[str, Any, str]]:
    """(field, value, problem) for whatever in a record of the right types breaks the contract."""
    width, height = record.size
    if min(record.size) < 1:
        yield "size", record.size, "both sides must be at least 1 pixel"
    previous_end = 0
    for number, (start, end) in enumerate(record.sentences):
        field = f"sentences[{number}]"
        if start >= end:
            yield field, (start, end), "a sentence must end after its start"
        if start < previous_end:
            yield field, (start, end), f"starts before offset {previous_end}, where the one before it ends"
        if caption_chars is not None and end > caption_chars:
            yield field, (start, end), f"reaches beyond the caption of {caption_chars} characters; was it edited?"
        previous_end = end
    for number, region in enumerate(record.regions):
        field = f"regions[{number}]"
        x0, y0, x1, y1 = region.box
        if not all(map(math.isfinite, region.box)):
            yield f"{field}.box", region.box, "must be finite"
        if x0 >= x1 or y0 >= y1:
            yield f"{field}.box", region.box, "must be (x0, y0, x1, y1) with x1 > x0 and y1 > y0"
        if min(x0, y0) < -_BOX_TOLERANCE_PX or max(x1 - width, y1 - height) > _BOX_TOLERANCE_PX:
            yield f"{field}.box", region.box, f"reaches beyond the picture of {width}×{height} pixels"
        if not math.isfinite(region.score):
            yield f"{field}.score", region.score, "must be finite"
    for number, pair in enumerate(record.pairs):
        field = f"pairs[{number}]"
        if not 0 <= pair.sentence < len(record.sentences):
            yield f"{field}.sentence", pair.sentence, f"there are {len(record.sentences)} sentences"
        if not 0 <= pair.region < len(record.regions):
            yield f"{field}.region", pair.region, f"there are {len(record.regions)} regions"
        if not abs(pair.similarity) <= _SIMILARITY_LIMIT:
            yield f"{field}.similarity", pair.similarity, "must be a cosine, between -1 and 1"


def _rounded(box: tuple[float, float, float, float]) -> list[float]:
    """The box to 0.01 px; a side that this would close stays as it is."""
    x0, y0, x1, y1 = (round(float(edge), 2) for edge in box)
    if x0 >= x1:
        x0, x1 = float(box[0]), float(box[2])
    if y0 >= y1:
        y0, y1 = float(box[1]), float(box[3])
    return [x0, y0, x1, y1]


def _six_digits(value: float) -> float:
    return float(f"{value:.6g}")


def _explain(item: Any) -> str:
    value = "nothing" if item["type"] == "missing" else reprlib.repr(item["input"])
    return f"{_dotted(item['loc'])} = {value}: {item['msg']}"


def _dotted(location: Sequence[int | str]) -> str:
    """`regions[2].box` for ("regions", 2, "box")."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return "".join(parts).lstrip(".") or "the record"
