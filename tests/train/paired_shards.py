"""Tiny shards as `goal-ray lism` leaves them, made without it."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.tars import write_tar

SIZE_PX = 40
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (40, 60, 220), "white": (240, 240, 240)}


def sample(number: int) -> dict[str, bytes]:
    """A picture of two patches of colour, each with its sentence and its true region; another one for each number."""
    generator = np.random.default_rng(number)
    words = [list(COLOURS)[index] for index in generator.permutation(4)[:2]]
    pixels = generator.integers(0, 60, (SIZE_PX, SIZE_PX, 3), np.uint8)
    boxes = [(0.0, 0.0, 20.0, float(generator.integers(20, 41))), (20.0, 0.0, 40.0, 40.0)]
    for word, (x0, y0, x1, y1) in zip(words, boxes, strict=True):
        pixels[int(y0) : int(y1), int(x0) : int(x1)] += np.array(COLOURS[word], np.uint8) // 2
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    first = f"On the left side is {words[0]} number {number}."
    caption = f"{first} To the right of it there is {words[1]}."
    regions = (*(Region(box, 1.0, "grid") for box in boxes), Region((0.0, 0.0, 40.0, 40.0), 1.0, "image"))
    spans = ((0, len(first)), (len(first) + 1, len(caption)))
    record = PairRecord((SIZE_PX, SIZE_PX), spans, regions, (Pair(0, 0, 0.5), Pair(1, 1, 0.6)), {})
    return {"png": buffer.getvalue(), "txt": caption.encode(), "pairs.json": record.to_bytes()}


def write_shards(
    folder: Path, counts: Sequence[int] = (20, 17), without: str = "", undecodable: Sequence[str] = ()
) -> Path:
    """Tars of `counts` samples, keys `SHARD-NUMBER`, without the members of one extension, some pictures broken."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, count in enumerate(counts):
        samples = []
        for number in range(count):
            key = f"{shard}-{number}"
            members = {name: data for name, data in sample(100 * shard + number).items() if name != without}
            if key in undecodable:
                members["png"] = b"no picture"
            samples.append((key, members))
        write_tar(str(folder / f"train-{shard}.tar"), iter(samples))
    return folder
