"""The command line: help that teaches, and errors of one line without a traceback."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import goal_ray
from goal_ray.__main__ import STAGES
from goal_ray.cli import reflow, run_main
from goal_ray.scenes.run import SceneSettings, draw_scenes


@pytest.fixture
def config(tmp_path, tiny_clip) -> str:
    """A training config that is right but for its data, which is not there."""
    path = tmp_path / "train.yaml"
    path.write_text(
        f"model: {{name: {tiny_clip}}}\ndata: {{shards: {tmp_path}/nothing}}\nstorage_path: {tmp_path}/runs\n"
    )
    return str(path)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_stage_and_what_it_does(call, arguments):
    status, printed, _ = call(*arguments)
    assert status == 0
    assert "usage: goal-ray STAGE" in printed
    assert all(f"  {name}" in printed and text in printed for name, text in STAGES.items())


def test_the_version_is_the_packages(call):
    assert call("--version") == (0, f"{goal_ray.__version__}\n", "")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_help_with_purpose_and_example(call, stage):
    status, printed, complaints = call(stage, "--help")
    assert (status, complaints) == (0, "")
    assert printed.startswith(f"usage: goal-ray {stage} ")
    assert f"\nexample:\n  goal-ray {stage} " in printed


@pytest.mark.parametrize("columns", [80, 300])
@pytest.mark.parametrize("stage", [*STAGES, "shards make", "shards validate", "shards index", "shards reshard"])
def test_a_help_fits_its_terminal_and_is_never_wider_than_can_be_read(call, monkeypatch, stage, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    _, printed, _ = call(*stage.split(), "--help")
    description = printed.split("\n\n", 1)[1].split("\npositional arguments:\n")[0].split("\noptions:\n")[0]
    settings = printed.partition("settings, with their defaults")[2]
    lines = [*description.splitlines(), *(line for line in settings.splitlines() if " = " not in line)]
    assert max(map(len, lines)) <= min(columns, 120)
    if len(description) > columns:
        assert max(map(len, description.splitlines())) > min(columns, 120) - 20  # paragraphs take the width there is


def test_paragraphs_and_items_of_lists_are_broken_anew_between_words(monkeypatch):
    monkeypatch.setenv("COLUMNS", "24")
    text = """A paragraph whose
lines are not the terminal's, of some-hyphenated-words.

  one    a thing that
         is long enough
  other  another

first: and what goes
  on here
second"""
    assert (
        reflow(text)
        == """A paragraph whose lines
are not the terminal's,
of
some-hyphenated-words.

  one    a thing that is
         long enough
  other  another

first: and what goes on
  here
