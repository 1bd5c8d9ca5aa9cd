"""`python -m goal_ray.demo.detector SCENES WEIGHTS`: a small object detector that knows drawn scenes."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import get_model

from goal_ray.atomic import open_atomic
from goal_ray.cli import parser, run_main
from goal_ray.demo.accuracy import read_truth
from goal_ray.images import decode_image
from goal_ray.progress import Progress
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import stream_samples
from goal_ray.train.config import OptimizerConfig

DESCRIPTION = """Train a torchvision detector, from nothing, to box the objects of drawn scenes; it knows one class.

SCENES is a tar, or a folder of tars, that `goal-ray scenes` drew; WEIGHTS gets a state dict for the proposer
`name=detector model=… checkpoint=WEIGHTS classes=2`, which `python -m goal_ray.demo.proposers` compares with others."""
CLASSES = 2  # the background and an object
WARMUP_STEPS = 50
Target = dict[str, Tensor]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the command line, trains, writes the weights."""
    places = {"SCENES": "drawn tars", "WEIGHTS": "file for the state dict"}
    example = "goal-ray scenes drawn --count 1200 --seed 7 && python -m goal_ray.demo.detector drawn detector.pth"
    command = parser("detector", DESCRIPTION, example, places, prog="python -m goal_ray.demo.detector")
    command.add_argument(
        "--model",
        metavar="NAME",
        default="ssdlite320_mobilenet_v3_large",
        help="one of torchvision's detection models (default: %(default)s)",
    )
    command.add_argument("--steps", metavar="N", type=int, default=1500, help="batches (default: %(default)s)")
    command.add_argument("--batch", metavar="N", type=int, default=16, help="scenes in each (default: %(default)s)")
    command.add_argument("--lr", metavar="R", type=float, default=1e-3, help="AdamW's peak (default: %(default)s)")
    command.add_argument(
        "--seed", type=int, default=0, help="of the first weights and the order (default: %(default)s)"
    )
    options = command.parse_args(arguments)
    state = train_detector(options.scenes, options.model, options.steps, options.batch, options.lr, options.seed)
    with open_atomic(options.weights) as file:
        torch.save(state, file)
    print(f"weights of {options.model}: {options.weights}")


def train_detector(scenes: str, model: str, steps: int, batch: int, lr: float, seed: int) -> dict[str, Tensor]:
    """The weights of a detector after `steps` batches of scenes; the learning rate ends at 0."""
    torch.manual_seed(seed)
    detector: Any = get_model(model, weights=None, weights_backbone=None, num_classes=CLASSES).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr, weight_decay=1e-2)
    rates = OptimizerConfig(warmup_steps=WARMUP_STEPS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rates.lr_factor(step, steps))
    batches = endless_batches(read_scenes(scenes), batch, seed)
    with Progress(model, "step", steps) as progress:
        for _ in range(steps):
            pictures, targets = next(batches)
            loss = sum(detector(pictures, targets).values())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(detector.parameters(), 10.0)
            optimizer.step()
            schedule.step()
            progress.add(1, f"loss {loss.item():.3f}")
    return {name: tensor.cpu() for name, tensor in detector.state_dict().items()}


def read_scenes(scenes: str) -> list[tuple[Tensor, Tensor]]:
    """Every scene: the picture, uint8 (3, H, W), and the boxes of its objects in its pixels, float32 (O, 4)."""
    found = []
    for url in expand_shards(scenes):
        for sample in stream_samples(url):
            truth = read_truth(sample, f"{url}: sample {sample.key!r}")
            picture_HW3 = np.array(decode_image(sample.image_bytes()))
            found.append((torch.from_numpy(picture_HW3).permute(2, 0, 1), torch.tensor(truth.objects)))
    return found


def endless_batches(
    scenes: list[tuple[Tensor, Tensor]], batch: int, seed: int
) -> Iterator[tuple[list[Tensor], list[Target]]]:
    """Random scenes, half of them mirrored, as torchvision's detectors take them."""
    chance = random.Random(seed)
    while True:
        pictures, targets = [], []
        for picture, boxes_O4 in chance.choices(scenes, k=batch):
            if chance.random() < 0.5:
                picture, boxes_O4 = mirrored(picture, boxes_O4)
            pictures.append(picture.float() / 255)
            targets.append({"boxes": boxes_O4, "labels": torch.ones(len(boxes_O4), dtype=torch.int64)})
        yield pictures, targets


def mirrored(picture: Tensor, boxes_O4: Tensor) -> tuple[Tensor, Tensor]:
    """A picture and its boxes with left and right exchanged."""
    x0, y0, x1, y1 = boxes_O4.unbind(1)
    width = picture.shape[2]
    return picture.flip(2), torch.stack([width - x1, y0, width - x0, y1], dim=1)


if __name__ == "__main__":
    run_main(main)
