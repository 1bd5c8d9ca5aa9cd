"""`python cluster/scaling.py`: what grows with the number of images, measured on this machine where that can be.

Prints the tables of SCALING.md. Small things are measured and multiplied; the reading order is made at full size. What
a storage or a network takes is an assumption, given by options.
"""

import argparse
import io
import json
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image

from goal_ray.lism.counts import ShardCounts
from goal_ray.lism.picks import Pick, Picks
from goal_ray.order import BatchOrder
from goal_ray.tar_index import index_url, make_index
from goal_ray.tars import write_tar
from goal_ray.train.scan import scan_shard

SCALES = (10**6, 10**8, 10**9)
MODELS = ("ViT-B-16", "ViT-L-14", "ViT-H-14")
SAMPLES = 10_000
CAPTION_LENGTH, REGIONS, SENTENCES = 700, 20, 7


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """(result, seconds, bytes that it keeps) of some work."""
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    tracemalloc.start()
    result = work()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, seconds, kept


class ScanCosts(NamedTuple):
    """Per sample, on a tar of the local disk: seconds by headers and by an index, bytes of the index and in memory."""

    headers_s: float
    indexed_s: float
    stored_bytes: float
    held_bytes: float


def measure_scan(folder: Path) -> ScanCosts:
    """What it takes to find the samples of a tar."""
    stream = io.BytesIO()
    Image.new("RGB", (32, 32)).save(stream, "JPEG")
    sizes = np.random.default_rng(0).integers(2000, 4000, SAMPLES)
    members = {"jpg": stream.getvalue(), "txt": b"x" * CAPTION_LENGTH}
    tar = str(folder / "a.tar")
    write_tar(tar, ((f"sample-{n:09d}", {**members, "pairs.json": bytes(size)}) for n, size in enumerate(sizes)))
    index, headers_s, _ = measured(lambda: scan_shard(tar, needs_pairs=True))
    make_index(tar)
    _, indexed_s, _ = measured(lambda: scan_shard(tar, needs_pairs=True))
    arrays = (index.keys_S, index.members_SM, index.places_SM2)
    held, stored = sum(array.nbytes for array in arrays), Path(index_url(tar)).stat().st_size
    return ScanCosts(headers_s / SAMPLES, indexed_s / SAMPLES, stored / SAMPLES, held / SAMPLES)


def measure_order(tars: int, samples_per_tar: int, batch: int) -> tuple[float, int]:
    """(seconds until the first batch of an epoch is known, bytes held for it) in a process that makes batches."""
    counts = (samples_per_tar,) * tars
    order = BatchOrder(counts, batch, seed=0, window_shards=16)
    epochs = iter(range(10))
    _, seconds, kept = measured(lambda: order.micro_batch(next(epochs) * order.steps_per_epoch, 0, 1, 1))
    return seconds, kept + 8 * tars


def measure_record() -> tuple[int, int]:
    """(bytes of the record of a finished shard on the storage, bytes that LISM's driver holds of it)."""

    def make() -> ShardCounts:
        counts, picks = ShardCounts(10**9), list[Pick]()
        for number in range(SAMPLES):
            similarities = np.random.default_rng(number).uniform(0.1, 0.4, SENTENCES).tolist()
            counts.add_pairs(REGIONS, SENTENCES, similarities, whole_image=1, paired_sentences=SENTENCES)
            picks += [Pick("train-000000.tar", number, f"{number:09d}", n, n, s) for n, s in enumerate(similarities)]
        counts.picks = Picks.among(picks)
        return counts

    counts, _, kept = measured(make)
    return len(json.dumps(asdict(counts))), kept


