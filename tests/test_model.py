"""One forward per tower, long text, and folders that plain open_clip loads."""

import json
import shutil
from contextlib import nullcontext

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from tiny_architecture import write_architecture

from goal_ray.errors import ModelError
from goal_ray.export.run import FORMATS
from goal_ray.model import encode_image, encode_text, load_model, save_model, stretch_positions
from goal_ray.settings import ModelConfig

VARIANTS = {
    "clip": {},
    "custom text": {"custom_text": True},
    "bidirectional": {"custom_text": True, "text": {"no_causal_mask": True, "pool_type": "last"}},
    "average pooling": {"vision": {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}},
    "quick gelu": {"quick_gelu": True},
    "custom blocks": {"text": {"scale_attn": True}, "vision": {"qk_norm": True}},
}


@pytest.fixture(params=list(VARIANTS))
def variant(request, tmp_path):
    loaded = load_model(ModelConfig(write_architecture(tmp_path, **VARIANTS[request.param])), seed=1)
    loaded.clip.double().eval()
    return loaded


@torch.no_grad()
def test_one_forward_gives_open_clips_features_and_last_block_tokens(variant):
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    ids = variant.tokenizer(["a cat", "two dogs on a long road, late in the evening", ""])
    image, text = encode_image(variant.clip, images), encode_text(variant.clip, ids)
    theirs = variant.clip.forward_intermediates(images, ids, image_indices=1, text_indices=1, normalize=False)
    assert torch.allclose(image.pooled_BE, theirs["image_features"], atol=1e-12)
    assert torch.allclose(text.pooled_BE, theirs["text_features"], atol=1e-12)
    patches = theirs["image_intermediates"][0].flatten(2).transpose(1, 2)
    assert torch.allclose(image.tokens_BND[:, image.first_token :], patches, atol=1e-12)
    assert text.first_token == 0
    assert torch.allclose(text.tokens_BND, theirs["text_intermediates"][0], atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", list(VARIANTS))
def test_no_texts_have_no_embeddings(tmp_path, name):
    clip = load_model(ModelConfig(write_architecture(tmp_path, **VARIANTS[name]))).clip
    found = encode_text(clip, torch.zeros(0, 5, dtype=torch.long))
    assert (found.pooled_BE.shape, found.tokens_BND.shape) == ((0, 32), (0, 5, 32))


@torch.no_grad()
def test_cutting_text_to_the_batchs_longest_is_exact(variant):
    ids = variant.tokenizer(["a cat", "two dogs on a long road, late in the evening"])
    longest = int((ids != 0).sum(1).max())
    padded, cut = encode_text(variant.clip, ids), encode_text(variant.clip, ids[:, :longest])
    assert torch.allclose(padded.pooled_BE, cut.pooled_BE, atol=1e-12)
    assert torch.allclose(padded.tokens_BND[:, :longest], cut.tokens_BND, atol=1e-12)


def test_stretch_equals_a_table_computed_by_hand():
    table = torch.tensor([[0.0], [10.0], [20.0], [40.0]])
    stretched = stretch_positions(table, 8, keep=2)
    # Rows 2.. lie at 2, 2 1/3, 2 2/3, 3, 3 1/3, 3 2/3 of the old table; past its end the slope of 20 goes on.
    expected = [0, 10, 20, 20 + 20 / 3, 20 + 40 / 3, 40, 40 + 20 / 3, 40 + 40 / 3]
    assert stretched.flatten().tolist() == pytest.approx(expected)


def test_stretch_from_77_to_248_is_long_clips():
    table = torch.randn(77, 16, dtype=torch.float64)
    expected = table.new_zeros(248, 16)
    expected[:20] = table[:20]
    for row in range(57):
        here = table[20 + row]
        slope = table[21 + row] - here if row < 56 else here - table[19 + row]
        for quarter in range(4):
            expected[20 + 4 * row + quarter] = here + quarter / 4 * slope
    assert torch.allclose(stretch_positions(table, 248), expected, atol=1e-14)


@pytest.mark.parametrize("length", [78, 100, 248, 1024])
def test_any_target_length_keeps_the_first_positions_and_stays_in_order(length):
    stretched = stretch_positions(torch.arange(77.0)[:, None], length)
    assert stretched.shape == (length, 1)
    assert torch.equal(stretched[:20, 0], torch.arange(20.0))
    assert (stretched.diff(dim=0) > 0).all()


def test_a_context_with_nothing_behind_the_kept_positions_cannot_be_stretched():
    with pytest.raises(ModelError, match="cannot stretch a context of 16: the first 20 positions stay"):
        stretch_positions(torch.zeros(16, 4), 32)


def test_a_context_cannot_be_shortened():
    with pytest.raises(ModelError, match="must not be shorter"):
        stretch_positions(torch.zeros(77, 4), 60)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "custom text"])
