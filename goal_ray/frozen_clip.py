"""A CLIP that only embeds. Core: torch only."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from goal_ray.model import LoadedModel, encode_image, encode_text
from goal_ray.precision import Precision, autocast, full_fp32
from goal_ray.text import pad_batch


class FrozenClip:
    """Embeds pictures and texts as float32 rows (B, E) of unit length, on `device`; no gradients.

    precision  of the towers' matrix products
    """

    def __init__(self, loaded: LoadedModel, device: str, precision: Precision):
        full_fp32()
        self.clip = loaded.clip.eval().to(device)
        self.device = torch.device(device)
        self.precision = precision
        self.mean_311 = torch.tensor(loaded.preprocess["mean"], device=device).view(3, 1, 1)
        self.std_311 = torch.tensor(loaded.preprocess["std"], device=device).view(3, 1, 1)

    @torch.inference_mode()
    def embed_pictures(self, squares_B3SS: Tensor) -> Tensor:
        """Of uint8 squares as the model reads them."""
        pixels_B3SS = squares_B3SS.to(self.device).float() / 255
        with autocast(self.device, self.precision):
            pooled_BE = encode_image(self.clip, (pixels_B3SS - self.mean_311) / self.std_311).pooled_BE
        return F.normalize(pooled_BE.float(), dim=-1)

    @torch.inference_mode()
    def embed_texts(self, ids: Sequence[np.ndarray]) -> Tensor:
        """Of token ids, each text's own length."""
        with autocast(self.device, self.precision):
            pooled_BE = encode_text(self.clip, torch.from_numpy(pad_batch(ids)).to(self.device)).pooled_BE
        return F.normalize(pooled_BE.float(), dim=-1)
