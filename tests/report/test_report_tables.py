"""What the page tells of runs in tables: settings, cost, retrieval, samples left out."""

import json

import pytest
from html_page import read_page, section
from report_inputs import add_cost, add_evaluation, add_history, add_quarantine, log_record

from goal_ray.report import records
from goal_ray.report import run as report_run
from goal_ray.report.records import LismSummary, read_lism_summary, read_run
from goal_ray.report.run import KINDS_SHOWN, write_report
from goal_ray.report.tables import metrics_tables

GLOBAL_ONLY = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0")


def test_settings_stand_side_by_side_and_differences_are_marked(make_run):
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY)), str(make_run())], images=0).url)
    rows = {row.find("th")[0].text: row for row in section(page, "settings").find("tbody")[0].find("tr")}
    assert [cell.text for cell in rows["loss weights"].find("td")] == [
        "global 1",
        "global 1 · local 0.5 · tsl_image 1 · tsl_text 1",
    ]
    assert rows["loss weights"].attributes == {"class": "differs"}
    assert [cell.text for cell in rows["steps"].find("td")] == ["40 of 40"] * 2
    assert rows["steps"].attributes == {}


def test_yellow_is_explained_where_settings_differ(make_run):
    runs = [str(make_run("a")), str(make_run("b"))]
    assert "differs between" not in section(read_page(write_report(runs, images=0).url), "settings").text
    runs.append(str(make_run("c", ("seed=7",))))
    assert "differs between the runs" in section(read_page(write_report(runs, images=0).url), "settings").text


def test_counts_have_thousands_separators(make_run):
    run = make_run(settings=("batch_per_worker=2048",), records=[log_record(12345, total_steps=2000000)])
    text = section(read_page(write_report([str(run)], images=0).url), "settings").text
    assert "12,345 of 2,000,000" in text
    assert "2,048 (per worker" in text


def test_the_best_step_of_the_held_out_evaluations_is_told(make_run):
    run = make_run(settings=("evaluation.shards=held-out/",))
    add_history(run, *({"step": step, "text_to_image.R@1": share} for step, share in ((10, 5.0), (20, 9.5), (30, 9.5))))
    settings = section(read_page(write_report([str(run), str(make_run("other"))], images=0).url), "settings")
    rows = {row.find("th")[0].text: [cell.text for cell in row.find("td")] for row in settings.find("tr")[1:]}
    assert rows["held-out shards"] == ["held-out/", "–"]
    assert rows["best"] == ["step 20 (text → image R@1 9.50)", "–"]


def test_the_best_of_a_finished_run_is_the_one_that_training_chose(make_run):
    run = make_run(settings=("evaluation.shards=held-out",))
    add_history(run, *({"step": step, "text_to_image.R@1": share} for step, share in ((10, 5.0), (20, 9.5), (30, 9.0))))
    (run / "result.json").write_text('{"steps": 40, "seconds": 1.0, "ending": "finished", "best_step": 30}')
    assert read_run(run, "run").best == (30, 9.0)


def test_evaluations_in_different_precisions_are_not_compared(make_run):
    run = make_run()
    add_evaluation(run, "test")
    add_evaluation(run, "test-bf16", shards="shards/test/", precision="bf16")
    tables = metrics_tables([read_run(run, "run")])
    assert [table.title for table in tables] == ["captions and pictures, in bf16", "captions and pictures"]
    assert not any(best for table in tables for rows in table.directions.values() for _, best in rows[0].cells)


def test_a_storage_out_of_reach_does_not_hold_up_a_report(make_run, s3, s3_server, monkeypatch):
    monkeypatch.setattr(report_run, "PATIENCE_S", 0.2)
    monkeypatch.setattr(records, "PATIENCE_S", 0.2)
    folder = make_run(settings=(f"data.shards={s3}/*.tar",))
    s3_server.stop()
    try:
        page = write_report([str(folder)], images=1)
    finally:
        s3_server.start()
    assert "choose paired shards with --shards" in page.note


def test_of_ranks_the_lowest_is_the_best(make_run):
    run = make_run(settings=("evaluation.shards=held-out/", "evaluation.metric=image_to_text.median_rank"))
    ranks = {10: 8.0, 20: 3.5, 30: 5.0}
    add_history(run, {"step": 5}, *({"step": step, "image_to_text.median_rank": rank} for step, rank in ranks.items()))
    settings = section(read_page(write_report([str(run)], images=0).url), "settings")
    assert "step 20 (image → text median rank 3.50)" in settings.text


