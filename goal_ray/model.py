"""CLIP as GOAL needs it: any open_clip model with native towers, one forward per tower, long text.

One pass of a tower gives the pooled embedding and the tokens of the last block, before the final LayerNorm.
"""

import json
import math
import re
import textwrap
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import BadZipFile

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transformer import QuickGELU, TextTransformer, VisionTransformer, text_global_pool
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from goal_ray.errors import ConfigError, ModelError
from goal_ray.settings import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, ModelConfig
from goal_ray.weights import (
    HF_WEIGHTS_FILES,
    check_model,
    checked_architecture,
    create_model,
    empty_model,
    is_hf_folder,
    load_hf_folder,
    read_architecture,
)

KEPT_POSITIONS = 20
# What architectures and weights that do not fit make open_clip and torch raise.
WORDLESS = (AssertionError, AttributeError, ZeroDivisionError)
UNFIT = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, SafetensorError, BadZipFile, *WORDLESS)
TOKENIZER_ARGUMENTS = {"clean", "language", "strip_sep_token"}


class TowerOutput(NamedTuple):
    """What a tower makes of a batch in one pass.

    pooled_BE    embeddings, not normalised
    tokens_BND   the last block's tokens before the final LayerNorm, a vision tower's with its CLS token
    first_token  row of the first patch or text token: 1 behind a CLS token
    """

    pooled_BE: Tensor
    tokens_BND: Tensor
    first_token: int


class TextTower(NamedTuple):
    """The parts of a native text tower, wherever open_clip's class keeps them."""

    module: Any
    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    transformer: Any
    ln_final: nn.LayerNorm
    projection_DE: nn.Parameter | None
    attn_mask: Tensor | None
    pool_type: str
    eos_id: int

    @property
    def causal(self) -> bool:
        """Whether no token that counts sees what stands behind it, so that padding may be cut."""
        return self.attn_mask is not None and self.pool_type in ("argmax", "eos", "first")


def text_tower(clip: nn.Module) -> TextTower:
    """The text tower's parts, for `open_clip.CLIP` and `CustomTextCLIP` alike. Raises ModelError for other towers."""
    module: Any
    if isinstance(clip, open_clip.CLIP):
        module, pool_type, eos_id = clip, clip.text_pool_type, clip.text_eos_id
    elif isinstance(getattr(clip, "text", None), TextTransformer):
        module = clip.text
        pool_type, eos_id = module.pool_type, module.eos_id
        if module.cls_emb is not None or module.use_pad_mask:
            raise ModelError("text towers with a CLS token or a padding mask (CoCa) are not supported")
    else:
        raise ModelError(f"{type(clip).__name__} has no native open_clip text transformer; choose a model that has one")
    if pool_type == "none":
        raise ModelError("a text tower that pools nothing has no feature to compare with pictures (pool_type)")
    projection = module.text_projection
    if isinstance(projection, nn.Linear):
        raise ModelError("text projections with a bias are not supported")
    return TextTower(
        module,
        module.token_embedding,
        module.positional_embedding,
        module.transformer,
        module.ln_final,
        projection,
        module.attn_mask,
        pool_type,
        eos_id,
    )


def image_tower(clip: nn.Module) -> VisionTransformer:
    """The vision tower. Raises ModelError unless it is a native ViT without attentional pooling, on square input."""
    visual = getattr(clip, "visual", None)
    if not isinstance(visual, VisionTransformer):
        raise ModelError(
            f"vision tower {type(visual).__name__} is not open_clip's native ViT, whose patches the TSL needs"
        )
    if visual.attn_pool is not None or visual.pool_type == "none":
        raise ModelError("vision towers with attentional pooling (CoCa) are not supported")
    if not isinstance(visual.patch_dropout, nn.Identity):
        raise ModelError(
            "patch dropout removes the patches that the TSL pools; set patch_dropout to 0 in the model config"
        )
    if visual.image_size[0] != visual.image_size[1]:
        raise ModelError(f"the model reads {visual.image_size} pixels; only square input is supported")
    for side in visual.patch_size:
        if visual.image_size[0] % side:
            raise ModelError(
                f"the model reads {visual.image_size[0]} pixels, no multiple of its patches' {side}: those at the edge "
                "would be in none"
            )
    return visual


