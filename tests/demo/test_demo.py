"""The demo's script on real Ray, DeepSpeed and models, at a size that takes seconds; its own size is `make demo`."""

import io
import json
import shutil
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

import pytest
import yaml

from goal_ray.demo import run as demo
from goal_ray.errors import StageError
from goal_ray.scenes.run import SceneSettings, draw_scenes

STEPS = {"max_steps": 2, "batch_per_worker": 4, "checkpoint_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def made(cluster, tiny_clip, tmp_path_factory):  # noqa: ARG001 (Ray must run)
    """The demo's folder and result, for small sets of scenes, a tiny model and two steps a run."""
    recipes, out = tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("out")
    for name in ("start.yaml", "finetune.yaml"):
        tree = yaml.safe_load((demo.HERE / name).read_text())
        (recipes / name).write_text(yaml.safe_dump(tree | STEPS))
    shutil.copy(tiny_clip, recipes / "demo_clip.json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "HERE", recipes)
        patch.setattr(
            demo,
            "SCENES",
            {
                "short": demo.SceneSet(16, SceneSettings(size=48, crops=0.5, short=True), 1),
                "train": demo.SceneSet(16, SceneSettings(size=64), 2),
                "test": demo.SceneSet(60, SceneSettings(size=64, paired=True), 3),
            },
        )
        with redirect_stderr(io.StringIO()) as said:
            result = demo.run_demo(out, range(1))
        yield {"out": out, "result": result, "said": said.getvalue()}


def test_demo_measures_start_global_and_goal_on_the_same_held_out_scenes(made):
    (result,) = made["result"]["seeds"]
    assert list(result["models"]) == ["start", "global", "goal"]
    for model in result["models"].values():
        assert [model[part]["count"] for part in demo.MEASURES] == [60, 60, 120]
        assert all(0 <= model[part]["text_to_image"][at] <= 100 for part, at in demo.MEASURES.items())
    assert json.loads((made["out"] / demo.RESULT_FILE).read_text()) == made["result"]


def test_demos_two_runs_differ_in_loss_weights_and_name_alone(made):
    first, second = (
        yaml.safe_load((made["out"] / "seed-0" / "runs" / name / "config.yaml").read_text())
        for name in ("global", "goal")
    )
    assert {key for key in first if first[key] != second[key]} == {"loss", "name"}
    weights = {key for key in first["loss"] if first["loss"][key] != second["loss"][key]}
    assert weights == {"weight_local", "weight_tsl_image", "weight_tsl_text"}


def test_demo_computes_on_the_cpu_also_where_the_cluster_has_a_gpu(made):
    """One GPU has no room for its two workers."""
    seed = made["out"] / "seed-0"
    stored = [seed / "paired" / "config.yaml", *(seed / "runs" / name / "config.yaml" for name in demo.MODELS)]
    assert {yaml.safe_load(path.read_text())["device"] for path in stored} == {"cpu"}


@pytest.mark.slow
def test_demo_run_again_trains_nothing_and_gives_the_same_numbers(made):
    weights = [path for path in made["out"].rglob("*.safetensors") if "checkpoints" in path.parts]
    before = {path: path.stat().st_mtime_ns for path in weights}
    assert before
    first, again = made["result"]["seeds"][0], demo.run_demo(made["out"], range(1))["seeds"][0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again["models"] == first["models"]
    assert again["lism"] == first["lism"]


def test_demo_starts_a_run_whose_folder_a_kill_left_empty(tmp_path, monkeypatch):
    def starts(*_):
        raise StageError("it starts")

    monkeypatch.setattr("goal_ray.train.run.ray_session", lambda _: nullcontext())
    monkeypatch.setattr("goal_ray.train.run.train_on_cluster", starts)
    draw_scenes(str(tmp_path / "scenes"), 2, 0, SceneSettings(size=48))
    (tmp_path / "runs" / "start").mkdir(parents=True)
    with pytest.raises(StageError, match="it starts"):
        demo.fit("start.yaml", tmp_path, 0, str(tmp_path / "scenes"), str(demo.HERE / "demo_clip.json"))


def test_demo_writes_a_report_of_its_runs(made):
    html = (made["out"] / "seed-0" / "report.html").read_text()
    assert all(name in html for name in ("start", "global", "goal"))
    assert (made["out"] / made["result"]["seeds"][0]["gallery"]).exists()


def test_demo_tells_which_of_its_stages_goes_on(made):
    said = [line for line in made["said"].splitlines() if line.startswith("seed 0, stage ")]
    assert [line.split(":")[0] for line in said] == [f"seed 0, stage {number} of 7" for number in range(1, 8)]
    assert said[2].endswith("with LISM")


def test_demo_prints_a_seeds_results_on_80_columns(capsys):
    model = {
        part: {way: {at: 100.0} for way in demo.DIRECTIONS} | {"count": 1000} for part, at in demo.MEASURES.items()
    }
    lism = {"right_region": 1.0, "object_recall": 1.0, "sentences": 1490}
    models = {name: {**model, "train_seconds": 12345.0} for name in demo.MODELS}
    places = {"report": "seed-0/report.html", "gallery": "seed-0/paired/gallery.html"}
    demo.print_result({"seed": 0, "seconds": 480.0, "models": models, "lism": lism, **places}, Path("demo"))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert f"global loss only  {'   100.0 / 100.0' * 3}        12345\n" in printed


def test_spread_over_seeds_is_mean_and_sample_deviation():
    def model(value: float) -> dict:
        return {part: {way: {at: value} for way in demo.DIRECTIONS} for part, at in demo.MEASURES.items()}

    def result(goal: float) -> dict:
        return {"models": {"start": model(1.0), "global": model(1.0), "goal": model(goal)}}

    found = demo.spread([result(2.0), result(4.0)])
    for part in demo.MEASURES:
        assert found["models"]["goal"][part]["text_to_image"] == pytest.approx({"mean": 3.0, "std": 2**0.5})
        assert found["goal_minus_global"][part]["image_to_text"] == pytest.approx({"mean": 2.0, "std": 2**0.5})
