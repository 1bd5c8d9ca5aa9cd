"""`python -m goal_ray.train.ingest_benchmark`: the ingest alone, beside plain webdataset, on the same tars."""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from goal_ray.batches import ExampleBuilder
from goal_ray.cli import run_main
from goal_ray.cores import usable_cores
from goal_ray.errors import StageError
from goal_ray.geometry import PixelGeometry
from goal_ray.goal_batch import unpack
from goal_ray.order import BatchOrder
from goal_ray.ray_session import ray_session
from goal_ray.settings import ResizeConfig
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import CAPTION_EXTENSION, IMAGE_EXTENSIONS, PAIRS_EXTENSION
from goal_ray.text import CaptionEncoder
from goal_ray.train.ingest import BatchReader, pickled, stream_batches
from goal_ray.train.photo_tars import write_photo_tars
from goal_ray.train.scan import scan_shard, scan_shards

DESCRIPTION = """How many samples a second the training ingest makes, without any training.

Three ways turn the same tars into batches of picture, best region, caption and its sentence, 224 pixels and at most
248 tokens, in turn, several times:

  ray         goal_ray's ingest as training uses it: Ray Data tasks on all CPUs of this machine
  function    the same work as a plain function in one process: what one core can do at most
  webdataset  the usual way: webdataset and torch's DataLoader with as many worker processes as there are CPUs, each
              picture decoded whole, open_clip's own transform for picture and crop, its tokenizer padded to 248

Prints seconds until the first batch, then samples per second and core (median, lowest to highest), the ratio to
webdataset's, and the same for seconds of CPU time of all processes, which other work on the machine changes less.
Without --shards it makes photographs of its own, of two sizes."""
MODEL, SIZE_PX, GRID_HW, CONTEXT = "ViT-B-16", 224, (14, 14), 248
PICTURES = {"1500x1000": (1500, 1000), "600x400": (600, 400)}
SHARDS_PER_CPU = 4
# More batches than any measurement reads.
ENDLESS = 10**6


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, makes tars, measures, prints, writes."""
    command = argparse.ArgumentParser(
        prog="python -m goal_ray.train.ingest_benchmark",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--shards", metavar="SHARDS", help="paired tars (folder, file, glob) instead of its own")
    command.add_argument("--samples", metavar="N", type=int, default=256, help="pictures a size (default: %(default)s)")
    command.add_argument("--batch", metavar="N", type=int, default=16, help="samples a batch (default: %(default)s)")
    command.add_argument("--seconds", metavar="S", type=float, default=10, help="of each run (default: %(default)s)")
    command.add_argument("--repeats", metavar="N", type=int, default=3, help="runs of each (default: %(default)s)")
    command.add_argument("--out", metavar="FILE", type=Path, help="also write the numbers as JSON")
    options = command.parse_args(arguments)
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise StageError("there is no webdataset to compare with; pip install 'webdataset>=1.0'") from None
    torch.set_num_threads(1)  # as in Ray's tasks and in DataLoader's workers
    with tempfile.TemporaryDirectory() as folder:
        sets = {options.shards: expand_shards(options.shards)} if options.shards else {}
        for name, size in {} if options.shards else PICTURES.items():
            print(f"making {options.samples} photographs of {name}", flush=True)
            (Path(folder) / name).mkdir()
            shards = SHARDS_PER_CPU * usable_cores()
            tars = write_photo_tars(Path(folder) / name, size, options.samples, shards, common_words())
            sets[name] = tars
        columns = f"{'samples/s/core':>16}{'lowest to highest':>20}{'ratio':>7}{'samples/CPU-s':>15}{'ratio':>7}"
        print(f"{'tars':<12}{'way':<12}{'first batch, s':>15}{columns}")
        rows = [
            row
            for name, tars in sets.items()
            for row in compare(name, tars, options.batch, options.seconds, max(1, options.repeats))
        ]
    if options.out is not None:
        packages = ("torch", "torchvision", "pillow", "ray", "webdataset", "open_clip_torch")
        result = {
            "cores": usable_cores(),
            "batch": options.batch,
            "versions": {package: version(package) for package in packages},
            "runs": rows,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def common_words() -> list[str]:
    """English words, the frequent ones first: the tokens of CLIP's tokenizer that are words, in their order."""
    words = [token.removesuffix("</w>") for token in tokenizer().encoder if token.endswith("</w>")]
    return [word for word in words if word.isascii() and word.isalpha() and len(word) > 1]


def tokenizer() -> Any:
    """The tokenizer of all three ways."""
    import open_clip

    return open_clip.get_tokenizer(MODEL)


class Measured(NamedTuple):
    """One run: seconds until the first batch; then samples, wall seconds, and CPU seconds of all processes."""

    first_batch_s: float
    samples: int
    wall_s: float
    cpu_s: float


