"""What a run makes of its evaluations: the best checkpoint, what must stay, when to end. No Ray: results are given."""

import json

import pytest

from goal_ray.errors import StageError
from goal_ray.jsonl import read_records
from goal_ray.metric_names import by_dotted_name
from goal_ray.run_folder import HISTORY_FILE
from goal_ray.train.config import EvaluationConfig
from goal_ray.train.evaluation import Evaluations

METRIC = "text_to_image.R@1"


def evaluations(run_dir, curve: dict[int, float], metric=METRIC, there=None, **settings) -> Evaluations:
    """The evaluations of a run whose checkpoints after some steps are there, resumed with a history."""
    for step in curve if there is None else there:
        folder = run_dir / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"step": step}))
    lines = [json.dumps({"step": step, metric: value}) + "\n" for step, value in curve.items()]
    (run_dir / HISTORY_FILE).write_text("".join(lines))
    config = EvaluationConfig("held-out", metric=metric, pairs=1, **settings)
    return Evaluations(run_dir, config, lambda *_: None, lambda _: None)


def test_the_best_is_the_earliest_of_the_highest(tmp_path):
    assert evaluations(tmp_path, {2: 10.0, 4: 30.0, 6: 30.0, 8: 20.0}).best == 4


def test_the_best_rank_is_the_lowest(tmp_path):
    assert evaluations(tmp_path, {2: 9.0, 4: 3.0, 6: 5.0}, metric="joint.image_to_text.median_rank").best == 4


def test_a_best_checkpoint_that_is_gone_is_not_the_best(tmp_path):
    assert evaluations(tmp_path, {2: 10.0, 4: 30.0, 6: 20.0}, there=[2, 6]).best == 6


def test_results_beyond_the_newest_checkpoint_are_those_of_steps_that_come_again(tmp_path):
    found = evaluations(tmp_path, {2: 10.0, 4: 30.0, 6: 50.0}, there=[2, 4])
    assert found.best == 4
    found.add(6)  # trained again, with a lower learning rate
    assert found.waiting == 6
    found.record(6, {"text_to_image": {"R@1": 20.0}, "image_to_text": {"R@1": 20.0}})
    assert [record["step"] for record in read_records(tmp_path / HISTORY_FILE)] == [2, 4, 6]
    assert found.values == {2: 10.0, 4: 30.0, 6: 20.0}


def test_of_the_checkpoints_that_nobody_evaluated_yet_the_newest_waits_and_stays(tmp_path):
    found = evaluations(tmp_path, {2: 10.0, 4: 5.0}, there=[2, 4, 6, 8])
    assert found.waiting == 8
    assert found.needed == {2, 8}
    found.add(10)
    assert found.needed == {2, 10}


@pytest.mark.parametrize(
    ("curve", "ends"),
    [
        ([10, 20, 30], False),
        ([10, 30, 20], False),
        ([10, 30, 20, 30], True),
        ([30, 20, 10], True),
        ([30, 20, 31], False),
        ([30], False),
    ],
)
def test_a_run_ends_after_two_evaluations_without_a_better_one(tmp_path, curve, ends):
    found = evaluations(tmp_path, {2 * (at + 1): value for at, value in enumerate(curve)}, patience=2)
    assert found.out_of_patience == ends


def test_without_patience_a_run_goes_on(tmp_path):
    assert not evaluations(tmp_path, {2: 30.0, 4: 10.0, 6: 10.0, 8: 1.0}).out_of_patience


def test_a_metric_that_the_held_out_set_is_too_small_for_costs_no_run(tmp_path):
    found = evaluations(tmp_path, {2: 10.0}, metric="text_to_image.R@50")
    said = []
    found.say = said.append
    ranking = {"R@1": 30.0, "mAP": 40.0}
    found.record(4, {"text_to_image": ranking, "image_to_text": ranking})
    assert "gave no text_to_image.R@50" in said[0]
    assert "set evaluation.metric to one of image_to_text.R@1, " in said[0]
    again = Evaluations(tmp_path, found.config, lambda *_: None, lambda _: None)
    assert again.values == {2: 10.0}
    assert again.best == 2


def test_what_is_left_to_do_is_what_waits_and_what_runs_not_the_best(tmp_path):
    found = evaluations(tmp_path, {2: 10.0}, there=[2, 4])
    assert found.left == 1
    found.running = 6, None
    assert found.left == 2
    assert not found.finish(lambda: None, lambda: True, 0.0)


@pytest.mark.parametrize("has_place", [False, True])
def test_at_the_end_an_evaluation_without_a_place_is_waited_for_no_longer_than_nodes_are(
    tmp_path, monkeypatch, has_place
):
    found = evaluations(tmp_path, {2: 10.0}, cpus=16, gpus=2)
    found.running = 4, None
    polled = []

    def poll(wait_s):
        polled.append(wait_s)
        if len(polled) == 3:
            found.running = None

    monkeypatch.setattr(found, "poll", poll)
    monkeypatch.setattr(found.place, "found", lambda: [has_place])
    if has_place:
        assert found.finish(lambda: None, lambda: False, patience_s=0.0)
        return
    with pytest.raises(
        StageError, match=r"16 CPUs and 2 GPUs free .* step 4 .*evaluation\.cpus or evaluation\.gpus.*--resume"
    ):
        found.finish(lambda: None, lambda: False, patience_s=0.0)


def test_metrics_have_dotted_names():
    ranking = {"text_to_image": {"R@1": 1.0}, "image_to_text": {"R@1": 2.0}}
    assert by_dotted_name({**ranking, "count": 9, "joint": ranking}) == {
        "text_to_image.R@1": 1.0,
        "image_to_text.R@1": 2.0,
        "joint.text_to_image.R@1": 1.0,
        "joint.image_to_text.R@1": 2.0,
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "R@1"}, "metric 'R@1' is unknown"),
        ({"metric": "text_to_image.R@7"}, "is unknown"),
        ({"metric": "joint.text_to_image.mAP"}, "needs pairs"),
        ({"patience": 2}, "needs held-out shards"),
        ({"shards": "x", "patience": 0}, "patience must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)
