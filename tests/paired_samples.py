"""Samples with pairs, made by hand."""

import io

import numpy as np
from PIL import Image

from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.tars import Sample, write_tar


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def sample(caption: str, regions: list[Region], pairs: list[Pair], size=(80, 60), key="one") -> Sample:
    """A sample whose caption has a sentence for each line."""
    ends = [at for at, sign in enumerate(caption + "\n") if sign == "\n"]
    sentences = tuple(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))
    record = PairRecord(size, sentences, tuple(regions), tuple(pairs), {})
    return Sample(key, {"jpg": encoded(*size), "txt": caption.encode(), "pairs.json": record.to_bytes()})


def write_samples(path, *samples: Sample) -> str:
    write_tar(str(path), ((each.key, each.members) for each in samples))
    return str(path)


WHOLE = Region((0, 0, 80, 60), 1.0, "image")
LEFT = Region((0, 0, 40, 60), 1.0, "grid")
RIGHT = Region((40, 0, 80, 60), 1.0, "grid")
