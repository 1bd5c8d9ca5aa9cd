"""The page itself: what it shows of runs, and that it needs nothing else."""

import re
import subprocess
import sys

import pytest
from html_page import read_page, section
from report_inputs import add_evaluation, add_quarantine

from goal_ray.report.__main__ import main
from goal_ray.report.run import write_report


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
    add_quarantine(run, ("a.tar", "decode", "<script>alert(x)</script>"))
    add_evaluation(run, shards=hostile, model=hostile)
    page = read_page(write_report([str(run)]).url)
    assert not page.find("script")
    assert not page.find("i")
    for name in ("settings", "metrics"):
        assert hostile in section(page, name).text
    assert "<script>alert(x)</script>" in section(page, "left-out").text


def test_the_page_works_without_ray_and_deepspeed(make_run):
    run = make_run()
    code = (
        "import sys; sys.modules['ray'] = sys.modules['deepspeed'] = None\n"
        f"from goal_ray.report.__main__ import main; main([{str(run)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert section(read_page(run / "report.html"), "gallery").find("article")


def test_the_whole_config_can_be_unfolded(make_run):
    run = make_run()
    page = read_page(write_report([str(run)], images=0).url)
    assert section(page, "settings").find("details")[0].find("pre")[0].text == (run / "config.yaml").read_text()


def test_runs_of_one_name_are_told_apart_by_their_path(make_run, tmp_path):
    (tmp_path / "other").mkdir()
    run = make_run()
    other = run.rename(tmp_path / "other" / "goal")
    page = read_page(write_report([str(make_run()), str(other)], images=0).url)
    names = section(page, "settings").find("thead")[0].find("span", "run")
    assert [name.text for name in names] == [str(run), str(other)]


def test_a_reason_that_utf8_cannot_hold_does_not_stop_the_page(make_run):
    run = make_run()
    add_quarantine(run, ("a.tar", "decode", "half a pair: \ud83d"))
    page = read_page(write_report([str(run)], images=0).url)
    assert "half a pair: ?" in section(page, "left-out").text


def test_long_texts_break_and_the_names_of_rows_stay_in_sight(make_run):
    style = read_page(write_report([str(make_run())], images=0).url).find("style")[0].text
    rules = dict(re.findall(r"([^{}]+?)\s*\{([^{}]*)\}", style))
    for selector in (".soft", ".plain td", ".settings :is(th, td)", ".numbers :is(th, td):first-child"):
        assert "overflow-wrap: anywhere" in rules[f"\n{selector}"], selector
    assert "position: sticky" in rules["\n.numbers :is(th, td):first-child"]
    assert "white-space: normal" in rules["\n.numbers thead th"]


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    for word in ("goal-ray report", "RUN [RUN ...]", "--out", "--shards", "--images", "--seed", "example:"):
        assert word in shown
