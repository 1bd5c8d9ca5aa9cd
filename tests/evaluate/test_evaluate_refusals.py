"""What an evaluation refuses, before it computes: damaged models and checkpoints, wrong paths and options."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from goal_ray.checkpoints import OPTIMIZER_FILE, STATE_FILE, file_mark
from goal_ray.errors import ConfigError, GoalRayError, ModelError, ShardError, StageError
from goal_ray.evaluate.run import evaluate
from goal_ray.settings import OPEN_CLIP_WEIGHTS


@pytest.mark.parametrize("name", ["ViT-B-32", "no-such-folder", "no-such.json"])
def test_random_weights_are_not_evaluated(name, scenes):
    with pytest.raises(ModelError, match=r"would be random; .*--weights"):
        evaluate(name, str(scenes))


def cut_weights(folder: Path) -> None:
    data = (folder / OPEN_CLIP_WEIGHTS).read_bytes()
    (folder / OPEN_CLIP_WEIGHTS).write_bytes(data[: len(data) // 2])


def empty_weights(folder: Path) -> None:
    (folder / OPEN_CLIP_WEIGHTS).write_bytes(b"")


def foreign_weights(folder: Path) -> None:
    save_file({"weight": torch.zeros(3)}, folder / OPEN_CLIP_WEIGHTS)


def other_width(folder: Path) -> None:
    path = folder / "open_clip_config.json"
    tree = json.loads(path.read_text())
    tree["model_cfg"]["vision_cfg"]["width"] = 64
    path.write_text(json.dumps(tree))


def no_weights(folder: Path) -> None:
    (folder / OPEN_CLIP_WEIGHTS).unlink()


def cut_config(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text('{"model_cfg": {')


def list_config(folder: Path) -> None:
    (folder / "open_clip_config.json").write_text("[]")


def diverged(folder: Path) -> None:
    weights = load_file(folder / OPEN_CLIP_WEIGHTS)
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, folder / OPEN_CLIP_WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (cut_weights, r"open_clip_model.safetensors is damaged \(Safetensor"),
        (empty_weights, r"open_clip_model.safetensors is damaged \(Safetensor"),
        (foreign_weights, "cannot load model '.*step-00000010': .*Missing key"),
        (other_width, "cannot load model '.*step-00000010': .*size mismatch"),
        (no_weights, "step-00000010: no open_clip_model.safetensors"),
        (cut_config, r"open_clip_config.json is damaged \(JSON"),
        (list_config, r"open_clip_config.json is damaged \(TypeError"),
        (diverged, "the model has diverged"),
    ],
)
def test_a_damaged_model_folder_is_a_clear_error(run, scenes, damage, error):
    folder = run / "checkpoints" / "step-00000010"
    damage(folder)
    (folder / STATE_FILE).unlink()
    with pytest.raises(ModelError, match=error) as caught:
        evaluate(str(folder), f"{scenes}/scenes-000000.tar")
    assert len(str(caught.value)) < 1000


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / OPEN_CLIP_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / OPEN_CLIP_WEIGHTS).write_bytes(data)


def list_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (cut_weights, "open_clip_model.safetensors: Error while"),
        (no_weights, "open_clip_model.safetensors: No such file"),
        (flipped_bit, "open_clip_model.safetensors is not what was written"),
        (other_width, "open_clip_config.json is not what was written"),
        (cut_config, "open_clip_config.json: Expecting"),
        (list_state, ""),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(run, scenes, damage, why):
    older, newest = (run / "checkpoints" / name for name in ("step-00000002", "step-00000010"))
    write_marks(newest)
    damage(newest)
    with pytest.raises(StageError) as caught:
        evaluate(str(run), f"{scenes}/scenes-000000.tar")
    assert str(caught.value).startswith(f"checkpoint {newest} is damaged ({why}")
    assert str(caught.value).endswith(f"; take another one, such as {older}")
    cut_weights(older)
    with pytest.raises(StageError, match=r"; take another one; none that is whole lies beside it$"):
        evaluate(str(newest), f"{scenes}/scenes-000000.tar")


def write_marks(folder: Path) -> None:
    """The sizes and checksums that training stores with a checkpoint."""
    files = {path.name: file_mark(path) for path in folder.iterdir() if path.name != STATE_FILE}
    (folder / STATE_FILE).write_text(json.dumps({"step": 10, "files": files}))


def test_a_copy_of_a_checkpoint_needs_neither_its_name_nor_what_only_a_training_reads(run, scenes, tmp_path):
    folder = run / "checkpoints" / "step-00000010"
    (folder / OPTIMIZER_FILE).write_bytes(b"averages")
    write_marks(folder)
    (folder / OPTIMIZER_FILE).unlink()
    folder.rename(tmp_path / "best")
    assert evaluate(str(tmp_path / "best"), f"{scenes}/scenes-000000.tar")["count"] == 10


def test_a_run_without_a_complete_checkpoint_is_a_clear_error(run, scenes):
    for state in run.glob("checkpoints/*/state.json"):
        state.unlink()
    with pytest.raises(StageError, match="no complete checkpoint yet"):
        evaluate(str(run), str(scenes))


@pytest.mark.parametrize(
    ("checkpoint", "shards", "kind", "error"),
    [
        ("{model}", "{tmp}/nothing", ShardError, "nothing: no such file or folder"),
        ("{model}", "{tmp}", ShardError, "holds no .tar file"),
        ("{model}", "{tmp}/*.tar", ShardError, "no file matches"),
        ("{tmp}/nothing", "{scenes}", StageError, "nothing: no such folder"),
        ("{tmp}", "{scenes}", ModelError, "no open_clip_config.json in this folder"),
        ("{model}/open_clip_model.safetensors", "{scenes}", StageError, "not a folder; .*--weights"),
    ],
)
def test_a_wrong_path_is_a_clear_error(model, scenes, tmp_path, checkpoint, shards, kind, error):
    names = {"model": model, "scenes": scenes, "tmp": tmp_path}
    with pytest.raises(kind, match=error):
        evaluate(checkpoint.format(**names), shards.format(**names))


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_bad_share": 1.5}, "between 0 and 1"),
        ({"device": "toaster"}, "device 'toaster' cannot be used here"),
        ({"device": "xpu"}, "device 'xpu' cannot be used here"),
        ({"weights": "openai"}, "brings its own weights"),
        ({"out": "{tmp}"}, "cannot write the JSON file there: it is a folder"),
        ({"out": "{scenes}/scenes.json/x.json"}, "cannot write the JSON file there"),
    ],
)
def test_a_wrong_option_is_a_clear_error(model, scenes, tmp_path, option, error):
    given = {k: v.format(tmp=tmp_path, scenes=scenes) if isinstance(v, str) else v for k, v in option.items()}
    with pytest.raises((ConfigError, ModelError), match=error) as caught:
        evaluate(model, str(scenes), **given)
    assert isinstance(caught.value, GoalRayError)