second"""
    )


@pytest.mark.parametrize("stage", STAGES)
def test_every_argument_of_a_stage_is_explained(call, stage):
    _, printed, _ = call(stage, "--help")
    options = printed.split("\noptions:\n")[1].split("\n\n")[0]
    arguments = printed.split("\npositional arguments:\n")[1].split("\n\n")[0] if "positional" in printed else ""
    blocks = re.split(r"\n  (?=\S)", f"\n{arguments}\n{options}")[1:]
    assert len(blocks) >= 2
    # The name, and the place of its value, stand two blanks or a line before the explanation.
    assert [block for block in blocks if not re.search(r"\S(?: {2,}|\n +)\w", block)] == []


@pytest.mark.parametrize("stage", ["train", "lism"])
def test_help_lists_settings_by_section_with_their_defaults(call, stage):
    _, printed, _ = call(stage, "--help")
    settings = printed.split("settings, with their defaults")[1]
    own, *sections = settings.split("\n\n")
    assert "  device = auto\n" in own
    assert not any(
        line.startswith("  ") and "." in line.split(" = ")[0] for line in own.splitlines()[2:] if " = " in line
    )
    for section in sections:
        title, *lines = section.splitlines()
        name = title.split(":")[0].split(" (")[0]
        assert all(line.startswith((f"  {name}.", "      ")) for line in lines)


def test_help_says_which_proposer_is_the_default_and_how_to_choose_another(call):
    _, printed, _ = call("lism", "--help")
    assert "\nproposer (proposer.name=felzenszwalb, the default): " in printed
    assert "\nproposer (proposer.name=grid): " in printed
    assert "\nmatcher.model (default: name=ViT-L-14-336 weights=openai):" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope"], ["no stage 'nope'", *STAGES]),
        (["train", "{tmp}/no.yaml"], ["no.yaml: no such config file"]),
        (["train", "workers=2"], ["workers=2: no such config file; settings come behind a config file"]),
        (["train", "{config}"], ["nothing: no such file or folder"]),
        (["train", "{config}", "optimiser.lr=1"], ["optimiser: unknown key", "optimizer"]),
        (["train", "{config}", "optimizer.rate=1"], ["optimizer.rate: unknown key", "lr, layer_decay"]),
        (["train", "{config}", "optimizer.lr=fast"], ["optimizer.lr", "number", "'fast'"]),
        (["train", "{config}", "precision=fp8"], ["precision", "'bf16' or 'fp32'", "'fp8'"]),
        (["train", "{config}", "batch_per_worker=0"], ["batch_per_worker must be at least 1"]),
        (["train", "{config}", "lr"], ["'lr' is not of the form section.key=value"]),
        (["lism", "{tmp}/nothing", "{tmp}/out"], ["nothing: no such file or folder"]),
        (["lism", "{tmp}", "{tmp}/out"], ["holds no .tar file"]),
        (["lism", "{tars}", "{tmp}/out", "--config", "{tmp}/no.yaml"], ["no.yaml: no such config file"]),
        (
            ["lism", "{tars}", "{tmp}/out", "proposer.name=magic"],
            ["proposer.name: 'magic' is unknown", "felzenszwalb", "sam"],
        ),
        (["lism", "{tars}", "{tmp}/out", "max_areas=1"], ["max_areas: unknown key", "max_area"]),
        (["lism", "{tars}", "{tmp}/out", "language=English"], ["'English'", "en, de"]),
        (["evaluate", "{tmp}/nothing", "{tars}"], ["nothing: no such folder"]),
        (["evaluate", "{tmp}", "{tmp}/nothing"], ["nothing: no such file or folder"]),
        (["evaluate", "{tmp}", "{tars}", "--batch", "0"], ["batch must be at least 1"]),
        (
            ["evaluate", "ViT-B-33", "{tars}", "--weights", "openai"],
            ["'ViT-B-33' is no folder", "did you mean ViT-B-32"],
        ),
        (["evaluate", "ViT-B-32", "{tars}", "--weights", "openia"], ["'openia' is no file", "tags: openai"]),
        (["export", "{tmp}/nothing"], ["nothing: no such folder"]),
        (["export", "{tars}"], ["say with --out where the model goes"]),
        (["export", "{tars}", "--out", "{tmp}/out"], ["no open_clip_config.json", "Hugging Face's CLIP"]),
        (["scenes", "{tmp}/out", "--count", "0"], ["count must be at least 1"]),
        (["scenes", "{tmp}/out", "--size", "1"], ["size must be between 32"]),
        (["report", "{tmp}/nothing"], ["nothing", "no such"]),
    ],
)
def test_a_users_error_is_one_line_on_stderr_and_status_2(call, tmp_path, config, arguments, words):
    draw_scenes(tmp_path / "tars", 2, 0, SceneSettings(size=32))
    names = {"tmp": tmp_path, "config": config, "tars": tmp_path / "tars"}
    status, printed, complaint = call(*(argument.format(**names) for argument in arguments))
    assert (status, printed) == (2, "")
    assert complaint.startswith("error: ")
    assert complaint.count("\n") == 1
    assert all(word in complaint for word in words)


def test_several_wrong_settings_are_told_at_once_a_line_each(call, config):
    status, _, complaint = call("train", config, "optimizer.lr=fast", "epochs=many")
    assert status == 2
    assert [line.split(":")[0] for line in complaint.splitlines()[1:]] == ["  optimizer.lr", "  epochs"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train"], "goal-ray train: error: the following arguments are required: CONFIG\n"),
        (["lism", "in"], "goal-ray lism: error: the following arguments are required: OUT\n"),
        (["evaluate", "model"], "goal-ray evaluate: error: the following arguments are required: SHARDS\n"),
        (["evaluate", "a", "b", "--batch", "many"], "argument --batch: invalid int value: 'many'\n"),
        (["scenes", "out", "--colour", "red"], "unrecognized arguments: --colour red\n"),
    ],
)
def test_a_wrong_call_shows_the_usage_and_what_is_missing(call, arguments, words):
    status, printed, complaint = call(*arguments)
    assert (status, printed) == (2, "")
    assert complaint.startswith(f"usage: goal-ray {arguments[0]}")
    assert complaint.endswith(words)


def test_settings_may_stand_before_and_behind_options(call, config):
    for arguments in (["--resume", config, "seed=x"], [config, "--resume", "seed=x"], [config, "seed=x", "--resume"]):
        status, _, complaint = call("train", *arguments)
        assert status == 2
        assert "seed" in complaint


def test_an_error_of_the_system_names_the_file_and_has_no_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_main(lambda _: Path("/no/such/file").read_text())
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 2] No such file or directory: '/no/such/file'\n"


def test_an_error_of_a_storage_s_library_has_no_traceback(capsys):
    from botocore.exceptions import NoCredentialsError

    def main(_):
        raise NoCredentialsError()

    with pytest.raises(SystemExit, match="2"):
        run_main(main)
    assert capsys.readouterr().err == (
        "error: NoCredentialsError: Unable to locate credentials; is the address right, and are its credentials?\n"
    )


def test_an_error_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda _: 1 // 0)


def test_python_m_and_the_console_script_are_the_same(config):
    script = shutil.which("goal-ray", path=str(Path(sys.executable).parent))
    assert script is not None
    calls = [[script, "train", config], [sys.executable, "-m", "goal_ray.train", config]]
    started = [subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for call in calls]
    ended = [(*process.communicate(), process.returncode) for process in started]
    assert ended[0] == ended[1]
    printed, complaint, status = ended[0]
    assert (printed, status) == ("", 2)
    assert complaint.startswith("error: ")
    assert complaint.endswith("nothing: no such file or folder\n")


def test_a_terminal_that_lacks_a_letter_shows_it_as_an_escape(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    run_main(lambda _: print("café", flush=True))
    assert written.getvalue() == b"caf\\xe9\n"