def cells_of(table):
    """(text, is bold) of the cells of each row behind the run, direction by direction."""
    bodies = [[row.find("td")[1:] for row in body.find("tr")[1:]] for body in table.find("tbody")]
    return [[[(cell.text, "best" in cell.attributes["class"]) for cell in row] for row in body] for body in bodies]


def test_the_best_value_among_runs_on_the_same_shards_is_bold(make_run):
    first, second = make_run("first"), make_run("second")
    low, high = {"R@1": 10.0, "R@5": 30.0, "median_rank": 4.0}, {"R@1": 12.5, "R@5": 30.0, "median_rank": 9.0}
    add_evaluation(first, text_to_image=low, image_to_text=low)
    add_evaluation(second, text_to_image=high, image_to_text=low)
    page = read_page(write_report([str(first), str(second)], images=0).url)
    there, back = cells_of(section(page, "metrics").find("table")[0])
    dash = ("–", False)
    assert there == [
        [("10.00", False), ("30.00", True), dash, dash, dash, ("4", True)],
        [("12.50", True), ("30.00", True), dash, dash, dash, ("9", False)],
    ]
    assert back == [[("10.00", True), ("30.00", True), dash, dash, dash, ("4", True)]] * 2


def test_each_direction_has_its_rows_under_its_name(make_run):
    run = make_run()
    add_evaluation(run, text_to_image={"R@1": 1.0}, image_to_text={"R@1": 2.0})
    table = section(read_page(write_report([str(run)], images=0).url), "metrics").find("table")[0]
    assert [row.text for row in table.find("tr", "direction")] == ["text → image", "image → text"]
    assert [[row[0][0] for row in body] for body in cells_of(table)] == [["1.00"], ["2.00"]]


def test_pairs_and_skipped_samples_stand_in_the_heading_and_by_run_where_they_differ(make_run):
    first, second = make_run("first"), make_run("second")
    for run in (first, second):
        add_evaluation(run, "same", count=12345)
    add_evaluation(first, "other", skipped=[{"key": "bad"}])
    add_evaluation(second, "other")
    metrics = section(read_page(write_report([str(first), str(second)], images=0).url), "metrics")
    assert {title.find("span")[0].text for title in metrics.find("h3")} == {
        "12,345 pairs, 0 skipped",
        "first: 100 pairs, 1 skipped; second: 100 pairs, 0 skipped",
    }


def test_sentences_and_regions_have_tables_of_their_own_with_their_directions(make_run):
    run = make_run()
    local, joint = ({"text_to_image": {"mAP": share}, "image_to_text": {}, "count": share} for share in (70, 60))
    add_evaluation(run, local=local, joint=joint)
    metrics = section(read_page(write_report([str(run)], images=0).url), "metrics")
    assert [title.text for title in metrics.find("h3")] == [
        "shards/test: captions and pictures 100 pairs, 0 skipped",
        "shards/test: sentences and regions 70 pairs, 0 skipped",
        "shards/test: both together 60 pairs, 0 skipped",
    ]
    assert [row.text for row in metrics.find("tr", "direction")] == [
        *("text → image", "image → text"),
        *("sentence → region", "region → sentence"),
        *("joint, text → image", "joint, image → text"),
    ]
    assert "70.00" in metrics.find("table")[1].text
    assert "60.00" in metrics.find("table")[2].text


def test_runs_on_different_shards_are_not_compared(make_run):
    first, second = make_run("first"), make_run("second")
    add_evaluation(first, "easy")
    add_evaluation(second, "hard")
    metrics = section(read_page(write_report([str(first), str(second)], images=0).url), "metrics")
    assert [title.text.split(":")[0] for title in metrics.find("h3")] == ["shards/easy", "shards/hard"]
    assert not metrics.find("td", "best")


def test_a_run_without_an_evaluation_names_the_command_that_makes_one(make_run):
    run = make_run()
    page = read_page(write_report([str(run)], images=0).url)
    assert section(page, "metrics").find("code")[0].text == f"goal-ray evaluate {run} SHARDS"


