"""Paired tars that take as long to read as photographs with long captions, for benchmarks."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.tars import write_tar

PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
WORDS_PER_CAPTION = 140
SENTENCES = 8
REGIONS = 12


def write_photo_tars(folder: Path, size: tuple[int, int], samples: int, shards: int, words: list[str]) -> list[str]:
    """Writes `samples` photographs of `size` (width, height) in `shards` tars. Equal arguments, equal bytes.

    Captions are 140 of the `words`, the first of them most often, in 8 sentences; each picture has 12 regions.
    """
    urls = []
    for shard, numbers in enumerate(np.array_split(np.arange(samples), shards)):
        url = str(folder / f"photos-{shard:03d}.tar")
        write_tar(url, ((f"{number:06d}", draw(int(number), size, words)) for number in numbers))
        urls.append(url)
    return urls


def draw(number: int, size: tuple[int, int], words: list[str]) -> dict[str, bytes]:
    """The members of one sample."""
    generator = np.random.default_rng(number)
    sentences = list(make_sentences(generator, words))
    starts = np.cumsum([0, *(len(sentence) + 1 for sentence in sentences)]).tolist()
    spans = tuple((start, start + len(sentence)) for start, sentence in zip(starts, sentences, strict=False))
    regions = (*(random_region(generator, size) for _ in range(REGIONS)), Region((0.0, 0.0, *size), 1.0, "image"))
    similarities = generator.uniform(0.1, 0.4, SENTENCES)
    pairs = tuple(
        Pair(sentence, int(generator.integers(len(regions))), float(value))
        for sentence, value in enumerate(similarities)
    )
    record = PairRecord(size, spans, regions, pairs, {})
    return {
        "jpg": photograph(generator, size),
        "txt": " ".join(sentences).encode(),
        "pairs.json": record.to_bytes(),
    }


def make_sentences(generator: np.random.Generator, words: list[str]) -> Iterator[str]:
    """Sentences of words that are as unequally frequent as in a language (Zipf)."""
    ranks = generator.zipf(1.3, 20 * WORDS_PER_CAPTION)
    drawn = [words[rank - 1] for rank in ranks[ranks <= len(words)][:WORDS_PER_CAPTION]]
    for part in np.array_split(np.array(drawn), SENTENCES):
        yield " ".join(part).capitalize() + "."


def random_region(generator: np.random.Generator, size: tuple[int, int]) -> Region:
    """A box of 1 % to 80 % of the picture, small ones as frequent as SAM's."""
    share = np.exp(generator.uniform(np.log(0.01), np.log(0.8)))
    wide = np.exp(generator.uniform(np.log(share), 0.0) / 2 + np.log(share) / 4)
    sides = np.clip([wide, share / wide], 0.02, 1) * size
    x0, y0 = generator.uniform(0, 1, 2) * (np.array(size) - sides)
    return Region((float(x0), float(y0), float(x0 + sides[0]), float(y0 + sides[1])), 1.0, "sam")


def photograph(generator: np.random.Generator, size: tuple[int, int]) -> bytes:
    """A JPEG of a part of one of scikit-image's photographs, with a camera's noise: 2 bits a pixel or more."""
    import skimage.data

    source = Image.fromarray(getattr(skimage.data, PHOTOGRAPHS[generator.integers(len(PHOTOGRAPHS))])())
    sides = np.array(source.size) * generator.uniform(0.6, 1.0, 2)
    left, top = generator.uniform(0, 1, 2) * (np.array(source.size) - sides)
    enlarged = source.resize(size, Image.Resampling.BICUBIC, (left, top, left + sides[0], top + sides[1]))
    noise = generator.normal(0, 6, (*size[::-1], 3)).astype(np.float32)
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(enlarged) + noise).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
