"""Embeds the pictures and captions of shards in one streamed pass. Core: torch only, no Ray."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from goal_ray.errors import GoalRayError, ModelError
from goal_ray.geometry import PixelGeometry, ResizeConfig
from goal_ray.images import decode_image
from goal_ray.model import LoadedModel, encode_image, encode_text
from goal_ray.shards import Sample, stream_samples
from goal_ray.text import CaptionEncoder, pad_batch


@dataclass(frozen=True)
class Embeddings:
    """image_NE, text_NE: L2-normalised float32 on the CPU, a row a sample · keys · skipped: bad samples."""

    image_NE: torch.Tensor
    text_NE: torch.Tensor
    keys: list[str]
    skipped: list[dict[str, str]]


def embed_shards(loaded: LoadedModel, shards: list[str], batch: int, device: str, threads: int) -> Embeddings:
    """Embeds every sample of the shards; decoding overlaps with the model. Bad samples are skipped and listed."""
    mode = loaded.preprocess["resize_mode"]
    if mode not in ("shortest", "squash"):
        raise ModelError(f"the model's preprocessing resizes by {mode!r}; supported are shortest and squash")
    geometry = PixelGeometry(
        ResizeConfig(mode=mode), loaded.size_px, loaded.grid_HW, loaded.preprocess["interpolation"]
    )
    encoder = CaptionEncoder(loaded.tokenizer)
    clip = loaded.clip.eval().to(device)
    mean = torch.tensor(loaded.preprocess["mean"], device=device).view(3, 1, 1)
    std = torch.tensor(loaded.preprocess["std"], device=device).view(3, 1, 1)
    skipped: list[dict[str, str]] = []

    def prepare(sample: Sample) -> tuple[str, np.ndarray, np.ndarray]:
        square, _ = geometry(decode_image(sample.image_bytes()), np.empty((0, 4)))
        return sample.key, square, encoder.encode(sample.caption(), [], loaded.context_length).ids

    def samples() -> Iterator[tuple[str, Sample]]:
        for url in shards:
            try:
                for sample in stream_samples(url):
                    yield url, sample
            except GoalRayError as error:
                skipped.append({"shard": url, "key": "", "reason": str(error)})

    keys: list[str] = []
    images, texts = [], []
    with ThreadPoolExecutor(threads) as pool, torch.inference_mode(), tqdm(desc="evaluate", unit=" images") as bar:
        ready = ordered(pool, prepare, samples(), ahead=2 * batch, skipped=skipped)
        while rows := list(islice(ready, batch)):
            pixels = torch.from_numpy(np.stack([square for _, square, _ in rows])).to(device)
            ids = torch.from_numpy(pad_batch([ids for *_, ids in rows])).to(device)
            scaled = (pixels.float() / 255 - mean) / std
            images.append(F.normalize(encode_image(clip, scaled).pooled_BE.float(), dim=-1).cpu())
            texts.append(F.normalize(encode_text(clip, ids).pooled_BE.float(), dim=-1).cpu())
            keys += [key for key, *_ in rows]
            bar.update(len(rows))
    if not keys:
        first = f"; the first problem: {skipped[0]}" if skipped else ""
        raise GoalRayError(f"no usable sample in {len(shards)} shards{first}")
    return Embeddings(torch.cat(images), torch.cat(texts), keys, skipped)


def ordered(
    pool: ThreadPoolExecutor, prepare, samples: Iterable[tuple[str, Sample]], ahead: int, skipped: list[dict[str, str]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Results of `prepare` in the samples' order, computed up to `ahead` of the reader; bad ones go to `skipped`."""
    waiting: deque[tuple[str, str, Future]] = deque()
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