def logit_scale(clip: Any) -> Tensor:
    """What cosines are multiplied by, as the logarithm that the model learns."""
    return clip.logit_scale.detach()


def encode_image(clip: nn.Module, images_B3SS: Tensor) -> TowerOutput:
    """Embeds normalised pictures (B, 3, S, S): pooled (B, E) and tokens (B, 1 + N, D), from one pass."""
    visual = image_tower(clip)
    tokens = visual.transformer(visual._embeds(images_B3SS))
    pooled, _ = visual._pool(tokens)
    if visual.proj is not None:
        pooled = pooled @ visual.proj
    return TowerOutput(pooled, tokens, first_token=1)


def encode_text(clip: nn.Module, ids_BL: Tensor) -> TowerOutput:
    """Embeds token ids (B, L), padded with 0, of any L up to the context: pooled (B, E) and tokens (B, L, D).

    A causal tower never looks to the right, so cutting the padding is exact. A bidirectional one sees its padding; its
    ids are padded back to the context here, so that the result never depends on the batch.
    """
    if len(ids_BL) == 0:  # open_clip's custom blocks cannot shape nothing
        one = encode_text(clip, ids_BL.new_zeros(1, ids_BL.shape[1]))
        return TowerOutput(one.pooled_BE[:0], one.tokens_BND[:0], one.first_token)
    tower = text_tower(clip)
    context = tower.positional_embedding.shape[0]
    length = ids_BL.shape[1]
    if length > context:
        raise ModelError(f"text of {length} tokens exceeds the model's context of {context}")
    if not tower.causal and length < context:
        ids_BL = nn.functional.pad(ids_BL, (0, context - length))
    width = ids_BL.shape[1]
    dtype = tower.transformer.get_cast_dtype()
    x = tower.token_embedding(ids_BL).to(dtype) + tower.positional_embedding[:width].to(dtype)
    # Contiguous, or a compiled tower would be compiled twice: for the whole mask and for a part of it.
    mask = None if tower.attn_mask is None else tower.attn_mask[:width, :width].contiguous()
    tokens_BLD = tower.transformer(x, attn_mask=mask)
    pooled = text_global_pool(tower.ln_final(tokens_BLD), ids_BL, tower.pool_type, tower.eos_id)
    if tower.projection_DE is not None:
        pooled = pooled @ tower.projection_DE
    return TowerOutput(pooled, tokens_BLD[:, :length], first_token=0)


def stretch_positions(table_LD: Tensor, length: int, keep: int = KEPT_POSITIONS) -> Tensor:
    """Long-CLIP's knowledge-preserving stretch of a position table (L, D) to (length, D).

    The first `keep` rows stay. Row keep + i of the result lies at keep + i * (L - keep) / (length - keep) of the old
    table, linearly interpolated; past the last row the last slope goes on. 77 -> 248 is the published case.
    Raises ModelError unless keep + 2 <= L <= length. Source: Long-CLIP (arXiv 2403.15378), section 3.1.
    """
    old = table_LD.shape[0]
    if old < keep + 2:
        raise ModelError(
            f"cannot stretch a context of {old}: the first {keep} positions stay, and the stretch needs 2 more at least"
        )
    if old > length:
        raise ModelError(f"cannot stretch a context of {old} to {length}: the target must not be shorter")
    at = keep + torch.arange(length - keep, dtype=torch.float64) * (old - keep) / (length - keep)
    lower = at.floor().clamp(max=old - 2).long()
    fraction = (at - lower)[:, None].to(table_LD)
    lower = lower.to(table_LD.device)
    stretched = torch.lerp(table_LD[lower], table_LD[lower + 1], fraction)
    return torch.cat([table_LD[:keep], stretched])


