"""Pictures, and tars as they are read and written in the tests of the shard tools."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from goal_ray.shard_urls import expand_shards
from goal_ray.shards.make import Made, ShardSize, make_shards
from goal_ray.shards.sources.detect import SourceSettings
from goal_ray.tars import stream_samples

CAPTION = "A red ball lies left. A blue box stands behind it."


def picture(form: str = "PNG", size: tuple[int, int] = (20, 16), seed: int = 0, orientation: int = 1) -> bytes:
    """An encoded picture of noise, `size` pixels as stored."""
    width, height = size
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, exif=exif)
    return stream.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    """Writes files into a folder, making the folders they need. Returns the folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def samples_in(shards: Path) -> dict[str, dict[str, bytes]]:
    """key -> members of all samples, in order."""
    return {sample.key: sample.members for url in expand_shards(str(shards)) for sample in stream_samples(url)}


def skipped(out: Path) -> list[tuple[str, str]]:
    """(key, kind) of everything that `make` skipped."""
    records = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert all(record["reason"] and record["source"] for record in records)
    return [(record["key"], record["kind"]) for record in records]


def write_members(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> None:
    """Writes a tar of any members at all, with times and owners in its headers, as other tools do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000.5, "someone"
            tar.addfile(info, io.BytesIO(data))


def members_of(path: Path) -> list[tuple[str, bytes, float, str]]:
    """(name, content, time, owner) of a tar's members."""
    with tarfile.open(path) as tar:
        return [(i.name, tar.extractfile(i).read() if i.isreg() else b"", i.mtime, i.uname) for i in tar]


def good(key: str, seed: int = 0) -> list[tuple[str, bytes]]:
    """The members of a sample without fault."""
    return [(f"{key}.png", picture(seed=seed)), (f"{key}.txt", CAPTION.encode())]


PNG, JPEG, WEBP = picture("PNG"), picture("JPEG"), picture("WEBP")


def make(source: Path, out: Path, **settings: object) -> tuple[Made, int]:
    """Makes shards of default sizes; returns what became of the source, and how many tars there are."""
    return make_shards(SourceSettings(str(source), **settings), str(out), None, ShardSize())