def test_a_stretched_model_reads_248_tokens_in_open_clip_too(tmp_path, name):
    loaded = load_model(ModelConfig(write_architecture(tmp_path, **VARIANTS[name]), context_length=248))
    ids = torch.randint(1, 40000, (2, 248))
    ids[:, -1] = 49407
    assert loaded.context_length == 248
    assert torch.allclose(encode_text(loaded.clip, ids).pooled_BE, loaded.clip.encode_text(ids), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "custom text", "quick gelu"])
def test_plain_open_clip_loads_what_was_saved(tmp_path, name):
    loaded = load_model(ModelConfig(write_architecture(tmp_path, **VARIANTS[name]), context_length=100), seed=5)
    save_model(tmp_path / "saved", loaded, loaded.clip.state_dict())
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'saved'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'saved'}")
    images, ids = torch.randn(2, 3, 32, 32), tokenizer(["a cat", "a dog " * 45])
    assert ids.shape == (2, 100)
    loaded.clip.eval(), clip.eval()
    assert torch.equal(clip.encode_image(images), loaded.clip.encode_image(images))
    assert torch.equal(clip.encode_text(ids), loaded.clip.encode_text(ids))
    again = load_model(ModelConfig(str(tmp_path / "saved")))
    assert again.model_cfg == loaded.model_cfg
    assert torch.equal(again.clip.eval().encode_text(ids), loaded.clip.encode_text(ids))


