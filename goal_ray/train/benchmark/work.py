"""What is measured: one synthetic batch, and how a step on it is to compute."""

import logging
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from goal_ray.batches import Example, collate
from goal_ray.flops import step_flops
from goal_ray.goal_batch import GoalBatch, count_batch
from goal_ray.model import LoadedModel, load_model
from goal_ray.precision import Precision, autocast
from goal_ray.settings import ModelConfig, StepConfig
from goal_ray.text import CaptionEncoder

CONTEXT = 248
CAPTION_WORDS = (85, 155)
SENTENCE_WORDS = (9, 35)
VOCABULARY = """the with near behind beside under above several two three many large small old new bright dark red blue
green yellow white black brown grey wooden metal glass stone painted empty crowded narrow wide tall low round square
street house window door roof wall bridge river lake harbour boat tree branch leaf flower garden field mountain valley
snow sand beach cloud sky sunset shadow lamp sign car bicycle train bus station market table chair plate bowl cup bottle
bread fruit apple orange dog cat horse bird sheep cow child woman man people jacket hat shirt shoes umbrella bag book
paper clock mirror curtain carpet floor standing sitting walking running holding wearing looking leaning hanging lying
covered reflected scattered arranged facing visible partly slightly towards between across along left right front
background foreground corner edge centre distance photograph balustrade windowsill cobblestones weathervane"""


@dataclass(frozen=True)
class Settings:
    """One measurement.

    model      an open_clip architecture or a .json file with one; its weights are random, its context 248
    batch      pictures, each with one local pair
    precision  of the towers' matrix products
    device     cpu or cuda
    seed       fixes weights and data
    step       the switches
    """

    model: str
    batch: int
    precision: Precision = "fp32"
    device: str = "cpu"
    seed: int = 0
    step: StepConfig = field(default_factory=StepConfig)

    def load(self) -> LoadedModel:
        """The model, on the device, in training mode."""
        logging.disable(logging.WARNING)  # open_clip warns of random weights, which are meant
        try:
            loaded = load_model(ModelConfig(self.model, context_length=CONTEXT), self.seed)
        finally:
            logging.disable(logging.NOTSET)
        loaded.clip.to(self.device).train()
        return loaded

    def autocast(self) -> torch.autocast:
        """A block in which matrix products have the precision."""
        return autocast(torch.device(self.device), self.precision)


class Work(NamedTuple):
    """One batch as the competitors want it; B pictures and as many local pairs, everything on the device.

    batch               as goal_ray's data pipeline makes it
    pictures_N3SS       pictures, then crops, normalised float32: what a data loader of open_clip's transforms gives
    captions, sentences strings; a sentence is a part of its caption
    boxes_px_M4         int64 (x0, y0, x1, y1) in pixels of the square
    longest             tokens of the longest caption and of the longest sentence
    """

    batch: GoalBatch
    pictures_N3SS: Tensor
    captions: list[str]
    sentences: list[str]
    boxes_px_M4: Tensor
    longest: tuple[int, int]

    def useful_flops(self, clip: nn.Module) -> int:
        """Of a step that takes each picture, crop, caption and sentence through its tower and back once.

        Texts count as padded to the longest, but not to a multiple of anything.
        """
        caption, sentence = self.longest
        lengths = [caption] * len(self.captions) + [sentence] * len(self.sentences)
        return step_flops(clip, len(self.pictures_N3SS), lengths)


def make_work(loaded: LoadedModel, settings: Settings) -> Work:
    """Noise with long captions of real words: 100 to 200 tokens in sentences of 10 to 40."""
    random = np.random.default_rng(settings.seed)
    size = loaded.size_px
    encoder = CaptionEncoder(loaded.tokenizer)
    patch = size // loaded.grid_HW[0]
    examples, captions, sentences, boxes_px = [], [], [], []
    for _ in range(settings.batch):
        caption, spans = draw_caption(random)
        span = spans[random.integers(len(spans))]
        box_px = draw_box(random, size)
        encoded = encoder.encode(caption, [span], CONTEXT)
        captions.append(caption)
        sentences.append(caption[slice(*span)])
        boxes_px.append(box_px)
        examples.append(
            Example(
                image_3SS=random.integers(0, 256, (3, size, size), np.uint8),
                text_L=encoded.ids,
                crops_P3SS=random.integers(0, 256, (1, 3, size, size), np.uint8),
                sentences=[encoder.encode(sentences[-1], [], CONTEXT).ids],
                boxes_P4=np.array([box_px], np.float32) / patch,
                spans_P2=encoded.spans_tokens,
            )
        )
    arrays = collate(examples, settings.step.text_multiple, CONTEXT)
    on_host: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    on_device = {name: tensor.to(settings.device) for name, tensor in on_host.items()}
    made = GoalBatch(**on_device, counts_R4=count_batch(GoalBatch(**on_host))[None])
    mean_311, std_311 = (
        torch.tensor(loaded.preprocess[name], device=settings.device).view(3, 1, 1) for name in ("mean", "std")
    )
    return Work(
        made,
        (torch.cat([made.images_B3SS, made.crops_M3SS]).float() / 255 - mean_311) / std_311,
        captions,
        sentences,
        torch.tensor(boxes_px, device=settings.device),
        (max(len(each.text_L) for each in examples), max(len(each.sentences[0]) for each in examples)),
    )


def draw_caption(random: np.random.Generator) -> tuple[str, list[tuple[int, int]]]:
    """A caption, and its sentences as (start, end) characters."""
    wanted = random.integers(*CAPTION_WORDS)
    drawn: list[str] = []
    words = 0
    while words < wanted:
        count = int(random.integers(*SENTENCE_WORDS))
        drawn.append(" ".join(random.choice(VOCABULARY.split(), count)).capitalize() + ".")
        words += count
    starts = np.cumsum([0, *(len(sentence) + 1 for sentence in drawn)])
    return " ".join(drawn), [
        (int(start), int(start) + len(sentence)) for start, sentence in zip(starts, drawn, strict=False)
    ]


def draw_box(random: np.random.Generator, size_px: int) -> tuple[int, int, int, int]:
    """A box whose sides are 20 % to 90 % of the square's, anywhere within."""
    width, height = (int(side) for side in random.integers(size_px // 5, size_px * 9 // 10, 2))
    x0, y0 = int(random.integers(size_px - width)), int(random.integers(size_px - height))
    return x0, y0, x0 + width, y0 + height
