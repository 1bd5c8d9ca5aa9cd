"""Checkpoint folders: which are whole, which one a run goes on from, which stay."""

import json

import pytest
import torch
from safetensors.torch import save_file

from goal_ray.checkpoints import file_mark, find_damage, newest_intact, prune_checkpoints, remove_partial
from goal_ray.errors import StageError
from goal_ray.train.config import EvaluationConfig
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.run import export_model

FILES = ("open_clip_model.safetensors", "optimizer.safetensors")


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints after steps 2, 4, 6 and 8."""
    for step in (2, 4, 6, 8):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "open_clip_config.json").write_text("{}")
        for name in FILES:
            save_file({"x": torch.full((100,), float(step))}, folder / name)
        files = {path.name: file_mark(path) for path in folder.iterdir()}
        (folder / "state.json").write_text(json.dumps({"step": step, "files": files}))
    return tmp_path


def steps(run_dir) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((run_dir / "checkpoints").iterdir())]


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def grow(file):
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("name", [*FILES, "open_clip_config.json", "state.json"])
@pytest.mark.parametrize("harm", [cut, flip, grow, lambda file: file.unlink()], ids=["cut", "flip", "grow", "gone"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_says_so(run_dir, name, harm):
    newest = run_dir / "checkpoints" / "step-00000008"
    harm(newest / name)
    said = []
    never = not (newest / "state.json").exists()  # then it never was a checkpoint
    assert newest_intact(run_dir, said.append) == run_dir / "checkpoints" / "step-00000006"
    assert never == (not said)
    assert all("step-00000008 is damaged" in line for line in said)


def test_a_damaged_checkpoint_is_set_aside_and_counts_no_more(run_dir):
    cut(run_dir / "checkpoints" / "step-00000008" / FILES[0])
    lines: list[str] = []
    newest_intact(run_dir, lines.append)
    assert "now called damaged-step-00000008" in lines[0]
    prune_checkpoints(run_dir, 1, ())
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == [
        "damaged-step-00000008",
        "step-00000006",
    ]
    assert newest_intact(run_dir, lines.append) == run_dir / "checkpoints" / "step-00000006"


def test_an_older_checkpoint_with_a_torn_state_stops_nobody(run_dir):
    cut(run_dir / "checkpoints" / "step-00000002" / "state.json")
    found = Evaluations(run_dir, EvaluationConfig("held-out"), lambda *_: None, lambda _: None)
    assert found.waiting == 8
    prune_checkpoints(run_dir, 2, ())
    assert steps(run_dir) == [6, 8]


def test_what_a_killed_writer_left_is_removed(run_dir):
    (run_dir / "checkpoints" / ".step-00000010.tmp").mkdir()
    remove_partial(run_dir)
    assert steps(run_dir) == [2, 4, 6, 8]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew_by_itself(run_dir):
    for folder in (run_dir / "checkpoints").iterdir():
        cut(folder / FILES[0])
    with pytest.raises(StageError, match="every checkpoint is damaged; delete"):
        newest_intact(run_dir, lambda _: None)


def test_a_run_without_checkpoints_begins_at_the_start(tmp_path):
    assert newest_intact(tmp_path, lambda _: None) is None


def test_a_checkpoint_of_an_earlier_version_without_checksums_is_whole(run_dir):
    folder = run_dir / "checkpoints" / "step-00000008"
    (folder / "state.json").write_text('{"step": 8}')
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    ("keep", "needed", "left"), [(1, (), [8]), (2, (2,), [2, 6, 8]), (3, (8,), [4, 6, 8]), (9, (), [2, 4, 6, 8])]
)
def test_the_newest_and_the_needed_stay(run_dir, keep, needed, left):
    prune_checkpoints(run_dir, keep, needed)
    assert steps(run_dir) == left


def test_what_an_interrupted_deletion_left_goes_too(run_dir):
    (run_dir / "checkpoints" / "step-00000002" / "state.json").unlink()
    prune_checkpoints(run_dir, 9, ())
    assert steps(run_dir) == [4, 6, 8]


def test_a_run_s_model_is_all_of_a_checkpoint_but_the_training_s_state(tmp_path):
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    brought = {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"}
    for name in (*brought, "optimizer.safetensors", "state.json"):
        (checkpoint / name).write_text(name)
    model = export_model(checkpoint, tmp_path / "model")
    assert {path.name for path in model.iterdir()} == brought


def test_a_run_s_model_is_replaced_file_by_file_where_it_differs_and_never_written_in_place(tmp_path, monkeypatch):
    checkpoint = tmp_path / "step-00000001"
    checkpoint.mkdir()
    for name in ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"):
        (checkpoint / name).write_text(name)
    model = export_model(checkpoint, tmp_path / "model")
    before = {path.name: path.stat().st_ino for path in model.iterdir()}
    read = (model / "open_clip_model.safetensors").open()
    (checkpoint / "open_clip_model.safetensors").write_text("better weights")
    export_model(checkpoint, model)
    after = {path.name: path.stat().st_ino for path in model.iterdir()}
    assert {name for name in before if before[name] != after[name]} == {"open_clip_model.safetensors"}
    assert (model / "open_clip_model.safetensors").read_text() == "better weights"
    assert read.read() == "open_clip_model.safetensors"  # who has it open reads on

    def cut(data, file, _):
        file.write(data.read()[:3])
        raise OSError("no room")

    monkeypatch.setattr("shutil.copyfileobj", cut)
    with pytest.raises(OSError, match="no room"):
        export_model(checkpoint, tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())
