"""Matching sentences with regions by a frozen CLIP, batched over pictures. Core: no Ray."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from goal_ray.geometry import PixelGeometry, ResizeConfig, crop_box
from goal_ray.lism.config import MatcherConfig
from goal_ray.model import encode_image, encode_text, load_model
from goal_ray.pairs import Pair
from goal_ray.text import CaptionEncoder, pad_batch


@dataclass(frozen=True)
class MatchTask:
    """One picture (RGB, H×W×3 uint8), candidate boxes on it in its pixels (R, 4), and its sentences."""

    picture_HW3: np.ndarray
    boxes_px_R4: np.ndarray
    sentences: list[str]


class Matcher:
    """Finds for every sentence the candidate box whose crop is most similar to it (METHOD, step 1.4)."""

    def __init__(self, config: MatcherConfig, device: str):
        loaded = load_model(config.model)
        self.clip = loaded.clip.eval().to(device)
        self.device = device
        self.batch = config.batch
        self.encoder = CaptionEncoder(loaded.tokenizer)
        self.context_length = loaded.context_length
        crop = ResizeConfig(mode=config.crop_mode)
        self.geometry = PixelGeometry(crop, loaded.size_px, loaded.grid_HW, loaded.preprocess["interpolation"])
        self.mean = torch.tensor(loaded.preprocess["mean"], device=device).view(3, 1, 1)
        self.std = torch.tensor(loaded.preprocess["std"], device=device).view(3, 1, 1)

    @torch.inference_mode()
    def match(self, tasks: Sequence[MatchTask]) -> list[list[Pair]]:
        """For every task one Pair per sentence, in order; `Pair.region` counts its candidate boxes."""
        images = [Image.fromarray(task.picture_HW3) for task in tasks]
        crops_RE = self._embed_crops(
            [(image, box) for image, task in zip(images, tasks, strict=True) for box in task.boxes_px_R4]
        )
        texts = list(dict.fromkeys(sentence for task in tasks for sentence in task.sentences))
        row = {text: number for number, text in enumerate(texts)}
        texts_SE = self._embed_texts(texts)
        pairs, first = [], 0
        for task in tasks:
            mine_RE = crops_RE[first : first + len(task.boxes_px_R4)]
            first += len(task.boxes_px_R4)
            similarity_SR = texts_SE[[row[sentence] for sentence in task.sentences]] @ mine_RE.T
            best_S, region_S = similarity_SR.max(dim=1)
            found = zip(region_S.tolist(), best_S.tolist(), strict=True)
            pairs.append([Pair(sentence, region, value) for sentence, (region, value) in enumerate(found)])
        return pairs

    def _embed_crops(self, crops: Sequence[tuple[Image.Image, np.ndarray]]) -> torch.Tensor:
        chunks = []
        for start in range(0, len(crops), self.batch):
            squares = [
                self.geometry(crop_box(image, tuple(box)), np.empty((0, 4)))[0]
                for image, box in crops[start : start + self.batch]
            ]
            pixels = torch.from_numpy(np.stack(squares)).to(self.device)
            scaled = (pixels.float() / 255 - self.mean) / self.std
            chunks.append(F.normalize(encode_image(self.clip, scaled).pooled_BE.float(), dim=-1))
        return torch.cat(chunks)

    def _embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        ids = [self.encoder.encode(text, [], self.context_length).ids for text in texts]
        chunks = []
        for start in range(0, len(ids), self.batch):
            batch_BL = torch.from_numpy(pad_batch(ids[start : start + self.batch])).to(self.device)
            chunks.append(F.normalize(encode_text(self.clip, batch_BL).pooled_BE.float(), dim=-1))
        return torch.cat(chunks)
