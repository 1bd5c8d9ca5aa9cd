"""The steps that are compared, each forward, backward and optimizer on the same batch."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from open_clip.loss import ClipLoss
from torch import Tensor, nn

from goal_ray.losses import GoalModel
from goal_ray.model import LoadedModel, image_tower, text_tower
from goal_ray.settings import LossConfig
from goal_ray.step import prepare_step
from goal_ray.timing import timed
from goal_ray.train.benchmark.published import published_loss
from goal_ray.train.benchmark.work import Settings, Work

LEARNING_RATE = 5e-6
WEIGHT_DECAY = 0.05
PARTS = ("image forward", "text forward", "losses", "backward", "optimizer")


@dataclass(frozen=True)
class Competitor:
    """One way to make a step. Its phases are marked `NAME: PART` for `goal_ray.timing.measure`.

    loss     one forward
    anomaly  under torch's anomaly detection
    """

    name: str
    loss: Callable[[], Tensor]
    optimizer: torch.optim.Optimizer
    anomaly: bool = False

    def step(self) -> None:
        """One training step."""
        with torch.autograd.set_detect_anomaly(self.anomaly):
            with self._part("losses"):
                loss = self.loss()
            with self._part("backward"):
                loss.backward()
        with self._part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _part(self, part: str) -> AbstractContextManager[None]:
        return timed(f"{self.name}: {part}")


def goal(name: str, loaded: LoadedModel, work: Work, settings: Settings) -> Competitor:
    """goal_ray's step."""
    clip = own_copy(loaded.clip)
    prepare_step(clip, settings.step)
    mark_towers(name, clip)
    config = LossConfig()
    preprocess = loaded.preprocess
    model = GoalModel(clip, config, preprocess["mean"], preprocess["std"], settings.precision)
    model.to(settings.device).train()
    weights_4 = torch.tensor(config.weights(0.0), device=settings.device)

    def loss() -> Tensor:
        return (model(work.batch) * weights_4).sum()

    return Competitor(name, loss, adamw(clip, fused=settings.step.fused_adamw or None))


def plain(name: str, loaded: LoadedModel, work: Work, settings: Settings) -> Competitor:
    """The floor: open_clip's own forwards of as many pictures and texts, and one contrastive loss over them all.

    Two forwards of the text tower, each as long as its texts, and the switches of goal_ray's step.
    """
    clip = own_copy(loaded.clip)
    prepare_step(clip, settings.step)
    mark_towers(name, clip)
    contrast = ClipLoss()

    def loss() -> Tensor:
        with settings.autocast():
            images_NE = clip.encode_image(work.pictures_N3SS, normalize=True)
            texts = [encode_cut_text(clip, ids_BL) for ids_BL in (work.batch.text_BL, work.batch.sentences_ML)]
            return contrast(images_NE, torch.cat(texts), clip.logit_scale.exp())

    return Competitor(name, loss, adamw(clip, fused=settings.step.fused_adamw or None))


def published(name: str, loaded: LoadedModel, work: Work, settings: Settings) -> Competitor:
    """The published style, with no switch of goal_ray's."""
    clip = own_copy(loaded.clip)

    def loss() -> Tensor:
        with settings.autocast():
            return published_loss(clip, loaded.tokenizer, work)

    return Competitor(name, loss, adamw(clip, fused=None), anomaly=True)


COMPETITORS = {"goal": goal, "plain": plain, "published": published}


def own_copy(clip: nn.Module) -> Any:
    """A model of its own around the same weights, so that large models fit side by side."""
    return copy.deepcopy(clip, {id(parameter): parameter for parameter in clip.parameters()})


def adamw(clip: nn.Module, fused: bool | None) -> torch.optim.AdamW:
    """The optimizer of all competitors; `fused` None is PyTorch's default, which False is not."""
    return torch.optim.AdamW(clip.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)


def encode_cut_text(clip: Any, ids_BL: Tensor) -> Tensor:
    """open_clip's own embedding of texts, normalised (B, E), by a tower whose context is as long as they are."""
    tower = text_tower(clip)
    length = ids_BL.shape[1]
    prefix = "" if tower.module is clip else "text."
    cut = {f"{prefix}positional_embedding": tower.positional_embedding[:length]}
    if tower.attn_mask is not None:
        cut[f"{prefix}attn_mask"] = tower.attn_mask[:length, :length]
    return torch.func.functional_call(clip, cut, kwargs={"text": ids_BL})[1]


def mark_towers(name: str, clip: nn.Module) -> None:
    """Marks the towers' forwards as parts, from their first module to their last; projections belong to the losses."""
    visual, text = image_tower(clip), text_tower(clip)
    for part, first, last in (
        ("image forward", visual.conv1, visual.ln_post),
        ("text forward", text.token_embedding, text.ln_final),
    ):
        mark_between(f"{name}: {part}", first, last)


def mark_between(phase: str, first: nn.Module, last: nn.Module) -> None:
    """Marks the time from the start of `first` to the end of `last` as a phase."""
    running: list[AbstractContextManager[None]] = []

    def start(*_: Any) -> None:
        running.append(timed(phase))
        running[-1].__enter__()

    def stop(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    first.register_forward_pre_hook(start)
    last.register_forward_hook(stop)
