"""Start points: weights in the layouts of open_clip, Hugging Face and OpenAI, from files and folders, run no code."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architecture import shake, write_architecture
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from goal_ray.errors import ModelError
from goal_ray.model import encode_image, encode_text, load_model
from goal_ray.settings import ModelConfig
from goal_ray.torchscript import read_torchscript

# Two float32 implementations of the same sums, in another order.
SAME = {"atol": 1e-5, "rtol": 1e-5}
TEXTS = ["a cat", "two dogs on a long road, late in the evening"]


def hf_folder(folder: Path, **changes) -> Path:
    """A folder as transformers saves it; `changes` go to both towers, or by `text`, `vision`, `config` to one place."""
    torch.manual_seed(3)
    text = {"hidden_size": 32, "intermediate_size": 100, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 48, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 32, "patch_size": 8}
    sections = {"text_config": text | changes, "vision_config": vision | changes}
    model = CLIPModel(CLIPConfig(projection_dim=24, **sections))
    shake(model)
    model.save_pretrained(folder)
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


def edit(path: Path, **changes) -> None:
    """Changes keys of a JSON file; `text_config__x` is x inside text_config."""
    tree = json.loads(path.read_text())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (tree[section] if section else tree)[name] = value
    path.write_text(json.dumps(tree))


def same_embeddings(loaded, model: CLIPModel) -> bool:
    """Whether ours are those of transformers."""
    images, ids = torch.randn(3, 3, 32, 32), loaded.tokenizer(TEXTS)
    with torch.no_grad():
        ours = encode_image(loaded.clip.eval(), images).pooled_BE, encode_text(loaded.clip, ids).pooled_BE
        theirs = model.get_image_features(images).pooler_output, model.get_text_features(ids).pooler_output
    scales = torch.equal(loaded.clip.logit_scale.reshape(()), model.logit_scale)
    return scales and all(torch.allclose(a, b, **SAME) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_a_folder_of_transformers_is_a_start(tmp_path, activation):
    folder = hf_folder(tmp_path / "hf", hidden_act=activation, layer_norm_eps=1e-3)
    loaded = load_model(ModelConfig(str(folder)))
    assert same_embeddings(loaded, CLIPModel.from_pretrained(folder).eval())
    assert (loaded.size_px, loaded.grid_HW, loaded.context_length) == (32, (4, 4), 77)
    assert loaded.preprocess["resize_mode"] == "shortest"
    assert loaded.preprocess["interpolation"] == "bicubic"


def test_a_folder_of_transformers_can_be_stretched_to_long_text(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    assert load_model(ModelConfig(str(folder), context_length=248)).context_length == 248


def test_a_folder_without_settings_of_pictures_has_clips_own(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "preprocessor_config.json").unlink()
    preprocess = load_model(ModelConfig(str(folder))).preprocess
    assert tuple(preprocess["mean"]) == open_clip.OPENAI_DATASET_MEAN
    assert preprocess["resize_mode"] == "shortest"


def test_the_first_hub_files_keep_a_section_beside_the_config_and_positions_as_weights(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config["text_config_dict"] = {**config["text_config"]}
    config["text_config"] = {"hidden_size": 640}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded = load_model(ModelConfig(str(folder)))
    assert loaded.model_cfg["text_cfg"]["width"] == 32
    assert torch.equal(loaded.clip.positional_embedding, weights["text_model.embeddings.position_embedding.weight"])


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"text_config__vocab_size": 30000}, ["vocab_size=30000", "not CLIP's own vocabulary"]),
        ("config.json", {"text_config__eos_token_id": 5}, ["eos_token_id=5"]),
        ("config.json", {"text_config__hidden_act": "gelu"}, ["hidden_act differs", "quick_gelu"]),
        ("config.json", {"vision_config__num_channels": 1}, ["num_channels=1", "RGB"]),
        ("config.json", {"vision_config__image_size": [32, 64]}, ["image_size=[32, 64]", "squares"]),
        ("preprocessor_config.json", {"size": {"shortest_edge": 40}}, ["shortest_edge", "the model reads 32 pixels"]),
        ("preprocessor_config.json", {"resample": 1}, ["bilinear or bicubic"]),
        ("preprocessor_config.json", {"do_normalize": False}, ["normalised"]),
        ("preprocessor_config.json", {"rescale_factor": 1 / 127.5}, ["rescaled by 0.0078"]),
        ("preprocessor_config.json", {"do_center_crop": False}, ["not cropped"]),
    ],
)
def test_a_folder_that_open_clip_cannot_express_is_refused_by_file_and_setting(tmp_path, file, changes, words):
    folder = hf_folder(tmp_path / "hf")
    edit(folder / file, **changes)
    with pytest.raises(ModelError) as error:
        load_model(ModelConfig(str(folder)))
    assert all(word in str(error.value) for word in [str(folder / file), *words])


def test_a_folder_without_its_weights_says_which_files_it_may_have(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors or pytorch_model\.bin"):
        load_model(ModelConfig(str(folder)))


def test_a_tensor_that_neither_layout_knows_is_named(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "vision_model.adapter.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"vision_model\.adapter\.weight"):
        load_model(ModelConfig(str(folder)))


def start(tmp_path: Path, **extra):
    """An architecture and a model of it with weights of its own."""
    path = write_architecture(tmp_path, "start", **extra)
    loaded = load_model(ModelConfig(path), seed=4)
    shake(loaded.clip)
    return path, loaded.clip.eval()


def has_weights(clip, weights) -> bool:
    """Whether a model's weights are these."""
    own = clip.state_dict()
    return own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in own)


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_file_in_hugging_faces_layout_fills_an_architecture_and_tells_its_activation(tmp_path, custom_text):
    extra = {"embed_dim": 24, "vision": {"mlp_ratio": 200.5 / 48}, "text": {"mlp_ratio": 100 / 32}}
    path = write_architecture(tmp_path, "start", **extra, custom_text=custom_text)
    folder = hf_folder(tmp_path / "hf")
    loaded = load_model(ModelConfig(path, weights=str(folder / "model.safetensors")))
    assert same_embeddings(loaded, CLIPModel.from_pretrained(folder).eval())
    assert loaded.model_cfg["quick_gelu"] is True


