"""Embeds the pictures and captions of shards in one streamed pass. Core: torch only, no Ray."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fsspec.core import url_to_fs
from tqdm import tqdm

from goal_ray.errors import GoalRayError, ModelError, ShardError, StageError
from goal_ray.geometry import PixelGeometry, ResizeConfig
from goal_ray.images import decode_image
from goal_ray.model import LoadedModel, encode_image, encode_text
from goal_ray.shards import Sample, stream_samples
from goal_ray.text import CaptionEncoder, pad_batch


@dataclass(frozen=True)
class Embeddings:
    """What shards hold, as a model sees it.

    image_IE  a row for every picture whose bytes differ, L2-normalised float32 on the CPU
    text_TE   likewise for captions
    pairs_P2  int64 (picture, caption), rows that stand together in a sample; each pair once
    samples   usable samples
    skipped   bad samples as {shard, key, reason}; a damaged tar is one of them, whatever it lost
    """

    image_IE: torch.Tensor
    text_TE: torch.Tensor
    pairs_P2: torch.Tensor
    samples: int
    skipped: list[dict[str, str]]


class Prepared(NamedTuple):
    """A sample ready for the model: its square (3, S, S) uint8, its token ids, and digests of what was stored."""

    picture: bytes
    square: np.ndarray
    caption: bytes
    ids: np.ndarray


def embed_shards(loaded: LoadedModel, shards: list[str], batch: int, device: str, threads: int) -> Embeddings:
    """Embeds every sample of the shards; decoding overlaps with the model. Bad samples are skipped and listed.

    A picture or caption that stands in several samples is one picture or caption: two rows of it would tie, and neither
    could ever be found first. Raises StageError where no sample is usable.
    """
    clip = loaded.clip.eval().to(device)
    mean = torch.tensor(loaded.preprocess["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(loaded.preprocess["std"], device=device).view(3, 1, 1)

    def embed_pictures(squares: list[np.ndarray]) -> torch.Tensor:
        pixels = torch.from_numpy(np.stack(squares)).to(device)
        return F.normalize(encode_image(clip, (pixels.float() / 255 - mean) / std).pooled_BE.float(), dim=-1).cpu()

    def embed_captions(texts: list[np.ndarray]) -> torch.Tensor:
        ids = torch.from_numpy(pad_batch(texts)).to(device)
        return F.normalize(encode_text(clip, ids).pooled_BE.float(), dim=-1).cpu()

    skipped: list[dict[str, str]] = []
    pictures: dict[bytes, int] = {}
    captions: dict[bytes, int] = {}
    images, texts, pairs = [], [], []
    bar = tqdm(desc="evaluate", total=size_bytes(shards), unit="B", unit_scale=True, dynamic_ncols=True, disable=None)
    with ThreadPoolExecutor(threads) as pool, torch.inference_mode(), bar:
        samples = read_samples(shards, bar, skipped)
        ready = ordered(pool, preparation(loaded), samples, ahead=2 * batch, skipped=skipped)
        while rows := list(islice(ready, batch)):
            if squares := add_new(pictures, ((row.picture, row.square) for row in rows)):
                images.append(embed_pictures(squares))
            if new_texts := add_new(captions, ((row.caption, row.ids) for row in rows)):
                texts.append(embed_captions(new_texts))
            pairs += [(pictures[row.picture], captions[row.caption]) for row in rows]
            bar.set_postfix_str(f"{len(pairs)} samples", refresh=False)
    if not pairs:
        first = f"; the first problem: {describe_skip(skipped[0])}" if skipped else ""
        raise StageError(f"no usable sample in {len(shards)} shards{first}")
    different = torch.tensor(list(dict.fromkeys(pairs)))
    return Embeddings(torch.cat(images), torch.cat(texts), different, len(pairs), skipped)


def preparation(loaded: LoadedModel) -> Callable[[Sample], Prepared]:
    """The function that decodes a sample for a model, as its own preprocessing does. It may run in threads."""
    mode = loaded.preprocess["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ModelError(f"the model's preprocessing resizes by {mode!r}; supported are shortest and squash")
    interpolation = loaded.preprocess["interpolation"]
    geometry = PixelGeometry(ResizeConfig(mode=mode), loaded.size_px, loaded.grid_HW, interpolation)
    encoder = CaptionEncoder(loaded.tokenizer)

    def prepare(sample: Sample) -> Prepared:
        stored, caption = sample.image_bytes(), sample.caption()
        square, _ = geometry(decode_image(stored), np.empty((0, 4)))
        ids = encoder.encode(caption, [], loaded.context_length).ids
        return Prepared(digest(stored), square, digest(caption.encode()), ids)

    return prepare


def digest(data: bytes) -> bytes:
    """16 bytes that tell contents apart."""
    return blake2b(data, digest_size=16).digest()


def add_new(known: dict[bytes, int], items: Iterable[tuple[bytes, np.ndarray]]) -> list[np.ndarray]:
    """Numbers the digests that `known` lacks, from its length on; returns their arrays in that order."""
    new = {name: array for name, array in items if name not in known}
    known.update(zip(new, count(len(known)), strict=False))
    return list(new.values())


def read_samples(shards: list[str], bar: tqdm, skipped: list[dict[str, str]]) -> Iterator[tuple[str, Sample]]:
    """(tar, sample) of all shards in order; a damaged tar ends early and goes to `skipped`. The bar counts bytes."""
    for url in shards:
        try:
            for sample in stream_samples(url):
                bar.update(sum(map(len, sample.members.values())))
                yield url, sample
        except ShardError as error:
            skipped.append({"shard": url, "key": "", "reason": str(error)})


def size_bytes(shards: list[str]) -> int | None:
    """Size of all shards, for an estimate of the time left; None where a store does not tell."""
    sizes = [fs.size(path) for fs, path in map(url_to_fs, shards)]
    return None if None in sizes else sum(sizes)


def describe_skip(record: dict[str, str]) -> str:
    """A record of a bad sample as one line."""
    return record["reason"] if not record["key"] else f"{record['shard']}: {record['key']!r}: {record['reason']}"


def ordered(
    pool: ThreadPoolExecutor,
    prepare: Callable[[Sample], Prepared],
    samples: Iterable[tuple[str, Sample]],
    ahead: int,
    skipped: list[dict[str, str]],
) -> Iterator[Prepared]:
    """Results of `prepare` in the samples' order, computed up to `ahead` of the reader; bad ones go to `skipped`."""
    waiting: deque[tuple[str, str, Future[Prepared]]] = deque()
    source = iter(samples)
    while True:
        for url, sample in islice(source, ahead - len(waiting)):
            waiting.append((url, sample.key, pool.submit(prepare, sample)))
        if not waiting:
            return
        url, key, future = waiting.popleft()
        try:
            yield future.result()
        except GoalRayError as error:
            skipped.append({"shard": url, "key": key, "reason": str(error)})
