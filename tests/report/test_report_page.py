"""The page itself: what it shows of runs, and that it needs nothing else."""

import json
import math
import subprocess
import sys

import pytest
from html_page import read_page, section
from report_inputs import add_evaluation, log_record

from goal_ray.report.__main__ import main
from goal_ray.report.curves import MAX_POINTS
from goal_ray.report.run import write_report

GLOBAL_ONLY = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0")
NO_LOCAL_TERMS = {"loss_local": 0.0, "loss_tsl_image": 0.0, "loss_tsl_text": 0.0}


def curves_of(page):
    """The drawings by their titles."""
    figures = section(page, "curves").find("figure")
    return {figure.find("svg")[0].attributes["aria-label"].split(",")[0]: figure for figure in figures}


def colour_of(element):
    return element.attributes["style"].removeprefix("--c: ")


def run_colours(page):
    names = section(page, "settings").find("thead")[0].find("span", "run")
    return {name.text: colour_of(name) for name in names}


def strokes(figure):
    return [path.attributes.get("style", "") for path in figure.find("path")]


def test_the_command_writes_the_page_into_the_last_run(make_run, capsys):
    first, last = make_run("first"), make_run("last")
    main([str(first), str(last)])
    assert (last / "report.html").is_file()
    assert not (first / "report.html").exists()
    assert str(last / "report.html") in capsys.readouterr().out


def test_out_chooses_the_file(make_run, tmp_path):
    page = write_report([str(make_run())], out=str(tmp_path / "pages" / "mine.html"), images=0)
    assert read_page(page.url).find("title")[0].text.startswith("goal")


def test_the_page_refers_to_nothing_outside_itself(make_run):
    run = make_run()
    add_evaluation(run)
    page = read_page(write_report([str(run)]).url)
    assert not [e.tag for e in page.inside if e.tag in ("script", "link", "iframe", "img", "object", "base")]
    values = [
        value for e in page.inside for name, value in e.attributes.items() if name in ("src", "href", "xlink:href")
    ]
    assert values
    assert all(value.startswith(("#", "data:image/jpeg;base64,")) for value in values)
    assert "http" not in "".join(style.text for style in page.find("style"))
    assert not any(word in style.text for style in page.find("style") for word in ("url(", "@import"))


def test_text_of_the_run_folder_is_escaped(make_run):
    hostile = "<script>alert('x')</script>"
    run = make_run("<i>name", settings=(f"model.name={hostile}",))
    (run / "quarantine.jsonl").write_text(
        json.dumps({"stage": "decode", "reason": hostile, "key": "", "shard": ""}) + "\n"
    )
    add_evaluation(run, shards=hostile, model=hostile)
    page = read_page(write_report([str(run)]).url)
    assert not page.find("script")
    assert not page.find("i")
    for name in ("settings", "metrics", "quarantine"):
        assert hostile in section(page, name).text


def test_the_page_works_without_ray_and_deepspeed(make_run):
    run = make_run()
    code = (
        "import sys; sys.modules['ray'] = sys.modules['deepspeed'] = None\n"
        f"from goal_ray.report.__main__ import main; main([{str(run)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert section(read_page(run / "report.html"), "gallery").find("article")


def test_settings_stand_side_by_side_and_differences_are_marked(make_run):
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY)), str(make_run())], images=0).url)
    rows = {row.find("th")[0].text: row for row in section(page, "settings").find("tbody")[0].find("tr")}
    assert [cell.text for cell in rows["loss weights"].find("td")] == [
        "global 1",
        "global 1 · local 0.5 · tsl_image 1 · tsl_text 1",
    ]
    assert rows["loss weights"].attributes == {"class": "differs"}
    assert [cell.text for cell in rows["steps"].find("td")] == ["40 of 40"] * 2
    assert [cell.text for cell in rows["time"].find("td")] == ["80 s"] * 2
    assert rows["steps"].attributes == {}


def test_the_whole_config_can_be_unfolded(make_run):
    run = make_run()
    page = read_page(write_report([str(run)], images=0).url)
    assert section(page, "settings").find("details")[0].find("pre")[0].text == (run / "config.yaml").read_text()


def test_runs_are_drawn_over_each_other_each_in_its_colour(make_run):
    page = read_page(write_report([str(make_run("a")), str(make_run("b")), str(make_run("c"))], images=0).url)
    colours = run_colours(page)
    assert len(set(colours.values())) == 3
    for figure in curves_of(page).values():
        assert all(any(colour in style for style in strokes(figure)) for colour in colours.values())


def test_a_term_is_drawn_for_the_runs_that_have_it(make_run):
    records = [log_record(step, **NO_LOCAL_TERMS) for step in (10, 20)]
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY, records)), str(make_run())], images=0).url)
    figures, colours = curves_of(page), run_colours(page)
    for title, drawn in (("global term", True), ("local term", False), ("TSL image term", False)):
        assert any(colours["global"] in style for style in strokes(figures[title])) == drawn
        assert any(colours["goal"] in style for style in strokes(figures[title]))


def test_a_term_that_no_run_has_is_not_drawn(make_run):
    records = [log_record(step, **NO_LOCAL_TERMS) for step in (10, 20)]
    page = read_page(write_report([str(make_run("global", GLOBAL_ONLY, records))], images=0).url)
    assert list(curves_of(page)) == ["loss", "global term", "learning rate", "images per second"]