def test_weights_without_quick_gelu_are_refused_by_an_architecture_with_it(tmp_path):
    folder = hf_folder(tmp_path / "hf", hidden_act="gelu")
    path = write_architecture(tmp_path, "start", quick_gelu=True)
    with pytest.raises(ModelError, match="without QuickGELU"):
        load_model(ModelConfig(path, weights=str(folder / "model.safetensors")))


@pytest.mark.parametrize(
    ("vision", "text", "words"),
    [
        ({"head_width": 12}, {}, "vision heads=3, not 4"),
        ({}, {"heads": 4}, "text heads=2, not 4"),
        ({"norm_kwargs": {"eps": 1e-6}}, {}, "vision LayerNorm eps=1e-05, not 1e-06"),
        ({}, {"norm_kwargs": {"eps": 1e-6}}, "text LayerNorm eps=1e-05, not 1e-06"),
        ({"act_kwargs": {"approximate": "tanh"}}, {}, "vision act_kwargs={}, not {'approximate': 'tanh'}"),
        ({"head_width": 24}, {"heads": 1}, "vision heads=3, not 2; text heads=2, not 1"),
    ],
)
def test_a_file_for_another_model_of_the_same_shapes_is_refused_by_what_differs(tmp_path, vision, text, words):
    vision, text = {"mlp_ratio": 200.5 / 48, **vision}, {"mlp_ratio": 100 / 32, **text}
    path = write_architecture(tmp_path, "start", vision, text, embed_dim=24)
    folder = hf_folder(tmp_path / "hf", hidden_act="gelu")
    with pytest.raises(ModelError) as error:
        load_model(ModelConfig(path, weights=str(folder / "model.safetensors")))
    assert words in str(error.value)


def test_a_file_with_other_settings_fills_an_architecture_that_has_them(tmp_path):
    changes = {"norm_kwargs": {"eps": 1e-3}, "act_kwargs": {"approximate": "tanh"}}
    vision, text = {"mlp_ratio": 200.5 / 48, **changes}, {"mlp_ratio": 100 / 32, **changes}
    path = write_architecture(tmp_path, "start", vision, text, embed_dim=24)
    folder = hf_folder(tmp_path / "hf", hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3)
    loaded = load_model(ModelConfig(path, weights=str(folder / "model.safetensors")))
    assert same_embeddings(loaded, CLIPModel.from_pretrained(folder).eval())


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, {"state_dict": [1]}, {1: torch.zeros(2)}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(ModelError, match=r"odd\.pt: no weights, which are tensors by name"):
        load_model(ModelConfig(write_architecture(tmp_path), weights=str(tmp_path / "odd.pt")))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_a_file_in_open_clips_layout_fills_an_architecture(tmp_path, name):
    path, clip = start(tmp_path)
    write = save_file if name.endswith("safetensors") else torch.save
    write(clip.state_dict(), tmp_path / name)
    assert has_weights(load_model(ModelConfig(path, weights=str(tmp_path / name))).clip, clip.state_dict())


