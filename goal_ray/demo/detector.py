"""`python -m goal_ray.demo.detector SCENES OUT.pth`: a torchvision detector that knows drawn scenes.

The detectors that torchvision offers know photographs; this one lets `goal_ray.demo.proposers` measure one that knows
its pictures, as a user's would.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.models import get_model
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from goal_ray.cli import run_main
from goal_ray.demo.accuracy import read_truth
from goal_ray.images import decode_image
from goal_ray.model import usable_device
from goal_ray.regions.detector import DETECTORS
from goal_ray.tars import expand_shards, stream_samples

DESCRIPTION = """Train a torchvision detector from nothing to find the objects of drawn scenes: one class, and the
background. Weights go to OUT, for proposer.checkpoint with proposer.classes=2. About 5 minutes on 2 cores."""
BATCH, PEAK_LR, MAX_GRAD_NORM = 8, 1e-3, 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, writes."""
    command = argparse.ArgumentParser(
        prog="python -m goal_ray.demo.detector",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("scenes", metavar="SCENES", help="tars that `goal-ray scenes` drew; not those to be measured")
    command.add_argument("out", metavar="OUT", type=Path, help="file for the weights, .pth")
    command.add_argument(
        "--model",
        metavar="NAME",
        choices=DETECTORS,
        default="fasterrcnn_mobilenet_v3_large_320_fpn",
        help="one of torchvision's detectors (default: %(default)s)",
    )
    command.add_argument("--steps", metavar="N", type=int, default=50, help="of 8 scenes each (default: %(default)s)")
    command.add_argument("--device", metavar="D", help="cpu or cuda (default: cuda where there is one)")
    options = command.parse_args(arguments)
    model = train_detector(options.scenes, options.model, options.steps, usable_device(options.device))
    torch.save(model.state_dict(), options.out)


def train_detector(scenes: str, name: str, steps: int, device: str, seed: int = 0) -> torch.nn.Module:
    """The detector after `steps` steps of 8 scenes, in random order, each once per epoch."""
    torch.manual_seed(seed)
    pictures = list(read_boxes(scenes))
    model = get_model(name, weights=None, weights_backbone=None, num_classes=2).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    order: list[int] = []
    bar = tqdm(range(steps), unit="step", desc=name)
    for _ in bar:
        if len(order) < BATCH:
            order = torch.randperm(len(pictures)).tolist() + order
        drawn = [pictures[order.pop()] for _ in range(min(BATCH, len(pictures)))]
        images = [image.to(device) for image, _ in drawn]
        targets = [
            {"boxes": boxes.to(device), "labels": torch.ones(len(boxes), dtype=torch.int64, device=device)}
            for _, boxes in drawn
        ]
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.2f}", refresh=False)
    return model


def read_boxes(scenes: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(3, H, W) pixels in [0, 1] and (O, 4) boxes of the objects of each scene. Raises ShardError for other samples."""
    for url in expand_shards(scenes):
        for sample in stream_samples(url):
            truth = read_truth(sample, f"{url}: sample {sample.key!r}")
            yield to_tensor(decode_image(sample.image_bytes())), torch.tensor(truth.objects, dtype=torch.float32)


if __name__ == "__main__":
    run_main(main)
