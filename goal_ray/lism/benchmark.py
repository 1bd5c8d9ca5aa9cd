"""`python -m goal_ray.lism.benchmark CHECKPOINT`: our SAM generator beside the official one, in one run."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_iou

from goal_ray.cli import run_main
from goal_ray.config import build_config
from goal_ray.images import decode_image, shrink
from goal_ray.model import usable_device
from goal_ray.precision import full_fp32
from goal_ray.regions import SamConfig
from goal_ray.regions.sam import SamProposer
from goal_ray.regions.sam_weights import load_sam
from goal_ray.regions.weights import SAM_ADVICE, find_checkpoint

DESCRIPTION = """Time goal_ray's SAM generator and `segment_anything.SamAutomaticMaskGenerator` side by side, with the
same weights, settings and pictures, and compare their boxes.

Prints, for every picture, how many boxes each finds, which share of the one's the other has with IoU >= 0.9, the
seconds of each, and their ratio. Both run once before they are timed, as often as --repeats says, in turn; the median
counts. The official one always runs in float32, as published."""
MATCH_IOU = 0.9
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
Boxes = torch.Tensor
Generator = Callable[[np.ndarray], Boxes]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, measures, prints, writes."""
    command = argparse.ArgumentParser(
        prog="python -m goal_ray.lism.benchmark",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="SAM or MobileSAM weights: .pth, .pt or .safetensors")
    command.add_argument("pictures", metavar="PICTURE", nargs="*", help="files (default: scikit-image's photographs)")
    command.add_argument("--points", metavar="N", type=int, default=32, help="points per side (default: %(default)s)")
    command.add_argument("--repeats", metavar="N", type=int, default=1, help="timed runs (default: %(default)s)")
    command.add_argument(
        "--max-side", metavar="PX", type=int, default=2048, help="larger pictures are shrunk (default: %(default)s)"
    )
    command.add_argument("--precision", metavar="P", default="fp32", help="ours in fp32, bf16 or fp16 (default: fp32)")
    command.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--out", metavar="FILE", type=Path, help="also write the numbers as JSON")
    options = command.parse_args(arguments)
    values = {"checkpoint": options.checkpoint, "points_per_side": options.points, "precision": options.precision}
    config = build_config(SamConfig, values, source="benchmark")
    images = read_pictures(options.pictures, options.max_side)
    result = compare(config, images, usable_device(options.device), max(1, options.repeats))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def read_pictures(files: Sequence[str], max_side_px: int) -> dict[str, np.ndarray]:
    """Name -> RGB picture, of the files, or else of scikit-image."""
    if files:
        return {name: np.asarray(shrink(decode_image(Path(name).read_bytes()), max_side_px)) for name in files}
    import skimage.data

    return {name: getattr(skimage.data, name)() for name in PHOTOGRAPHS}


def compare(config: SamConfig, images: dict[str, np.ndarray], device: str, repeats: int) -> dict[str, Any]:
    """Measures both generators on every picture; prints a line each, and returns all numbers."""
    both = generators(config, device)
    rows = []
    print(f"{'picture':<24}{'boxes':>12}{'matched':>16}{'official, s':>13}{'ours, s':>10}{'ratio':>8}")
    for name, image in images.items():
        found = matched(*(generate(image) for generate in both.values()))
        times = time_in_turn(both, image, repeats)
        ratio = times["official"] / times["ours"]
        rows.append({"picture": name, "size": image.shape[1::-1], **found, "seconds": times, "ratio": ratio})
        counts = f"{found['official']} / {found['ours']}"
        shares = f"{100 * found['official_matched']:.0f} % / {100 * found['ours_matched']:.0f} %"
        seconds = f"{times['official']:>13.2f}{times['ours']:>10.2f}"
        print(f"{name[-23:]:<24}{counts:>12}{shares:>16}{seconds}{ratio:>8.2f}", flush=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": torch.get_num_threads(),
        "points": config.points_per_side,
        "precision": config.precision,
        "torch": torch.__version__,
        "pictures": rows,
    }


def generators(config: SamConfig, device: str) -> dict[str, Generator]:
    """The official generator and ours, each with a model of its own."""
    from segment_anything import SamAutomaticMaskGenerator

    full_fp32()
    path = find_checkpoint(config.checkpoint, SAM_ADVICE)
    official = SamAutomaticMaskGenerator(load_sam(path).to(device), points_per_side=config.points_per_side)
    ours = SamProposer(load_sam(path).to(device), config)
    return {"official": partial(official_boxes, official), "ours": partial(our_boxes, ours)}


def our_boxes(proposer: SamProposer, image: np.ndarray) -> Boxes:
    """(R, 4), edges of pixels."""
    return torch.from_numpy(proposer.propose([image])[0].boxes_px)


def official_boxes(generator: Any, image: np.ndarray) -> Boxes:
    """(R, 4) of the official generator, whose boxes end at the last pixel inside, as edges of pixels."""
    found = [mask["bbox"] for mask in generator.generate(image)]
    boxes_R4 = torch.tensor(found, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes_R4[:, :2], boxes_R4[:, :2] + boxes_R4[:, 2:] + 1], dim=1)


def matched(official_R4: Boxes, ours_R4: Boxes) -> dict[str, Any]:
    """Counts, and the share of each one's boxes that have one of the other's at IoU >= 0.9 (1 where there is none)."""
    iou = box_iou(official_R4, ours_R4)

    def share(best: torch.Tensor) -> float:
        return (best >= MATCH_IOU).float().mean().item() if len(best) else 1.0

    both = len(official_R4) and len(ours_R4)
    return {
        "official": len(official_R4),
        "ours": len(ours_R4),
        "official_matched": share(iou.amax(1) if both else torch.zeros(len(official_R4))),
        "ours_matched": share(iou.amax(0) if both else torch.zeros(len(ours_R4))),
    }


def time_in_turn(both: dict[str, Generator], image: np.ndarray, repeats: int) -> dict[str, float]:
    """Median seconds of each; they take turns, so that a machine that slows down slows both."""
    times: dict[str, list[float]] = {name: [] for name in both}
    for _ in range(repeats):
        for name, generate in both.items():
            began = time.perf_counter()
            generate(image)  # its boxes are on the CPU, so the device has finished
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    run_main(main)
