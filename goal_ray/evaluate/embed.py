"""Embeds the pictures and captions of shards, and their pairs, in one streamed pass. Core: torch only, no Ray."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from goal_ray.ahead import read_ahead
from goal_ray.bad_samples import bad_record, most_frequent
from goal_ray.errors import GoalRayError, ModelError, ShardError, StageError
from goal_ray.frozen_clip import FrozenClip
from goal_ray.geometry import PixelGeometry, outer_box
from goal_ray.images import decode_image
from goal_ray.model import LoadedModel
from goal_ray.pairs import best_pairs, read_pairs
from goal_ray.precision import Precision
from goal_ray.progress import Progress
from goal_ray.settings import ResizeConfig
from goal_ray.storage import sizes_bytes
from goal_ray.tars import Sample, stream_samples
from goal_ray.text import CaptionEncoder


@dataclass(frozen=True)
class Embeddings:
    """What shards hold, as a model sees it.

    image_IE  a row for every stored picture, or part of one, that differs, L2-normalised float32 on the CPU
    text_TE   likewise for captions and sentences, by what the model reads of them
    pairs_P2  int64 (picture, caption), rows that stand together in a sample; each pair once
    local_P2  likewise (region, sentence)
    samples   usable samples
    skipped   records of bad samples; a damaged tar is one of them, whatever it lost
    """

    image_IE: torch.Tensor
    text_TE: torch.Tensor
    pairs_P2: torch.Tensor
    local_P2: torch.Tensor
    samples: int
    skipped: list[dict[str, str]]


class Stored(NamedTuple):
    """A sample of a tar · end_bytes: what of all shards is behind it."""

    url: str
    sample: Sample
    end_bytes: int


class Entry(NamedTuple):
    """A picture with its caption, or a region with its sentence, ready for the model.

    picture  what tells it apart: the digest of the stored picture and, of a region, the pixels that it is cut at
    text     the digest of the token ids · square  (3, S, S) uint8 · ids  token ids
    """

    picture: bytes
    square: np.ndarray
    text: bytes
    ids: np.ndarray


def embed_shards(
    loaded: LoadedModel,
    shards: list[str],
    batch: int,
    device: str,
    threads: int,
    pairs: int = 0,
    title: str = "evaluate",
    precision: Precision = "fp32",
) -> Embeddings:
    """Embeds every sample of the shards; decoding overlaps with the model. Bad samples are skipped and listed.

    pairs  also embeds the regions and sentences of so many pairs of a sample, the best by its KEY.pairs.json; one
           without is then a bad sample
    title  what the progress is called
    precision  of the towers' matrix products

    A picture or caption that stands in several samples is one picture or caption: two rows of it would tie, and neither
    could ever be found first. Raises StageError where no sample is usable.
    """
    clip = FrozenClip(loaded, device, precision)
    skipped: list[dict[str, str]] = []
    pictures: dict[bytes, int] = {}
    texts: dict[bytes, int] = {}
    image_rows, text_rows = [], []
    whole_pairs, local_pairs = [], []

    def embed(entries: list[Entry]) -> list[tuple[int, int]]:
        """(row of the picture, row of the text) of every entry; what is new among them goes through the model."""
        if squares := add_new(pictures, ((entry.picture, entry.square) for entry in entries)):
            image_rows.append(clip.embed_pictures(torch.from_numpy(np.stack(squares))).cpu())
        if ids := add_new(texts, ((entry.text, entry.ids) for entry in entries)):
            text_rows.append(clip.embed_texts(ids).cpu())
        return [(pictures[entry.picture], texts[entry.text]) for entry in entries]

    samples = 0
    sizes = sizes_bytes(shards)
    with Progress(title, "B", sum(sizes[url] for url in shards)) as progress:
        stored = read_samples(shards, sizes, skipped)
        ready = prepared(preparation(loaded, pairs), stored, 2 * batch, threads, skipped)
        while rows := list(islice(ready, batch)):
            samples += len(rows)
            whole_pairs += embed([whole for _, (whole, *_) in rows])
            local = (entry for _, (_, *entries) in rows for entry in entries)
            while entries := list(islice(local, batch)):
                local_pairs += embed(entries)
            progress.add(rows[-1][0] - progress.done, f"{samples:,} samples")
    if not samples:
        why = f"; {most_frequent(skipped)}" if skipped else ""
        raise StageError(f"no usable sample in {len(shards)} shards{why}")
    return Embeddings(
        torch.cat(image_rows), torch.cat(text_rows), once(whole_pairs), once(local_pairs), samples, skipped
    )


def once(pairs: list[tuple[int, int]]) -> torch.Tensor:
    """The pairs as int64 (P, 2), each once, in order."""
    return torch.tensor(list(dict.fromkeys(pairs)), dtype=torch.int64).reshape(-1, 2)


def preparation(loaded: LoadedModel, pairs: int) -> Callable[[Sample, str], list[Entry]]:
    """The function that makes a sample's entries, as the model's own preprocessing does. It may run in threads.

    The first entry is the sample as a whole; those of its best pairs follow.
    """
    mode = loaded.preprocess["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ModelError(f"the model's preprocessing resizes by {mode!r}; supported are shortest and squash")
    interpolation = loaded.preprocess["interpolation"]
    geometry = PixelGeometry(ResizeConfig(mode=mode), loaded.size_px, loaded.grid_HW, interpolation)
    encoder = CaptionEncoder(loaded.tokenizer)

    def entry(image: Image.Image, picture: bytes, text: str) -> Entry:
        square, _ = geometry(image, np.empty((0, 4)))
        ids = encoder.encode(text, [], loaded.context_length).ids
        return Entry(picture, square, digest(ids.tobytes()), ids)

    def prepare(sample: Sample, where: str) -> list[Entry]:
        stored, caption = sample.image_bytes(), sample.caption()
        image, name = decode_image(stored), digest(stored)
        entries = [entry(image, name, caption)]
        if pairs == 0:
            return entries
        record = read_pairs(sample, where, image.size, ", or leave out --pairs")
        for pair in best_pairs(record, pairs):
            cut = outer_box(record.regions[pair.region].box, image.size)
            start, end = record.sentences[pair.sentence]
            part = name if cut == (0, 0, *image.size) else name + repr(cut).encode()
            entries.append(entry(image.crop(cut), part, caption[start:end]))
        return entries

    return prepare


def digest(data: bytes) -> bytes:
    """16 bytes that tell contents apart."""
    return blake2b(data, digest_size=16).digest()


def add_new(known: dict[bytes, int], items: Iterable[tuple[bytes, np.ndarray]]) -> list[np.ndarray]:
    """Numbers the digests that `known` lacks, from its length on; returns their arrays in that order."""
    new = {name: array for name, array in items if name not in known}
    known.update(zip(new, count(len(known)), strict=False))
    return list(new.values())


def read_samples(shards: Sequence[str], sizes: Mapping[str, int], skipped: list[dict[str, str]]) -> Iterator[Stored]:
    """The samples of all shards, of so many bytes, in order; a damaged tar ends early and goes to `skipped`."""
    begin = 0
    for url in shards:
        end = begin
        try:
            for sample in stream_samples(url):
                end += sum(map(len, sample.members.values()))
                yield Stored(url, sample, end)
        except ShardError as error:
            skipped.append(bad_record(url, "", "read", str(error)))
        begin += sizes[url]  # headers and padding, too, and what lies behind its damage


def prepared(
    prepare: Callable[[Sample, str], list[Entry]],
    stored: Iterable[Stored],
    ahead: int,
    threads: int,
    skipped: list[dict[str, str]],
) -> Iterator[tuple[int, list[Entry]]]:
    """(`end_bytes`, what `prepare` makes of it) of samples in order, as `read_ahead`; bad ones go to `skipped`."""

    def attempt(one: Stored) -> tuple[int, list[Entry] | dict[str, str]]:
        try:
            return one.end_bytes, prepare(one.sample, one.url)
        except GoalRayError as error:
            return one.end_bytes, bad_record(one.url, one.sample.key, "decode", str(error))

    for end_bytes, made in read_ahead(attempt, stored, ahead, threads):
        if isinstance(made, dict):
            skipped.append(made)
        else:
            yield end_bytes, made
