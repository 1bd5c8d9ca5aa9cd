"""`goal-ray export`: where the folder goes, that it is whole or not there, and that open_clip loads it."""

import json
import stat

import open_clip
import pytest
import torch
from export_inputs import write_run
from tiny_architecture import write_architecture

from goal_ray.checkpoints import resolve_checkpoint
from goal_ray.errors import StageError
from goal_ray.export.run import export
from goal_ray.model import encode_text, load_model
from goal_ray.settings import OPEN_CLIP_WEIGHTS, ModelConfig


@pytest.fixture(scope="module")
def run(tiny_clip, tmp_path_factory):
    """A run of two checkpoints, for 248 tokens."""
    folder = tmp_path_factory.mktemp("runs") / "goal"
    return write_run(folder, f"model.name={tiny_clip}", "model.context_length=248")


@torch.no_grad()
def test_plain_open_clip_gives_our_embeddings(run, tmp_path):
    folder = export(str(run), "open_clip", str(tmp_path / "out"))
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(["a cat", "a long road and a dog " * 40])
    ours = load_model(ModelConfig(str(resolve_checkpoint(run)))).clip.eval()
    assert ids.shape == (2, 248)
    assert torch.allclose(clip.eval().encode_text(ids), encode_text(ours, ids).pooled_BE, atol=1e-5)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(clip.encode_image(images), ours.encode_image(images))


@pytest.mark.parametrize("layout", ["open_clip", "hf"])
def test_the_command_says_where_the_folder_is(call, tiny_clip, tmp_path, layout):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", steps=(40,))
    status, printed, complaint = call("export", run, "--format", layout)
    assert (status, complaint) == (0, "")
    assert printed == f"{layout} model: {run / 'export' / layout}\n"
    assert (run / "export" / layout / "README.md").is_file()


def test_a_checkpoint_of_a_run_can_be_exported(run, tmp_path):
    folder = export(str(run / "checkpoints" / "step-00000020"), "open_clip", str(tmp_path / "out"))
    weights = "open_clip_model.safetensors"
    assert (folder / weights).read_bytes() == (run / "checkpoints" / "step-00000020" / weights).read_bytes()


def test_one_layout_becomes_the_other_and_back(run, tmp_path):
    first = export(str(run), "open_clip", str(tmp_path / "first"))
    hf = export(str(first), "hf", str(tmp_path / "hf"))
    back = export(str(hf), "open_clip", str(tmp_path / "back"))
    before, after = (load_model(ModelConfig(str(folder))) for folder in (first, back))
    assert all(torch.equal(a, b) for a, b in zip(before.clip.parameters(), after.clip.parameters(), strict=True))
    assert before.preprocess["mean"] == after.preprocess["mean"]


def test_everyone_who_may_enter_the_folder_may_read_its_files(run, tmp_path):
    folder = export(str(run), "hf", str(tmp_path / "out"))
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {stat.S_IMODE(0o666 & ~umask(tmp_path))}


def umask(folder) -> int:
    """What the process takes away from the modes of new files."""
    (folder / "probe").touch()
    return 0o666 & ~stat.S_IMODE((folder / "probe").stat().st_mode)


def test_a_folder_that_holds_something_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StageError, match="is there already; delete it, or choose another place with --out"):
        export(str(run), "hf", str(tmp_path / "mine"))
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "empty").mkdir()
    assert (export(str(run), "open_clip", str(tmp_path / "empty")) / "README.md").is_file()


def test_a_failed_export_leaves_nothing(tmp_path):
    odd = write_architecture(tmp_path, vision={"pool_type": "avg"})
    run = write_run(tmp_path / "goal", f"model.name={odd}", steps=(40,))
    with pytest.raises(Exception, match="pool_type"):
        export(str(run), "hf")
    assert list((run / "export").iterdir()) == []


def test_what_a_killed_export_left_is_replaced(run, tmp_path):
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half.safetensors").write_text("half")
    folder = export(str(run), "open_clip", str(tmp_path / "out"))
    assert not (folder / "half.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_model_that_is_no_run_needs_a_place(run, tmp_path):
    model = export(str(run), "open_clip", str(tmp_path / "model"))
    with pytest.raises(StageError, match="say with --out"):
        export(str(model), "hf")


def test_a_run_without_a_checkpoint_is_refused(tiny_clip, tmp_path):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", steps=())
    (run / "checkpoints").mkdir()
    with pytest.raises(StageError, match="no complete checkpoint"):
        export(str(run))


def test_an_export_works_where_transformers_is_not(run, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    folder = export(str(run), "hf", str(tmp_path / "out"))
    assert json.loads((folder / "config.json").read_text())["text_config"]["max_position_embeddings"] == 248


def test_a_damaged_checkpoint_is_refused_and_a_whole_one_named(tiny_clip, tmp_path):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}")
    weights = resolve_checkpoint(run) / OPEN_CLIP_WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(StageError, match=r"step-00000040 is damaged \(.*; take another one, such as .*step-00000020$"):
        export(str(run))
    assert not (run / "export").exists()