def compare(name: str, urls: list[str], batch: int, seconds: float, repeats: int) -> list[dict[str, Any]]:
    """Measures the three ways on a set of tars, in turn, so that a machine that slows down slows all.

    Prints a line for each.
    """
    streams = {"ray": ray_batches, "function": function_batches, "webdataset": webdataset_batches}
    measured: dict[str, list[Measured]] = {way: [] for way in streams}
    for _ in range(repeats):
        for way, stream in streams.items():
            measured[way].append(measure(stream(urls, batch), seconds))
    per_core, per_cpu_s = {}, {}
    for way, runs in measured.items():
        cores = 1 if way == "function" else usable_cores()
        per_core[way] = [run.samples / run.wall_s / cores for run in runs]
        per_cpu_s[way] = [run.samples / run.cpu_s for run in runs]
    rows = []
    for way, runs in measured.items():
        first = statistics.median(run.first_batch_s for run in runs)
        rates, ratio = per_core[way], ratio_of_medians(per_core, way)
        cpu_rate, cpu_ratio = statistics.median(per_cpu_s[way]), ratio_of_medians(per_cpu_s, way)
        spread = f"{min(rates):.1f} to {max(rates):.1f}"
        shown = f"{first:>15.1f}{statistics.median(rates):>16.1f}{spread:>20}{ratio:>7.2f}"
        print(f"{name[-11:]:<12}{way:<12}{shown}{cpu_rate:>15.1f}{cpu_ratio:>7.2f}", flush=True)
        rows.append(
            {
                "tars": name,
                "way": way,
                "samples_per_s_and_core": rates,
                "samples_per_cpu_s": per_cpu_s[way],
                "ratio_per_core": ratio,
                "ratio_per_cpu_s": cpu_ratio,
                "runs": [run._asdict() for run in runs],
            }
        )
    return rows


def ratio_of_medians(rates: dict[str, list[float]], way: str) -> float:
    """A way's median over webdataset's."""
    return statistics.median(rates[way]) / statistics.median(rates["webdataset"])


def measure(batches: Generator[int, None, None], seconds: float) -> Measured:
    """Runs a stream of the sizes of batches for some seconds after its first, then ends it.

    What was made ahead of the first batch would count as fast: it is read before the clock starts.
    """
    began = time.perf_counter()
    next(batches)
    first = time.perf_counter() - began
    warm_until = time.perf_counter() + seconds / 2
    while time.perf_counter() < warm_until:
        next(batches)
    since, cpu_since, samples = time.perf_counter(), cpu_seconds(os.getpid()), 0
    while (elapsed := time.perf_counter() - since) < seconds:
        samples += next(batches)
    cpu_s = cpu_seconds(os.getpid()) - cpu_since
    batches.close()
    return Measured(first, samples, elapsed, cpu_s)


def cpu_seconds(root: int) -> float:
    """CPU time in seconds of the process ``root`` and all that descend from it, ended children included; Linux only.

    All of Ray's processes descend from the one that started it. Those that end after their parent are not counted.
    """
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            process = int(entry.parent.name)
            children.setdefault(int(fields[1]), []).append(process)
            ticks[process] = sum(map(int, fields[11:15]))  # its own, and those of children it waited for
    tree = [root]
    for process in tree:
        tree += children.get(process, [])
    return sum(ticks.get(process, 0) for process in tree) / os.sysconf("SC_CLK_TCK")


def make_reader(urls: list[str], counts: Sequence[int], batch: int, indexes: tuple[Any, ...] | None) -> BatchReader:
    """goal_ray's reader with the settings of a published run."""
    geometry = PixelGeometry(ResizeConfig(), SIZE_PX, GRID_HW)
    builder = pickled(ExampleBuilder(geometry, geometry, CaptionEncoder(tokenizer()), CONTEXT, pairs=1))
    order = BatchOrder(tuple(counts), batch, seed=0, window_shards=16)
    return BatchReader(tuple(urls), order, 0, 1, 1, builder, indexes)


def ray_batches(urls: list[str], batch: int) -> Generator[int, None, None]:
    """The ingest as training uses it."""
    with ray_session():
        scan = scan_shards(urls, needs_pairs=True)
        for packed, _ in stream_batches(make_reader(urls, scan.counts, batch, scan.indexes), 0, ENDLESS):
            yield len(unpack(packed).images_B3SS)


def function_batches(urls: list[str], batch: int) -> Generator[int, None, None]:
    """The same work in this process."""
    reader = make_reader(urls, [len(scan_shard(url, needs_pairs=True)) for url in urls], batch, None)
    for number in range(ENDLESS):
        yield len(unpack(reader({"id": number})["batch"]).images_B3SS)


class UsualPreparation:
    """A webdataset sample as four tensors, in the usual way."""

    def __init__(self) -> None:
        import open_clip

        self.transform = open_clip.image_transform(SIZE_PX, is_train=False)
        self.tokenizer = tokenizer()

    def __call__(self, sample: dict[str, bytes]) -> tuple[torch.Tensor, ...]:
        stored = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        caption, record = sample[CAPTION_EXTENSION].decode(), json.loads(sample[PAIRS_EXTENSION])
        pair = max(record["pairs"], key=lambda pair: pair["similarity"])
        crop = image.crop(record["regions"][pair["region"]]["box"])
        start, end = record["sentences"][pair["sentence"]]
        text, sentence = self.tokenizer([caption, caption[start:end]], CONTEXT)
        return self.transform(image), self.transform(crop), text, sentence


@dataclass
class Until:
    """Ends a stream of samples once an event is set. Worker processes that are stopped otherwise abort with noise."""

    stop: Any

    def __call__(self, samples: Iterator[Any]) -> Iterator[Any]:
        return takewhile(lambda _: not self.stop.is_set(), samples)


def webdataset_batches(urls: list[str], batch: int) -> Generator[int, None, None]:
    """Plain webdataset with torch's DataLoader."""
    import webdataset

    context = torch.multiprocessing.get_context("spawn")  # Ray's threads do not survive a fork
    stop = context.Event()
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).repeat().shuffle(100)
    loader = torch.utils.data.DataLoader(
        dataset.compose(Until(stop)).map(UsualPreparation()).batched(batch),
        batch_size=None,
        num_workers=usable_cores(),
        multiprocessing_context=context,
        prefetch_factor=4,
    )
    batches = iter(loader)
    try:
        for pictures, *_ in batches:
            yield len(pictures)
    finally:
        stop.set()
        deque(batches, maxlen=0)


if __name__ == "__main__":
    run_main(main)
