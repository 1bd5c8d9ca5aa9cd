"""Procedural scenes: pictures of textured shapes with long captions and known truth, as WebDataset tars.

Every sample is `KEY.png`, `KEY.txt` and `KEY.json`, the truth:
`{"seed", "index", "size": [W, H], "background": {"colour", "texture"},
  "objects": [{"box": [x0, y0, x1, y1] (px), "shape", "colour", "pattern",
               "accent" (the pattern's colour, or null), "size", "place"}],
  "sentences": [{"start", "end" (characters of KEY.txt), "object": index or null}]}`.
For a scene drawn as a crop, `size` and `place` are those in the full scene that it is thought to be cut from.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from goal_ray.claim import claim_folder
from goal_ray.config import strict
from goal_ray.errors import ConfigError
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.progress import Progress
from goal_ray.scenes.captions import Sentence, write_caption
from goal_ray.scenes.drawing import render
from goal_ray.scenes.layout import MAX_OBJECTS, Box, crop_scene, full_scene, look_alike
from goal_ray.storage import exists, join
from goal_ray.tars import PAIRS_EXTENSION, write_tar

SETTINGS_FILE = "scenes.json"
# Raise it when the same seed no longer gives the same bytes.
VERSION = 3


@strict
@dataclass(frozen=True)
class SceneSettings:
    """How scenes look and how they are stored.

    shard_size: scenes per tar
    size: picture height in pixels; the width varies from 1 to 1.25 times that
    min_objects: fewest objects in a scene
    max_objects: most objects in a scene, at most 9
    family: so many consecutive scenes are look-alikes, which share all but the patterns of their objects
    crops: share of the pictures that show one object alone, as a region cut from a scene shows it
    short: captions name each object's shape, colour and pattern and little else, like alt text
    paired: samples get the KEY.pairs.json of a LISM that never errs
    """

    shard_size: int = 250
    size: int = 128
    min_objects: int = 4
    max_objects: int = 6
    family: int = 1
    crops: float = 0.0
    short: bool = False
    paired: bool = False

    def __post_init__(self) -> None:
        if self.shard_size < 1:
            raise ValueError("shard_size must be at least 1")
        if self.family < 1:
            raise ValueError("family must be at least 1, which makes every scene different")
        if not 0 <= self.crops <= 1:
            raise ValueError("crops must be between 0 and 1")
        if not 32 <= self.size <= 4096:
            raise ValueError("size must be between 32 and 4096 pixels")
        if not 1 <= self.min_objects <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(f"objects: 1 <= min_objects <= max_objects <= {MAX_OBJECTS} must hold")


def draw_scenes(out: str | Path, count: int, seed: int, settings: SceneSettings | None = None) -> list[str]:
    """Draws `count` scenes into tars `scenes-000000.tar`, … in the folder `out`, which may be remote. Returns the tars.

    Same arguments, same bytes; scene i does not depend on `count`. Tars that are there already are kept. Raises
    ConfigError for a bad count or seed, StageError where `out` is no folder or holds other scenes.
    """
    settings = settings or SceneSettings()
    if count < 1:
        raise ConfigError(f"count must be at least 1 (got {count})")
    if seed < 0:
        raise ConfigError(f"seed must not be negative (got {seed})")
    folder = str(out)
    wanted = {"version": VERSION, "count": count, "seed": seed, **dataclasses.asdict(settings)}
    claim_folder(folder, SETTINGS_FILE, wanted)
    tars = []
    with Progress("drawing", "scene", count) as progress:
        for number, start in enumerate(range(0, count, settings.shard_size)):
            indices = range(start, min(count, start + settings.shard_size))
            tar = join(folder, f"scenes-{number:06d}.tar")
            if not exists(tar):
                write_tar(tar, (draw_scene(seed, index, settings) for index in indices))
            progress.add(len(indices))
            tars.append(tar)
    return tars


def draw_scene(seed: int, index: int, settings: SceneSettings) -> tuple[str, dict[str, bytes]]:
    """One scene as a sample: its key, and extension -> bytes."""
    first = index - index % settings.family
    rng = np.random.default_rng([seed, first])
    if rng.random() < settings.crops:
        scene = crop_scene(rng, settings.size)
    else:
        count = int(rng.integers(settings.min_objects, settings.max_objects + 1))
        scene = full_scene(rng, settings.size, count)
    if index > first:
        rng = np.random.default_rng([seed, index])
        scene = look_alike(scene, rng)
    caption, sentences = write_caption(scene, rng, settings.short)
    image, boxes = render(scene, rng)
    png = io.BytesIO()
    image.save(png, "PNG", compress_level=1)
    truth = {
        "seed": seed,
        "index": index,
        "size": list(scene.size_px),
        "background": {"colour": scene.background, "texture": scene.texture},
        "objects": [
            {
                "box": list(box),
                "shape": thing.shape,
                "colour": thing.colour,
                "pattern": thing.pattern,
                "accent": thing.accent,
                "size": thing.size,
                "place": thing.place,
            }
            for thing, box in zip(scene.objects, boxes, strict=True)
        ],
        "sentences": [dataclasses.asdict(sentence) for sentence in sentences],
    }
    members = {"png": png.getvalue(), "txt": caption.encode(), "json": json.dumps(truth).encode()}
    if settings.paired:
        members[PAIRS_EXTENSION] = true_pairs(scene.size_px, boxes, sentences).to_bytes()
    return f"scene-{index:06d}", members


def true_pairs(size_px: tuple[int, int], boxes: Sequence[Box], sentences: Sequence[Sentence]) -> PairRecord:
    """Each sentence that speaks of an object, with that object's box; sentences on the whole scene have no pair."""
    return PairRecord(
        size_px,
        tuple((sentence.start, sentence.end) for sentence in sentences),
        tuple(Region(box, 1.0, "truth") for box in boxes),
        tuple(
            Pair(number, sentence.object, 1.0)
            for number, sentence in enumerate(sentences)
            if sentence.object is not None
        ),
        {"source": "goal-ray scenes: the truth"},
    )