def stretch_text(clip: Any, length: int) -> None:
    """Gives a model's text tower `length` positions, in place."""
    tower = text_tower(clip)
    old = tower.positional_embedding
    if old.shape[0] == length:
        return
    table = stretch_positions(old.detach(), length)
    tower.module.positional_embedding = nn.Parameter(table, requires_grad=old.requires_grad)
    if tower.attn_mask is not None:
        mask = torch.full((length, length), -math.inf, device=old.device).triu_(1)
        tower.module.register_buffer("attn_mask", mask, persistent=False)
    tower.module.context_length = length
    if isinstance(tower.module, TextTransformer):
        tower.module.num_pos = length
    else:
        clip.context_length = length


@dataclass(frozen=True)
class LoadedModel:
    """A CLIP and all that goes with it.

    clip        the module, float32, on the CPU
    tokenizer   open_clip's tokenizer for it
    model_cfg   open_clip's architecture description, true for the model as it is now
    preprocess  open_clip's preprocessing description: size, mean, std, interpolation
    """

    clip: nn.Module
    tokenizer: Any
    model_cfg: dict[str, Any]
    preprocess: dict[str, Any]

    @property
    def size_px(self) -> int:
        """Side of the square input."""
        return image_tower(self.clip).image_size[0]

    @property
    def grid_HW(self) -> tuple[int, int]:
        """Patch grid."""
        return image_tower(self.clip).grid_size

    @property
    def context_length(self) -> int:
        """Text positions."""
        return text_tower(self.clip).positional_embedding.shape[0]