def write_tokenizer(folder, pad=0):
    """A Hugging Face tokenizer with a vocabulary of its own, which pads with that id."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = ["<pad>", "<s>", "</s>", "<unk>", "a", "red", "dog"]
    rust = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    rust.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, pad_token=words[pad], bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def test_a_saved_model_brings_its_hugging_face_tokenizer(tmp_path):
    text = {"hf_tokenizer_name": write_tokenizer(tmp_path / "tokenizer"), "pool_type": "eos", "eos_id": 2}
    loaded = load_model(ModelConfig(write_architecture(tmp_path, text=text)))
    save_model(tmp_path / "saved", loaded, loaded.clip.state_dict())
    shutil.rmtree(tmp_path / "tokenizer")
    again = load_model(ModelConfig(str(tmp_path / "saved")))
    plain = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'saved'}")
    ids = loaded.tokenizer(["a red dog"])
    assert ids[0, :5].tolist() == [1, 4, 5, 6, 2]
    assert torch.equal(again.tokenizer(["a red dog"]), ids)
    assert torch.equal(plain(["a red dog"]), ids)
    assert torch.equal(again.clip.eval().encode_text(ids), loaded.clip.eval().encode_text(ids))


@pytest.mark.parametrize("asked", [True, False])
def test_a_folders_tokenizer_runs_no_code_of_its_own(tmp_path, asked):
    text = {"hf_tokenizer_name": write_tokenizer(tmp_path / "tokenizer"), "pool_type": "eos", "eos_id": 2}
    loaded = load_model(ModelConfig(write_architecture(tmp_path, text=text)))
    save_model(tmp_path / "saved", loaded, loaded.clip.state_dict())
    edit_json(tmp_path / "saved/tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    (tmp_path / "saved/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit\n")
    architecture = loaded.model_cfg
    if asked:
        architecture["text_cfg"]["tokenizer_kwargs"] = {"clean": "lower", "trust_remote_code": True}
    edit_json(tmp_path / "saved/open_clip_config.json", model_cfg=architecture)
    with pytest.raises(ModelError, match="not trust_remote_code") if asked else nullcontext():
        load_model(ModelConfig(str(tmp_path / "saved")))
    assert not (tmp_path / "ran").exists()


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_random_weights_follow_the_seed(tiny_clip):
    first, again, other = (load_model(ModelConfig(tiny_clip), seed).clip.text_projection for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("vision", "text", "extra", "error"),
    [
        ({"attentional_pool": True}, {}, {}, "attentional pooling"),
        ({"image_size": [32, 64]}, {}, {}, "only square"),
        ({"image_size": 44}, {}, {}, "44 pixels, no multiple of its patches' 8"),
        ({"patch_size": [8, 12]}, {}, {}, "32 pixels, no multiple of its patches' 12"),
        ({"patch_dropout": 0.5}, {}, {}, "patch dropout"),
        ({}, {"embed_cls": True}, {"custom_text": True}, "CLS token"),
        ({}, {"proj_bias": True}, {"custom_text": True}, "bias"),
        ({}, {"pool_type": "none"}, {"custom_text": True}, "pools nothing"),
        ({"layers": [1, 1, 1, 1], "width": 16}, {}, {}, "native ViT"),
    ],
)
def test_towers_that_goal_cannot_read_are_refused(tmp_path, vision, text, extra, error):
    with pytest.raises(ModelError, match=error):
        load_model(ModelConfig(write_architecture(tmp_path, "odd", vision, text, **extra)))


@pytest.mark.parametrize("pad", [0, 3])
def test_a_tower_that_sees_padding_wants_the_padding_that_it_gets(tmp_path, pad):
    """Texts are padded with 0 here, whatever the tokenizer does."""
    text = {
        "hf_tokenizer_name": write_tokenizer(tmp_path / "tokenizer", pad),
        "no_causal_mask": True,
        "pool_type": "eos",
    }
    architecture = write_architecture(tmp_path, text=text | {"eos_id": 2}, custom_text=True)
    with pytest.raises(ModelError, match="writes as 3") if pad else nullcontext():
        loaded = load_model(ModelConfig(architecture))
        ids = loaded.tokenizer(["a red dog"])
        ours = encode_text(loaded.clip.eval(), ids[:, :5]).pooled_BE
        assert torch.allclose(ours, loaded.clip.encode_text(ids), atol=1e-5)


@pytest.mark.parametrize("name", ["no-such-model", "missing.json", "{folder}"])
def test_a_model_that_is_not_there_is_refused(tmp_path, name):
    with pytest.raises(ModelError):
        load_model(ModelConfig(name.format(folder=tmp_path)))


@pytest.mark.parametrize("layout", ["open_clip", "hf"])
def test_the_file_of_a_folder_whose_weights_cannot_be_read_is_named(tiny_clip, tmp_path, layout):
    loaded = load_model(ModelConfig(tiny_clip))
    FORMATS[layout](tmp_path, loaded)
    (weights,) = tmp_path.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(str(tmp_path)))
    assert str(caught.value).startswith(f"{weights} is damaged (SafetensorError: ")


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ({"width": 50}, {}, "embed_dim must be divisible by num_heads"),
        ({"head_width": 0}, {}, "vision_cfg.width // vision_cfg.head_width"),
        ({"pool_type": "sum"}, {}, "assert pool_type in ('tok', 'avg', 'none')"),
        ({}, {"pool_type": "sum"}, "assert pool_type in ('first', 'last', 'argmax', 'eos', 'none')"),
        ({"no_such_setting": 1}, {}, "no_such_setting"),
    ],
)
def test_an_architecture_that_cannot_be_built_says_why(tmp_path, vision, text, words):
    with pytest.raises(ModelError, match="cannot load model") as caught:
        load_model(ModelConfig(write_architecture(tmp_path, "odd", vision, text)))
    assert words in str(caught.value)
    assert "(weights" not in str(caught.value)


@pytest.mark.parametrize("change", [{"text_cfg": None}, {"vision_cfg": []}, {"embed_dim": ...}])
@pytest.mark.parametrize("in_a_folder", [False, True])
def test_a_file_without_an_architecture_is_named(tiny_clip, tmp_path, change, in_a_folder):
    loaded = load_model(ModelConfig(tiny_clip))
    architecture = {name: value for name, value in (loaded.model_cfg | change).items() if value is not ...}
    if in_a_folder:
        save_model(tmp_path, loaded, loaded.clip.state_dict())
        name, file = tmp_path, tmp_path / "open_clip_config.json"
        edit_json(file, model_cfg=architecture)
    else:
        name = file = tmp_path / "x.json"
        file.write_text(json.dumps(architecture))
    with pytest.raises(ModelError) as caught:
        load_model(ModelConfig(str(name)))
    assert str(caught.value).startswith(f"{file}: no architecture of open_clip")


def test_a_json_file_changes_nothing_for_other_models_of_the_process(tmp_path):
    names, own = open_clip.list_models(), open_clip.get_model_config("ViT-B-32")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ModelError, match="not JSON"):
        load_model(ModelConfig(str(tmp_path / "broken.json")))
    loaded = load_model(ModelConfig(write_architecture(tmp_path, "ViT-B-32")))
    assert loaded.model_cfg["embed_dim"] == 32
    assert open_clip.list_models() == names
    assert open_clip.get_model_config("ViT-B-32") == own


@pytest.mark.parametrize("name", ["siglip-like", "my-siglip2", "plain"])
def test_the_tokenizer_of_a_json_file_does_not_depend_on_the_files_name(tmp_path, name):
    loaded = load_model(ModelConfig(write_architecture(tmp_path, name, text={"context_length": 60})))
    assert torch.equal(loaded.tokenizer(["a cat"]), SimpleTokenizer(context_length=60)(["a cat"]))


@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_a_tower_that_does_not_know_all_its_tokenizers_tokens_is_refused(tmp_path, own_tokenizer):
    text = {"hf_tokenizer_name": write_tokenizer(tmp_path / "tokenizer")} if own_tokenizer else {}
    size = 7 if own_tokenizer else 49408
    load_model(ModelConfig(write_architecture(tmp_path, text=text | {"vocab_size": size})))
    with pytest.raises(ModelError, match=rf"knows {size - 1} tokens .* its tokenizer writes {size}"):
        load_model(ModelConfig(write_architecture(tmp_path, text=text | {"vocab_size": size - 1})))


def test_a_weights_file_with_code_in_it_is_not_run(tiny_clip, tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"state_dict": Attack()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError):
        load_model(ModelConfig(tiny_clip, weights=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "pwned").exists()