def count_parameters(name: str) -> int:
    """The parameters of an open_clip model, without making them."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in open_clip.create_model(name, device="meta").parameters())


def amount(number: float, unit: str = "B") -> str:
    """A number with three digits and a prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {prefix}{unit}"
        number /= 1000
    return f"{number:.3g} P{unit}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.2g} s"


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    """A Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")


def print_data(options: argparse.Namespace) -> None:
    """What grows with the images."""
    with tempfile.TemporaryDirectory() as folder:
        scan = measure_scan(Path(folder))
    record_bytes, held_bytes = measure_record()
    tars = [scale // options.samples_per_tar for scale in SCALES]
    orders = [measure_order(count, options.samples_per_tar, options.batch) for count in tars]
    reading_s = options.bytes_per_sample / options.node_bytes_per_s
    rows = [
        ["tars", *(amount(count, "") for count in tars)],
        ["bytes", *(amount(scale * options.bytes_per_sample) for scale in SCALES)],
        ["listing the tars", *(duration(-(-count // 1000) * options.request_s) for count in tars)],
        [f"index files, {scan.stored_bytes:.0f} B a sample", *(amount(scale * scan.stored_bytes) for scale in SCALES)],
        [
            f"scan by them, {1e6 * scan.indexed_s:.0f} µs a sample and CPU",
            *(
                duration(scale * scan.indexed_s / options.cpus + 2 * count * options.request_s / options.cpus)
                for scale, count in zip(SCALES, tars, strict=True)
            ),
        ],
        [
            f"scan without, of local tars: headers, {1e6 * scan.headers_s:.0f} µs a sample and CPU",
            *(duration(scale * scan.headers_s / options.cpus) for scale in SCALES),
        ],
        ["scan without, of remote tars: all bytes", *(duration(scale * reading_s / options.nodes) for scale in SCALES)],
        [
            f"where samples lie, in the object stores, {scan.held_bytes:.0f} B a sample",
            *(amount(scale * scan.held_bytes) for scale in SCALES),
        ],
        ["first batch of an epoch, in each process", *(duration(seconds) for seconds, _ in orders)],
        ["order, in each process", *(amount(kept) for _, kept in orders)],
        [f"LISM: records of finished tars, {record_bytes} B each", *(amount(count * record_bytes) for count in tars)],
        [f"LISM: held by the driver, {held_bytes} B a tar", *(amount(count * held_bytes) for count in tars)],
        ["LISM: reading the records to go on", *(duration(count * options.request_s / 32) for count in tars)],
    ]
    print_table(
        f"{options.samples_per_tar:,} samples a tar of {amount(options.bytes_per_sample)} each; {options.cpus} CPUs on "
        f"{options.nodes} nodes of {amount(options.node_bytes_per_s)}/s; {1000 * options.request_s:.0f} ms a request",
        ["", *(f"{scale:.0e} images".replace("e+0", "e") for scale in SCALES)],
        rows,
    )


def print_models(options: argparse.Namespace) -> None:
    """What grows with the model and the number of GPUs."""
    rows = []
    for name in MODELS:
        count = count_parameters(name)
        width = open_clip.get_model_config(name)["embed_dim"]
        gathered = options.batch * 2 * 2 * width * 4
        logits = 2 * 2 * options.batch // options.gpus * options.batch * 4
        rows.append(
            [
                name,
                amount(count, ""),
                amount(12 * count),
                duration(12 * count / options.disk_bytes_per_s),
                amount(16 * count),
                amount(8 * count + 12 * count / options.gpus),
                amount(4 * count),
                amount(gathered),
                amount(logits),
            ]
        )
    print_table(
        f"A global batch of {options.batch:,} pictures with a local pair each on {options.gpus} GPUs; "
        f"{amount(options.disk_bytes_per_s)}/s to the shared folder",
        [
            "",
            "parameters",
            "checkpoint",
            "its writing, in the background",
            "weights, gradients and AdamW, a GPU, ZeRO 0",
            "the same, ZeRO 1",
            "gradients, a GPU and step",
            "features gathered, a GPU and step",
            "logits, a GPU",
        ],
        rows,
    )


def main() -> None:
    """Parses the assumptions and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples-per-tar", type=int, default=10_000)
    parser.add_argument("--bytes-per-sample", type=float, default=2e5)
    parser.add_argument("--cpus", type=int, default=256, help="of all decode nodes")
    parser.add_argument("--nodes", type=int, default=8, help="decode nodes")
    parser.add_argument("--node-bytes-per-s", type=float, default=1e9, help="from the storage to a node")
    parser.add_argument("--request-s", type=float, default=0.1, help="an answer of the storage")
    parser.add_argument("--disk-bytes-per-s", type=float, default=5e8, help="from a node to storage_path")
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--gpus", type=int, default=64)
    options = parser.parse_args()
    print_data(options)
    print_models(options)


if __name__ == "__main__":
    main()
