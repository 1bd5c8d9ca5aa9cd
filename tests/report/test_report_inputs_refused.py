"""Run folders that are none, and files that are damaged or half-written."""

import json

import pytest
from html_page import read_page, section
from report_inputs import add_evaluation, log_record

from goal_ray.errors import ConfigError, GoalRayError, StageError
from goal_ray.report.run import write_report


def test_a_missing_run_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"nowhere: no such run folder; give the folder that `goal-ray train` made"):
        write_report([str(tmp_path / "nowhere")])


@pytest.mark.parametrize("file", ["config.yaml", "metrics.jsonl"])
def test_a_folder_that_is_no_run_is_refused(make_run, file):
    run = make_run()
    (run / file).unlink()
    with pytest.raises(StageError, match=f"{run}: no run, it has no {file}"):
        write_report([str(run)])


def test_settings_that_this_version_does_not_know_are_refused(make_run):
    run = make_run()
    with (run / "config.yaml").open("a") as file:
        file.write("future: 1\n")
    with pytest.raises(ConfigError, match=r"config\.yaml:\s+future: unknown key"):
        write_report([str(run)])


@pytest.mark.parametrize("torn", [b'{"step": 50, "lo', b"{", b'{"step": {}', "é".encode()[:1]])
def test_a_last_line_without_its_end_is_left_out(make_run, torn):
    run = make_run()
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    page = read_page(write_report([str(run)], images=0).url)
    assert "40 of 40" in section(page, "settings").text


@pytest.mark.parametrize("broken", ['{"step": 50, "lo', "[]", '{"step": 50}', "", '"step total_steps loss"'])
def test_a_broken_line_within_the_log_is_named(make_run, broken):
    run = make_run()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(f"{broken}\n{json.dumps(log_record(60))}\n")
    with pytest.raises(StageError, match=r"metrics\.jsonl: line 5 .*; delete that line"):
        write_report([str(run)])


@pytest.mark.parametrize("content", ["", "[]", '{"model": "m"}', '{"count": "many"'])
def test_a_file_that_is_no_evaluation_is_named(make_run, content):
    run = make_run()
    add_evaluation(run)
    (run / "evaluation" / "other.json").write_text(content)
    with pytest.raises(StageError, match=r"other\.json: not an evaluation: .*`goal-ray evaluate`, or delete it"):
        write_report([str(run)])


@pytest.mark.parametrize("content", ["{torn", "[1, 2]", '{"flops": "many"}'])
def test_a_damaged_cost_file_is_named(make_run, content):
    run = make_run()
    (run / "cost.json").write_text(content)
    with pytest.raises(StageError, match=r"cost\.json: .*delete the file to go on without it"):
        write_report([str(run)], images=0)


def test_a_broken_line_of_the_held_out_history_is_named(make_run):
    run = make_run()
    (run / "evaluations.jsonl").write_text('{"step": 8}\n{"text_to_image.R@1": 1.0}\n')
    with pytest.raises(StageError, match=r"evaluations\.jsonl: line 2 has no step; delete that line"):
        write_report([str(run)], images=0)


def test_a_page_that_cannot_be_written_is_named(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"page\.html: cannot be written .* --out"):
        write_report([str(make_run())], out=str(tmp_path / "file" / "page.html"), images=0)


def test_a_negative_number_of_pictures_is_refused(make_run):
    with pytest.raises(StageError, match="--images must be 0 or more, not -1"):
        write_report([str(make_run())], images=-1)


def test_shards_that_the_user_names_must_be_there(make_run, tmp_path):
    with pytest.raises(GoalRayError, match=r"absent: no such file or folder"):
        write_report([str(make_run())], shards=str(tmp_path / "absent"))