def load_model(config: ModelConfig, seed: int = 0) -> LoadedModel:
    """Builds a CLIP from a config; `seed` fixes random weights. Raises ModelError for anything that does not fit."""
    folder = Path(config.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if folder.is_dir():
                clip, tokenizer, model_cfg = _load_folder(folder, config.weights)
            else:
                check_model(config, "model")
                model_cfg = read_architecture(config.name)
                tokenizer = _load_tokenizer(config.name, model_cfg)
                clip = create_model(config.name, model_cfg, config.weights)
        except UnpicklingError as error:
            # torch's text advises to load it all the same.
            found = str(error).rpartition("WeightsUnpickler error:")[2]
            reason = textwrap.shorten(re.split("Please use|Check the documentation", found)[0], 200)
            place = config.weights or config.name
            raise ModelError(f"{place}: refused, since it is damaged or holds more than tensors: {reason}") from None
        except UNFIT as error:
            words = f"{type(error).__name__}: {error}"
            if isinstance(error, WORDLESS):  # they name no setting, but the line of code does
                words += f" in `{traceback.extract_tb(error.__traceback__)[-1].line}`"
            # Weights that do not fit name every tensor.
            reason = textwrap.shorten(words, 500)
            weights = f" (weights {config.weights!r})" if config.weights else ""
            raise ModelError(f"cannot load model {config.name!r}{weights}: {reason}") from error
    image_tower(clip), text_tower(clip)  # refuses towers that GOAL cannot read
    _check_tokenizer(config.name, clip, tokenizer)
    if config.context_length is not None:
        stretch_text(clip, config.context_length)
    model_cfg["text_cfg"]["context_length"] = text_tower(clip).positional_embedding.shape[0]
    if any(isinstance(module, QuickGELU) for module in clip.modules()):
        model_cfg["quick_gelu"] = True
    return LoadedModel(clip, tokenizer, model_cfg, open_clip.get_model_preprocess_cfg(clip))


def _check_tokenizer(name: str, clip: nn.Module, tokenizer: Any) -> None:
    """Raises ModelError for a tokenizer whose ids the text tower cannot read."""
    tower, is_hf = text_tower(clip), isinstance(tokenizer, HFTokenizer)
    known, written = tower.token_embedding.num_embeddings, len(tokenizer.tokenizer) if is_hf else tokenizer.vocab_size
    if known < written:
        raise ModelError(
            f"{name}: its text tower knows {known} tokens (vocab_size), but its tokenizer writes {written}; set "
            "vocab_size, or name the tokenizer that it was trained with (hf_tokenizer_name)"
        )
    padding = tokenizer.tokenizer.pad_token_id if is_hf else 0
    if padding and not tower.causal:
        raise ModelError(f"{name}: its text tower sees padding, which its tokenizer writes as {padding}, not as 0")


def _load_folder(folder: Path, weights: str | None) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Model, tokenizer and architecture."""
    if weights is not None:
        raise ModelError(f"{folder} brings its own weights; leave model.weights empty")
    if not (folder / OPEN_CLIP_CONFIG).is_file() and is_hf_folder(folder):
        with _reading(folder / HF_WEIGHTS_FILES[0], SafetensorError):
            clip, model_cfg = load_hf_folder(folder)
        return clip, SimpleTokenizer(context_length=model_cfg["text_cfg"]["context_length"]), model_cfg
    for file in (OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS):
        if not (folder / file).is_file():
            raise ModelError(
                f"{folder}: no {file} in this folder; is it a checkpoint, an exported model or Hugging Face's CLIP?"
            )
    name = f"local-dir:{folder}"
    with _reading(folder / OPEN_CLIP_CONFIG, ValueError, KeyError, TypeError):
        tree = json.loads((folder / OPEN_CLIP_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    model_cfg = checked_architecture(tree, folder / OPEN_CLIP_CONFIG)
    tokenizer = _load_tokenizer(name, model_cfg)
    clip = empty_model(name)
    with _reading(folder / OPEN_CLIP_WEIGHTS, SafetensorError):
        tensors = load_file(folder / OPEN_CLIP_WEIGHTS)
    clip.load_state_dict(tensors)
    return clip, tokenizer, model_cfg


@contextmanager
def _reading(file: Path, *damage: type[Exception]) -> Iterator[None]:
    """Makes a ModelError that names the file of the errors that its contents cause."""
    try:
        yield
    except damage as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise ModelError(f"{file} is damaged ({reason}); take another checkpoint, or copy the model again") from error


def _load_tokenizer(name: str, model_cfg: dict[str, Any]) -> Any:
    """open_clip's tokenizer of a model, which never runs code that a folder brings.

    The architecture may hand arguments to Hugging Face's loader, `trust_remote_code` among them.
    """
    text_cfg = model_cfg["text_cfg"]
    if others := sorted(set(text_cfg.get("tokenizer_kwargs", {})) - TOKENIZER_ARGUMENTS):
        allowed = ", ".join(sorted(TOKENIZER_ARGUMENTS))
        raise ModelError(f"{name}: its tokenizer_kwargs may set {allowed}, but not {', '.join(others)}")
    source = text_cfg.get("hf_tokenizer_name")
    from_hub = {"trust_remote_code": False} if source else {}
    if not name.endswith(".json"):
        return open_clip.get_tokenizer(name, **from_hub)
    settings = {
        "context_length": text_cfg.get("context_length", 77),
        **text_cfg.get("tokenizer_kwargs", {}),
        **from_hub,
    }
    if source:
        return HFTokenizer(source, tokenizer_mode=text_cfg.get("tokenizer_mode"), **settings)
    return SimpleTokenizer(**settings)


def save_model(folder: Path, loaded: LoadedModel, weights: dict[str, Tensor]) -> None:
    """Writes a folder that plain open_clip loads as `local-dir:FOLDER`, with no goal_ray installed.

    weights  the state dict of `loaded.clip`, full tensors on the CPU
    """
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {key: value for key, value in loaded.preprocess.items() if value is not None}
    config = {"model_cfg": loaded.model_cfg, "preprocess_cfg": preprocess}
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / OPEN_CLIP_WEIGHTS)
    if isinstance(loaded.tokenizer, HFTokenizer):  # open_clip looks for its files in the folder alone
        loaded.tokenizer.save_pretrained(folder)


def usable_device(name: str | None) -> str:
    """The device to run on; by default a GPU where there is one. Raises ConfigError for one that is not there."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name).float().sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used here: {reason}; use cpu, or cuda on a GPU") from None
    return name