def test_a_checkpoint_of_open_clips_training_fills_an_architecture(tmp_path):
    path, clip = start(tmp_path)
    prefixed = {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": prefixed}, tmp_path / "epoch_3.pt")
    assert has_weights(load_model(ModelConfig(path, weights=str(tmp_path / "epoch_3.pt"))).clip, clip.state_dict())


def test_weights_for_long_text_keep_their_positions(tmp_path):
    """open_clip itself would shrink the table to the architecture's 77 rows without a word."""
    long = load_model(ModelConfig(write_architecture(tmp_path), context_length=248))
    save_file(long.clip.state_dict(), tmp_path / "long.safetensors")
    config = ModelConfig(write_architecture(tmp_path), weights=str(tmp_path / "long.safetensors"))
    assert has_weights(load_model(config).clip, long.clip.state_dict())


def test_weights_for_smaller_pictures_get_a_finer_grid_of_positions(tmp_path):
    _, clip = start(tmp_path)
    save_file({name: tensor.half() for name, tensor in clip.state_dict().items()}, tmp_path / "small.safetensors")
    larger = write_architecture(tmp_path, "larger", vision={"image_size": 64})
    loaded = load_model(ModelConfig(larger, weights=str(tmp_path / "small.safetensors")))
    assert loaded.clip.visual.positional_embedding.shape == (65, 48)
    assert loaded.clip.visual.positional_embedding.dtype == torch.float32


def openai_archive(tmp_path: Path) -> tuple[str, open_clip.CLIP, Path]:
    """A TorchScript archive laid out as OpenAI's: traced, in half precision, with three numbers as buffers."""
    path, clip = start(tmp_path)
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(clip, name):
            delattr(clip, name)
        clip.register_buffer(name, torch.tensor(number))
    example = (torch.zeros(1, 3, 32, 32), torch.ones(1, 77, dtype=torch.long))
    archive = tmp_path / "ViT-tiny.pt"
    with warnings.catch_warnings(action="ignore", category=torch.jit.TracerWarning):  # of checks that become constants
        torch.jit.trace(clip, example).half().save(archive)
    return path, clip, archive


def test_openais_archive_fills_an_architecture_and_brings_its_activation(tmp_path):
    path, clip, archive = openai_archive(tmp_path)
    numbers = ("input_resolution", "context_length", "vocab_size")
    expected = {name: t.half().float() for name, t in clip.state_dict().items() if name not in numbers}
    loaded = load_model(ModelConfig(path, weights=str(archive)))
    assert has_weights(loaded.clip, expected)
    assert loaded.model_cfg["quick_gelu"] is True
    assert loaded.clip.visual.transformer.resblocks[0].mlp.gelu.__class__.__name__ == "QuickGELU"


def test_openais_state_dict_brings_its_activation_too(tmp_path):
    path, clip = start(tmp_path)
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(77)}
    torch.save({**clip.state_dict(), **numbers, "vocab_size": torch.tensor(49408)}, tmp_path / "plain.pt")
    loaded = load_model(ModelConfig(path, weights=str(tmp_path / "plain.pt")))
    assert has_weights(loaded.clip, clip.state_dict())
    assert loaded.model_cfg["quick_gelu"] is True


def test_an_archive_is_read_as_torch_itself_reads_it(tmp_path):
    *_, archive = openai_archive(tmp_path)
    theirs = torch.jit.load(archive).state_dict()
    ours = read_torchscript(archive)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)


class Attack:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


@pytest.mark.parametrize("replaced", ["data.pkl", "code/__torch__.py"])
def test_an_archive_with_code_in_it_is_not_run(tmp_path, replaced):
    path, _, archive = openai_archive(tmp_path)
    evil = tmp_path / "evil.pt"
    attack = pickle.dumps({"x": Attack(tmp_path / "pwned")}, protocol=2)
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            target.writestr(name, attack if name.endswith(f"/{replaced}") else source.read(name))
    if replaced == "data.pkl":
        with pytest.raises(ModelError, match="holds more than tensors"):
            load_model(ModelConfig(path, weights=str(evil)))
    else:  # nobody looks at the code
        load_model(ModelConfig(path, weights=str(evil)))
    assert not (tmp_path / "pwned").exists()


def test_a_folder_whose_pickle_holds_code_is_refused(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    (folder / "model.safetensors").unlink()
    torch.save({"state_dict": Attack(tmp_path / "pwned")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds more than tensors"):
        load_model(ModelConfig(str(folder)))
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_a_cut_off_archive_is_refused(tmp_path, share):
    path, _, archive = openai_archive(tmp_path)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ModelError):
        load_model(ModelConfig(path, weights=str(archive)))


def test_an_archive_that_lost_a_tensor_is_refused(tmp_path):
    path, _, archive = openai_archive(tmp_path)
    less = tmp_path / "less.pt"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(less, "w") as target:
        for name in source.namelist():
            if not name.endswith("/data/7"):
                target.writestr(name, source.read(name))
    with pytest.raises(ModelError):
        load_model(ModelConfig(path, weights=str(less)))