def cost_rows(page):
    table = section(page, "cost").find("table")[0]
    return {row.find("th")[0].text: [cell.text for cell in row.find("td")] for row in table.find("tr")[1:]}


def test_what_each_run_cost_stands_side_by_side(make_run):
    first, second = make_run("first"), make_run("second")
    add_cost(first)
    add_cost(second, device="cpu", seconds=90.0, mfu=None, energy_joules=None)
    page = read_page(write_report([str(first), str(second)], images=0).url)
    assert cost_rows(page) == {
        "device": ["NVIDIA H100", "cpu"],
        "workers": ["8", "8"],
        "time": ["1.5 h", "90 s"],
        "GPU hours": ["12", "12"],
        "worker hours": ["12", "12"],
        "FLOPs": ["3.10e+18"] * 2,
        "MFU": ["41.2%", "–"],
        "pictures per second": ["2,345.6"] * 2,
        "peak memory": ["3.00 GiB"] * 2,
        "energy": ["2 kWh", "–"],
    }
    assert "time" not in [row.find("th")[0].text for row in section(page, "settings").find("tr")[1:]]


def test_a_run_that_does_not_tell_its_cost_has_no_table_of_it(make_run):
    page = read_page(write_report([str(make_run())], images=0).url)
    assert "cost" not in [each.attributes["id"] for each in page.find("section")]


def left_out(page):
    """The words and the table rows of the section on samples that were left out."""
    part = section(page, "left-out")
    rows = [[[cell.text for cell in row.find("td")] for row in table.find("tr")] for table in part.find("table")]
    return [words.text for words in part.find("p")], rows


def test_samples_left_out_are_counted_by_the_kind_of_reason(make_run, scenes):
    run = make_run(settings=(f"data.shards={scenes}",))
    broken = [("a.tar", "decode", f"ShardError: sample 'k{n}' has {n} bytes") for n in range(1234)]
    add_quarantine(run, ("b.tar", "scan", "ShardError: torn"), *broken)
    words, (rows,) = left_out(read_page(write_report([str(run)], images=0).url))
    assert words == ["In training: 1,235 samples."]
    assert rows == [["1,234", "decode: ShardError: sample … has N bytes"], ["1", "scan: ShardError: torn"]]


def test_kinds_of_reasons_beyond_a_screenful_are_only_counted(make_run):
    run = make_run()
    add_quarantine(run, *[("a.tar", "decode", f"kind {chr(ord('a') + n)}") for n in range(KINDS_SHOWN + 3)])
    words, (rows,) = left_out(read_page(write_report([str(run)], images=0).url))
    assert len(rows) == KINDS_SHOWN
    assert words[-1] == "and 3 kinds of reasons more"


@pytest.mark.parametrize("spec", ["{}", "{}/", "{}/*", "{}/a.tar", "{}/*.tar", "{}/scenes-{{000000..000001}}.tar"])
def test_what_lism_left_out_of_the_shards_of_a_run_is_told(make_run, tmp_path, spec):
    (tmp_path / "paired").mkdir()
    summary = {"samples": 1038, "quarantined": 1005, "reasons": {"decode: torn": 5, "read: no caption": 1000}}
    (tmp_path / "paired" / "lism.json").write_text(json.dumps(summary))
    shards = spec.format(tmp_path / "paired")
    run = make_run(settings=(f"data.shards={json.dumps(shards)}",))
    words, (rows,) = left_out(read_page(write_report([str(run)], images=0).url))
    assert words == [f"By LISM, when it paired {shards}: 1,005 of 1,038 samples.", "In training: none."]
    assert rows == [["1,000", "read: no caption"], ["5", "decode: torn"]]


def test_shards_may_lie_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "lism.json").write_text('{"samples": 3, "quarantined": 1}')
    monkeypatch.chdir(tmp_path)
    assert read_lism_summary("*.tar") == read_lism_summary(".") == LismSummary(3, 1)


@pytest.mark.parametrize("content", [None, "{torn", "[]", '{"samples": 3}'])
def test_shards_without_a_summary_of_lism_are_left_without_it(make_run, tmp_path, content):
    if content is not None:
        (tmp_path / "lism.json").write_text(content)
    run = make_run(settings=(f"data.shards={tmp_path}",))
    words, rows = left_out(read_page(write_report([str(run)], images=0).url))
    assert (words, rows) == (["In training: none."], [])
