"""Matching sentences with regions by a frozen CLIP, batched over pictures. Core: no Ray."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import torch

from goal_ray.frozen_clip import FrozenClip
from goal_ray.geometry import PixelGeometry, outer_box
from goal_ray.lism.config import MatcherConfig
from goal_ray.model import load_model
from goal_ray.pairs import Pair
from goal_ray.settings import ResizeConfig
from goal_ray.text import CaptionEncoder

T = TypeVar("T")


@dataclass(frozen=True)
class MatchTask:
    """One picture (RGB, H×W×3 uint8), candidate boxes on it in its pixels (R, 4), and its sentences."""

    picture_HW3: np.ndarray
    boxes_px_R4: np.ndarray
    sentences: list[str]


class Matcher:
    """Compares sentences with the crops under candidate boxes, and picks pairs. Source: GOAL (arXiv 2503.17782).

    Each picture goes to the device once; its crops are cut and resized there.

    at_once  crops, or sentences, a pass; only speed and memory depend on it
    """

    def __init__(self, config: MatcherConfig, device: str):
        loaded = load_model(config.model)
        self.config = config
        self.at_once: tuple[int, ...] = (config.batch,)
        self.clip = FrozenClip(loaded, device, config.precision)
        self.encoder = CaptionEncoder(loaded.tokenizer)
        self.context_length = loaded.context_length
        crop = ResizeConfig(mode=config.crop_mode)
        self.geometry = PixelGeometry(crop, loaded.size_px, loaded.grid_HW, loaded.preprocess["interpolation"])

    @torch.inference_mode()
    def match(self, tasks: Sequence[MatchTask]) -> list[list[Pair]]:
        """The pairs of every task, ordered by sentence, then best first; `Pair.region` counts its candidate boxes.

        All crops go through the model together, and so do all sentences, each text once.
        """
        crops_RE = self._embed(self._crops(tasks), lambda squares: self.clip.embed_pictures(torch.stack(squares)))
        texts = list(dict.fromkeys(sentence for task in tasks for sentence in task.sentences))
        row = {text: number for number, text in enumerate(texts)}
        ids = (self.encoder.encode(text, [], self.context_length).ids for text in texts)
        texts_SE = self._embed(ids, self.clip.embed_texts)
        regions = crops_RE.split([len(task.boxes_px_R4) for task in tasks])
        return [
            pick_pairs(texts_SE[[row[sentence] for sentence in task.sentences]] @ mine_RE.T, self.config)
            for task, mine_RE in zip(tasks, regions, strict=True)
        ]

    def _crops(self, tasks: Sequence[MatchTask]) -> Iterator[torch.Tensor]:
        """The crops of all tasks as the model's squares, (3, S, S) uint8, on the device."""
        for task in tasks:
            height, width = task.picture_HW3.shape[:2]
            # A copy, since torch takes no read-only array, and what came through Ray is one.
            picture_3HW = torch.from_numpy(task.picture_HW3.copy()).to(self.clip.device).permute(2, 0, 1)
            for box in task.boxes_px_R4.tolist():
                x0, y0, x1, y1 = outer_box(box, (width, height))
                yield self.geometry.square(picture_3HW[:, y0:y1, x0:x1])

    def _embed(self, inputs: Iterable[T], embed: Callable[[list[T]], torch.Tensor]) -> torch.Tensor:
        """The embeddings, of as many inputs a pass as `at_once` says."""
        (together,) = self.at_once
        source, chunks = iter(inputs), []
        while some := list(islice(source, together)):
            chunks.append(embed(some))
        return torch.cat(chunks)


def pick_pairs(similarity_SR: torch.Tensor, config: MatcherConfig) -> list[Pair]:
    """The pairs that the config asks for, ordered by sentence, then best first; of equal ones, the first region.

    similarity_SR  cosines of a caption's sentences with a picture's candidates
    """
    values_SK, regions_SK = similarity_SR.sort(dim=1, descending=True, stable=True)
    count = min(config.regions_per_sentence, similarity_SR.shape[1])
    values_SK, regions_SK = values_SK[:, :count], regions_SK[:, :count]
    # Not `>=`: a NaN has to reach the record, which refuses it, so that the sample is quarantined.
    kept_SK = ~(values_SK < config.min_similarity)
    if config.mutual_best:
        sentences_S1 = torch.arange(len(similarity_SR), device=similarity_SR.device)[:, None]
        kept_SK &= similarity_SR.argmax(dim=0)[regions_SK] == sentences_S1
    sentences_P = kept_SK.nonzero()[:, 0]
    found = zip(sentences_P.tolist(), regions_SK[kept_SK].tolist(), values_SK[kept_SK].tolist(), strict=True)
    return [Pair(sentence, region, value) for sentence, region, value in found]
