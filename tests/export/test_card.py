"""The model card: its code runs, its facts are those of the run, and no setting breaks its Markdown."""

import json
import re

import pytest
import yaml
from export_inputs import write_evaluation, write_run
from PIL import Image

from goal_ray.errors import StageError
from goal_ray.export.card import escape, fence
from goal_ray.export.run import export

LAYOUTS = ["open_clip", "hf"]


def card_of(run, tmp_path, layout="open_clip") -> str:
    """The card of an export."""
    return (export(str(run), layout, str(tmp_path / f"card-{layout}")) / "README.md").read_text(encoding="utf-8")


def rows(card: str) -> dict[str, list[str]]:
    """The cells behind the first of every line of a table."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in card.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


@pytest.fixture
def run(tiny_clip, tmp_path):
    """A run of two checkpoints."""
    return write_run(tmp_path / "goal", f"model.name={tiny_clip}", "model.context_length=248")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_code_in_the_card_runs_in_the_folder(run, layout, monkeypatch, capsys):
    folder = export(str(run), layout)
    Image.new("RGB", (60, 40), "red").save(folder / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor([[0.")


@pytest.mark.parametrize(("layout", "library"), [("open_clip", "open_clip"), ("hf", "transformers")])
def test_the_front_matter_is_yaml_without_a_licence(run, tmp_path, layout, library):
    _, header, _ = card_of(run, tmp_path, layout).split("---\n", 2)
    tree = yaml.safe_load(header)
    assert (tree["library_name"], tree["pipeline_tag"]) == (library, "zero-shot-image-classification")
    assert "license" not in tree


def test_architecture_start_settings_and_data_are_there(run, tmp_path):
    (run / "quarantine.jsonl").write_text('{"shard": "a.tar", "key": "x", "stage": "scan", "reason": "torn"}\n')
    card = card_of(run, tmp_path)
    found = rows(card)
    assert found["text"] == ["up to 248 tokens"]
    assert found["picture"] == ["32 × 32 pixels, 4 × 4 patches"]
    assert found["samples"] == ["42 usable, in 2 tars"]
    assert found["left out at scan"] == ["1 samples"]
    assert found["steps"] == ["40 of 40"]
    assert "  context_length: 248\n" in card
    assert found["loss"] == ["0.1250"]


def test_what_is_not_known_is_left_out(run, tmp_path):
    (run / "shards.json").unlink()
    card = card_of(run, tmp_path)
    assert not any(f"## {title}" in card for title in ("Retrieval", "Cost"))
    assert "samples" not in rows(card)
    assert "None" not in card


def test_a_model_without_a_run_has_a_card_about_itself_alone(run, tmp_path):
    model = export(str(run), "open_clip", str(tmp_path / "model"))
    card = card_of(model, tmp_path)
    assert "## Model" in card
    assert not any(f"## {title}" in card for title in ("Training", "Data", "Losses", "Retrieval", "Cost"))
    assert "GOAL" not in card


def test_metrics_are_those_of_the_exported_checkpoint(run, tmp_path):
    write_evaluation(run, "early", "elsewhere/checkpoints/step-00000020", 11.0)
    write_evaluation(run, "late", str(run / "checkpoints" / "step-00000040"), 22.0)
    card = card_of(run, tmp_path)
    assert "shards/late, captions and pictures (" in card
    assert "shards/early" not in card
    assert rows(card)["text → image"][:2] == ["22.00", "30.00"]
    early = export(str(run / "checkpoints" / "step-00000020"), "open_clip", str(tmp_path / "early"))
    card = (early / "README.md").read_text()
    assert rows(card)["text → image"][0] == "11.00"
    assert "step 20:" in card
    assert rows(card)["loss"] == ["0.2500"]


def test_metrics_of_the_run_s_model_folder_are_those_of_its_best_checkpoint(run, tmp_path):
    (run / "result.json").write_text('{"steps": 40, "seconds": 1.0, "ending": "finished", "best_step": 20}')
    write_evaluation(run, "test", str(run / "model"), 33.0)
    assert "## Retrieval" in card_of(run, tmp_path)
    newest = export(str(run / "checkpoints" / "step-00000040"), "open_clip", str(tmp_path / "newest"))
    assert "## Retrieval" not in (newest / "README.md").read_text()


def test_a_run_without_local_losses_is_not_called_goal(tiny_clip, tmp_path):
    without = ["loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0"]
    run = write_run(tmp_path / "plain", f"model.name={tiny_clip}", *without)
    assert "trained on whole pictures and captions" in card_of(run, tmp_path)


def test_the_cost_is_told_as_far_as_it_is_known(run, tmp_path):
    known = {"device": "cpu", "workers": 2, "seconds": 5400.0, "worker_hours": 3.0, "gpu_hours": 0.0, "flops": 3.1e15}
    measured = {"images_per_s": 12.34, "peak_memory_bytes": 3 * 2**30, "energy_joules": None}
    (run / "cost.json").write_text(json.dumps(known | measured))
    found = rows(card_of(run, tmp_path))
    assert found["device"] == ["cpu"]
    assert found["time"] == ["1.5 h"]
    assert found["worker hours"] == ["3"]
    assert found["GPU hours"] == ["0"]
    assert found["FLOPs"] == ["3.10e+15"]
    assert found["peak memory"] == ["3.00 GiB"]
    assert found["pictures per second"] == ["12.3"]
    assert "energy" not in found


def test_the_time_is_told_once_as_the_cost_tells_it(run, tmp_path):
    (run / "cost.json").write_text('{"seconds": 90.4}')
    lines = [line for line in card_of(run, tmp_path).splitlines() if line.startswith("| time")]
    assert lines == ["| time | 90 s |"]


def test_the_best_step_of_the_held_out_evaluations_is_told(tiny_clip, tmp_path):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", "evaluation.shards=held-out")
    records = [{"step": step, "text_to_image.R@1": share} for step, share in ((20, 7.0), (40, 6.0))]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    found = rows(card_of(run, tmp_path))
    assert found["held-out shards"] == ["held-out"]
    assert found["best"] == ["step 20 (text → image R@1 7.00)"]


def test_the_card_of_an_earlier_checkpoint_tells_nothing_of_later_ones(tiny_clip, tmp_path):
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", "evaluation.shards=held-out")
    records = [{"step": step, "text_to_image.R@1": share} for step, share in ((20, 6.0), (40, 7.0))]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    early = export(str(run / "checkpoints" / "step-00000020"), "open_clip", str(tmp_path / "early"))
    assert rows((early / "README.md").read_text())["best"] == ["step 20 (text → image R@1 6.00)"]


def test_sentences_and_regions_have_directions_of_their_own(run, tmp_path):
    write_evaluation(run, "test", str(run / "checkpoints" / "step-00000040"), 22.0)
    path = run / "evaluation" / "test.json"
    direction = {"R@1": 3.0, "median_rank": 7.0}
    local = {"text_to_image": direction, "image_to_text": direction, "count": 1234}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"local": local}))
    card = card_of(run, tmp_path)
    assert "shards/test, captions and pictures (100 pairs, 0 skipped):" in card
    assert "shards/test, sentences and regions (1,234 pairs, 0 skipped):" in card
    found = rows(card)
    assert found["text → image"] == ["22.00", "30.00", "60.00", "80.00", "20.00", "12.5"]
    assert found["sentence → region"] == found["region → sentence"] == ["3.00", "–", "–", "–", "–", "7"]


@pytest.mark.parametrize("content", ["{torn", "[1, 2]", '{"flops": "many"}'])
def test_a_damaged_cost_file_is_named(run, tmp_path, content):
    (run / "cost.json").write_text(content)
    with pytest.raises(StageError, match=r"cost\.json.*delete the file"):
        card_of(run, tmp_path)


def test_settings_cannot_break_the_markdown(tiny_clip, tmp_path):
    shards = "a | b `c` <img src=x> [d](http://e) *f* ```\n# g"
    run = write_run(tmp_path / "goal", f"model.name={tiny_clip}", f"data.shards={json.dumps(shards)}")
    card = card_of(run, tmp_path)
    assert rows(card)["data"] == [r"a \| b \`c\` \<img src=x\> \[d\](http://e) \*f\* \`\`\` # g"]
    assert card.count("\n# ") == 1
    opening = next(line for line in card.splitlines() if line.endswith("yaml") and line.startswith("`"))
    ticks = opening.removesuffix("yaml")
    inside = card.split(f"{opening}\n")[1].split(f"\n{ticks}\n")[0]
    assert yaml.safe_load(inside)["data"]["shards"] == shards


def test_a_fence_is_longer_than_any_run_of_ticks_inside():
    assert fence("plain") == "```"
    assert fence("a ```` b") == "`````"


def test_text_is_escaped_onto_one_line():
    assert escape("a\nb_c | d") == r"a b\_c \| d"
