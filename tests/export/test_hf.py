"""The Hugging Face export: transformers gives our embeddings, tokens and pixels, or the export says what it cannot."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from export_inputs import write_run
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer, basic_clean
from PIL import Image
from safetensors.torch import load_file
from tiny_architecture import shake, write_architecture
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from goal_ray.errors import ModelError
from goal_ray.export.hf import save_hf
from goal_ray.export.run import export
from goal_ray.geometry import PixelGeometry
from goal_ray.model import LoadedModel, encode_image, encode_text, load_model
from goal_ray.settings import ModelConfig, ResizeConfig

OURS = SimpleTokenizer(context_length=248)
# Two float32 implementations of the same sums, in another order.
SAME = {"atol": 1e-5, "rtol": 0.0}
CAPTIONS = {
    "plain": "A red car stands on a gravel road. Behind it, two trees and a fence; the sky is blue.",
    "digits": "In 1999 it cost $12,345.67, the 2nd of 3 at 50% off.",
    "contractions": "It's what they're here for: don't WE'LL I'VE o'clock",
    "curly quotes": "A sign says “l’été” beside the dog’s ‘house’…",
    "entities": "Salt &amp; pepper &lt;b&gt; &quot;x&quot; &#39;y&#39;&nbsp;z &amp;amp; &amp;quot;",
    "accents": "Café naïve e\u0301te\u0301 Ünïcode, ßtraße, İstanbul",
    "ligatures": "the ﬁsh ﬂies oﬀ ĳs ŉ ǆ",
    "full width": "ＡＢＣ１２３，。！（你好）　ｱｲｳ",
    "chinese and japanese": "一只红色的汽车。停在路上！日本語のテキスト。",
    "hindi and thai": "एक लाल कार सड़क पर है। รถสีแดง",
    "emoji": "a 😀 and a 👍🏽 family 👨‍👩‍👧",
    "white space": "  tab\t and\r\nline\u2028ends \u00a0 here  ",
    "invisible": "zero\u200bwidth \ufeffmark soft\u00adhyphen",
    "numbers as signs": "½ cup, x² and ① Ⅷ",
    "punctuation": "..!!?? -- 'quoted' \"twice\" (a) [b] {c} <d> a_b #tag @you",
    "empty": "",
    "long": "A very long caption that goes on and on, with details. " * 40,
}
# What needs a look at the whole text; open_clip's own cleaning beforehand mends the first three.
MENDED_BEFORE = ["the cafÃ© is open", "&eacute;t&eacute; &hellip;", "\x1b[31mred\x1b[0m sign"]
DIFFERENT = [*MENDED_BEFORE, "ΟΔΟΣ", "what <|endoftext|> spells", "ſ 'ſ"]
VARIANTS = {
    "gelu": {},
    "quick gelu": {"quick_gelu": True},
    "tanh gelu": {"vision": {"act_kwargs": {"approximate": "tanh"}}, "text": {"act_kwargs": {"approximate": "tanh"}}},
    "custom text": {"custom_text": True},
    "first end of text": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "other norms": {"vision": {"norm_kwargs": {"eps": 1e-3}}, "text": {"norm_kwargs": {"eps": 1e-2}}},
    "other widths": {"vision": {"mlp_ratio": 3.7, "head_width": 12}, "text": {"mlp_ratio": 2.0, "heads": 4}},
    "scale as a vector": {"nonscalar_logit_scale": True},
}


def make(folder: Path, **variant) -> LoadedModel:
    """A tiny model for 248 tokens, and its export in FOLDER/hf."""
    loaded = load_model(ModelConfig(write_architecture(folder, **variant), context_length=248), seed=1)
    shake(loaded.clip)
    loaded.clip.eval()
    (folder / "hf").mkdir()
    save_hf(folder / "hf", loaded)
    return loaded


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[LoadedModel, Path]:
    """A model and its export."""
    folder = tmp_path_factory.mktemp("exported")
    return make(folder), folder / "hf"


@pytest.fixture(scope="module")
def tokenizer(exported):
    """transformers' tokenizer of the export."""
    return AutoTokenizer.from_pretrained(exported[1])


def our_ids(text: str) -> list[int]:
    """The tokens of a caption in training, without padding."""
    ids = OURS([text])[0].tolist()
    return ids[: ids.index(49407) + 1]