def test_lines_and_letters_take_the_colours_of_light_and_dark(make_run):
    page = read_page(write_report([str(make_run())], images=0).url)
    figure = curves_of(page)["loss"]
    assert any("currentColor" in style for style in strokes(figure))
    assert all("currentColor" in text.attributes["style"] for text in figure.find("text"))
    assert "prefers-color-scheme: dark" in page.find("style")[0].text


def test_a_run_that_diverged_is_still_drawn(make_run):
    records = [log_record(10), log_record(20, loss=math.nan), log_record(30, loss=math.inf)]
    page = read_page(write_report([str(make_run(records=records))], images=0).url)
    assert "inf" in curves_of(page)["loss"].find("figcaption")[0].text


def test_a_single_log_line_is_a_visible_point(make_run):
    page = read_page(write_report([str(make_run(records=[log_record(10)]))], images=0).url)
    colour = run_colours(page)["goal"]
    markers = [e for e in curves_of(page)["loss"].find("use") if colour in e.attributes.get("style", "")]
    assert len(markers) == 1


def test_a_long_run_keeps_the_page_small(make_run):
    noisy = [log_record(step, loss=2 + math.sin(step**2)) for step in range(1, 20_001)]
    page = read_page(write_report([str(make_run(records=noisy))], images=0).url)
    assert max(path.attributes["d"].count("L") for path in page.find("path")) < MAX_POINTS


def test_a_run_without_a_log_line_says_so(make_run):
    page = read_page(write_report([str(make_run(records=[]))], images=0).url)
    assert "No step has been logged yet" in section(page, "curves").text


def test_runs_of_one_name_are_told_apart_by_their_path(make_run, tmp_path):
    (tmp_path / "other").mkdir()
    run = make_run()
    other = run.rename(tmp_path / "other" / "goal")
    page = read_page(write_report([str(make_run()), str(other)], images=0).url)
    assert list(run_colours(page)) == [str(run), str(other)]


def test_the_best_value_among_runs_on_the_same_shards_is_bold(make_run):
    first, second = make_run("first"), make_run("second")
    low, high = {"R@1": 10.0, "R@5": 30.0, "median_rank": 4.0}, {"R@1": 12.5, "R@5": 30.0, "median_rank": 9.0}
    add_evaluation(first, text_to_image=low, image_to_text=low, skipped=[{"key": "bad"}])
    add_evaluation(second, text_to_image=high, image_to_text=low)
    page = read_page(write_report([str(first), str(second)], images=0).url)
    rows = section(page, "metrics").find("tbody")[0].find("tr")
    cells = [[(cell.text, "best" in cell.attributes.get("class", "")) for cell in row.find("td")[2:]] for row in rows]
    dash = ("–", False)
    same = [("10.00", True), ("30.00", True), dash, dash, dash, ("4", True)]
    assert cells == [
        [("10.00", False), ("30.00", True), dash, dash, dash, ("4", True), *same, ("100", False), ("1", False)],
        [("12.50", True), ("30.00", True), dash, dash, dash, ("9", False), *same, ("100", False), ("0", False)],
    ]


def test_sentences_and_regions_have_tables_of_their_own(make_run):
    run = make_run()
    local, joint = ({"text_to_image": {"mAP": share}, "image_to_text": {}, "count": share} for share in (70, 60))
    add_evaluation(run, local=local, joint=joint)
    metrics = section(read_page(write_report([str(run)], images=0).url), "metrics")
    titles = ["captions and pictures", "sentences and regions", "both together"]
    assert [title.text for title in metrics.find("h3")] == [f"shards/test: {title}" for title in titles]
    rows = [[cell.text for cell in body.find("td")] for body in metrics.find("tbody")]
    assert [row[-2] for row in rows] == ["100", "70", "60"]
    assert "70.00" in rows[1]
    assert "60.00" in rows[2]


def test_runs_on_different_shards_are_not_compared(make_run):
    first, second = make_run("first"), make_run("second")
    add_evaluation(first, "easy")
    add_evaluation(second, "hard")
    metrics = section(read_page(write_report([str(first), str(second)], images=0).url), "metrics")
    assert [title.text for title in metrics.find("h3")] == [
        f"shards/{name}: captions and pictures" for name in ("easy", "hard")
    ]
    assert not metrics.find("td", "best")


def test_a_run_without_an_evaluation_names_the_command_that_makes_one(make_run):
    run = make_run()
    page = read_page(write_report([str(run)], images=0).url)
    assert section(page, "metrics").find("code")[0].text == f"goal-ray evaluate {run} SHARDS"


def test_quarantined_samples_are_counted_by_stage(make_run):
    run = make_run()
    bad = [{"stage": stage, "reason": f"{stage} {n}", "key": f"{n}", "shard": ""} for n, stage in enumerate("aba")]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in bad))
    rows = section(read_page(write_report([str(run)], images=0).url), "quarantine").find("tr")
    assert [[cell.text for cell in row.find("td")] for row in rows] == [
        ["2 at a", "for example: a 0"],
        ["1 at b", "for example: b 1"],
    ]


def test_a_reason_that_utf8_cannot_hold_does_not_stop_the_page(make_run):
    run = make_run()
    (run / "quarantine.jsonl").write_text('{"stage": "decode", "reason": "half a pair: \\ud83d"}\n')
    page = read_page(write_report([str(run)], images=0).url)
    assert "half a pair: ?" in section(page, "quarantine").text


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("goal-ray report", "RUN [RUN ...]", "--out", "--shards", "--images", "--seed", "example:"):
        assert word in shown