@torch.no_grad()
@pytest.mark.parametrize("name", list(VARIANTS))
def test_transformers_gives_our_embeddings(tmp_path, name):
    loaded = make(tmp_path, **VARIANTS[name])
    model = CLIPModel.from_pretrained(tmp_path / "hf").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    images = torch.randn(3, 3, 32, 32)
    assert torch.allclose(model.get_image_features(images).pooler_output, encode_image(loaded.clip, images)[0], **SAME)
    captions = list(CAPTIONS.values())
    padded = tokenizer(captions, padding=True, truncation=True, return_tensors="pt")
    assert padded.input_ids.shape == (len(captions), 248)
    ours = encode_text(loaded.clip, loaded.tokenizer(captions, context_length=248)).pooled_BE
    assert torch.allclose(model.get_text_features(**padded).pooler_output, ours, **SAME)
    assert torch.equal(model.logit_scale, loaded.clip.logit_scale.reshape(()))


@torch.no_grad()
def test_padding_changes_no_embedding(exported, tokenizer):
    model = CLIPModel.from_pretrained(exported[1]).eval()
    short = CAPTIONS["plain"]
    alone = tokenizer([short], return_tensors="pt")
    beside = tokenizer([short, CAPTIONS["long"]], padding=True, truncation=True, return_tensors="pt")
    unmasked = {"input_ids": beside.input_ids}
    alone, *padded = (model.get_text_features(**batch).pooler_output[0] for batch in (alone, beside, unmasked))
    assert all(torch.allclose(alone, other, **SAME) for other in padded)


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_round_trip_gives_the_same_bits(tmp_path, name):
    loaded = make(tmp_path, **VARIANTS[name])
    again = load_model(ModelConfig(str(tmp_path / "hf")))
    before = {key.removeprefix("text."): tensor for key, tensor in loaded.clip.state_dict().items()}
    after = again.clip.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].reshape(after[key].shape), after[key]) for key in before)
    (tmp_path / "again").mkdir()
    save_hf(tmp_path / "again", again)
    for file in (tmp_path / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


@pytest.mark.parametrize("name", list(CAPTIONS))
def test_tokens_are_those_of_training(tokenizer, name):
    assert tokenizer(CAPTIONS[name], truncation=True).input_ids == our_ids(CAPTIONS[name])


def test_tokens_of_real_captions_are_those_of_training(tokenizer, shared):
    files = [shared / "data" / f"{name}.json" for name in ("docci_captions_1000", "urban1k_captions_150")]
    captions = [entry["caption"] for file in files for entry in json.loads(file.read_text())]
    assert tokenizer(captions, truncation=True).input_ids == [our_ids(caption) for caption in captions]


# No accents and no Cyrillic: beside curly quotes ftfy may take them for wrongly decoded text, and mend it as a whole.
@given(st.text(st.sampled_from("aeZ 中国あア，。！“”’‘…—-.,'\"!?1２ﬁ(\t\n😀"), max_size=60))
def test_tokens_of_mixed_text_are_those_of_training(tokenizer, text):
    assert tokenizer(text, truncation=True).input_ids == our_ids(text)


@pytest.mark.parametrize("text", DIFFERENT)
def test_what_the_card_says_becomes_other_tokens_does(tokenizer, text):
    """Should one of these agree some day, the card is to be mended."""
    assert tokenizer(text).input_ids != our_ids(text)


@pytest.mark.parametrize("text", MENDED_BEFORE)
def test_open_clips_cleaning_beforehand_mends_the_rest(tokenizer, text):
    assert tokenizer(basic_clean(text)).input_ids == our_ids(text)


@pytest.mark.parametrize("name", ["plain", "hindi and thai", "emoji"])
def test_the_text_of_tokens_can_be_read_back_as_in_open_clip(tokenizer, name):
    ids = our_ids(CAPTIONS[name])[1:-1]
    assert tokenizer.decode(ids) == OURS.decode(ids)


def squares(loaded: LoadedModel, processor, size: tuple[int, int], mode: str) -> tuple[np.ndarray, np.ndarray]:
    """Our square of a smooth picture of that size, and the processor's, both in 0 to 255."""
    noise = np.random.default_rng(5).integers(40, 216, (9, 7, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    ours, _ = PixelGeometry(ResizeConfig(mode=mode), loaded.size_px, loaded.grid_HW)(image, np.empty((0, 4)))
    pixels = processor(image, return_tensors="np")["pixel_values"][0]
    mean, std = (np.array(loaded.preprocess[key]).reshape(3, 1, 1) for key in ("mean", "std"))
    return ours.astype(np.float64), (pixels * std + mean) * 255


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (32, 32), (100, 33), (20, 31), (500, 120)])
def test_pixels_are_those_of_training(exported, size):
    loaded, folder = exported
    ours, pil = squares(loaded, CLIPImageProcessorPil.from_pretrained(folder), size, "shortest")
    assert np.abs(ours - pil).max() < 1e-3  # float32 of values up to 255
    ours, default = squares(loaded, CLIPImageProcessor.from_pretrained(folder), size, "shortest")
    assert np.abs(ours - default).max() < 2.001  # PIL rounds between its two passes, torchvision does not


@pytest.mark.parametrize("size", [(35, 32), (32, 39)])
def test_an_odd_margin_may_be_cut_one_pixel_beside(exported, size):
    """transformers rounds the margin down, torchvision (and open_clip) to the even number; the card says so."""
    loaded, folder = exported
    ours, theirs = squares(loaded, CLIPImageProcessorPil.from_pretrained(folder), size, "shortest")
    axis = 2 if size[0] > size[1] else 1
    kept = [slice(None)] * 3
    kept[axis] = slice(0, 31)
    assert np.abs(ours[tuple(kept)] - np.roll(theirs, -1, axis)[tuple(kept)]).max() < 1e-3


@pytest.mark.parametrize("size", [(64, 48), (35, 32)])
def test_squashed_pictures_stay_squashed(tmp_path, size):
    loaded = load_model(ModelConfig(write_architecture(tmp_path)))
    loaded.preprocess["resize_mode"] = "squash"
    save_hf(tmp_path, loaded)
    ours, pil = squares(loaded, CLIPImageProcessorPil.from_pretrained(tmp_path), size, "squash")
    assert np.abs(ours - pil).max() < 1e-3
    assert load_model(ModelConfig(write_architecture(tmp_path, "again"))).preprocess["resize_mode"] == "shortest"
    (tmp_path / "again.json").unlink()
    assert load_model(ModelConfig(str(tmp_path))).preprocess["resize_mode"] == "squash"


def test_pictures_and_captions_go_through_one_processor(exported):
    loaded, folder = exported
    processor = CLIPProcessor.from_pretrained(folder)
    captions = [CAPTIONS["curly quotes"], CAPTIONS["long"]]
    inputs = processor(text=captions, images=Image.new("RGB", (50, 40)), padding=True, truncation=True)
    assert [ids[: ids.index(49407) + 1] for ids in inputs["input_ids"]] == [our_ids(text) for text in captions]
    assert np.shape(inputs["pixel_values"]) == (1, 3, loaded.size_px, loaded.size_px)


@pytest.mark.parametrize(
    ("variant", "word"),
    [
        ({"vision": {"pool_type": "avg"}}, "vision_cfg.pool_type='avg'"),
        ({"vision": {"no_ln_pre": True}}, "vision_cfg.no_ln_pre=True"),
        ({"vision": {"ls_init_value": 0.1}}, "vision_cfg.ls_init_value=0.1"),
        ({"vision": {"qk_norm": True}}, "vision_cfg.qk_norm=True"),
        ({"text": {"ls_init_value": 0.1}}, "text_cfg.ls_init_value=0.1"),
        ({"text": {"pool_type": "last"}}, "text_cfg.pool_type='last'"),
        ({"text": {"pool_type": "eos", "eos_id": 2}}, "text_cfg.pool_type='eos'"),
        ({"text": {"no_causal_mask": True}, "custom_text": True}, "text_cfg.no_causal_mask=True"),
        ({"text": {"proj_type": "none", "width": 32}}, "text_cfg.proj_type='none'"),
        ({"text": {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "SimpleTokenizer"),
        ({"init_logit_bias": -10}, "init_logit_bias=-10"),
    ],
)
def test_what_transformers_cannot_express_is_refused_with_the_way_out(tmp_path, variant, word):
    loaded = load_model(ModelConfig(write_architecture(tmp_path, **variant)))
    (tmp_path / "hf").mkdir()
    with pytest.raises(ModelError) as error:
        save_hf(tmp_path / "hf", loaded)
    assert word in str(error.value)
    assert "--format open_clip" in str(error.value)
    assert list((tmp_path / "hf").iterdir()) == []


def test_an_exported_run_has_its_newest_weights(tmp_path, tiny_clip):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", "model.context_length=248")
    weights = load_file(export(str(run), "hf") / "model.safetensors")
    newest = load_file(run / "checkpoints" / "step-00000040" / "open_clip_model.safetensors")
    assert torch.equal(weights["text_projection.weight"].T, newest["text_projection"])
