"""Bars, and plain lines on a clock that the tests turn."""

import contextlib
import io
import sys

import pytest

from goal_ray.progress import LINE_EVERY_S, PlainLines, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_latest_is_printed_now_and_then_and_what_is_left_on_demand(capsys):
    now = 100.0
    lines = PlainLines(lambda: now)
    for second in range(1, 100):
        now += 1
        lines.tell(f"second {second}")
    due = [f"second {LINE_EVERY_S * times:.0f}" for times in (1, 2, 3)]
    assert capsys.readouterr().err.splitlines() == due
    for _ in range(2):
        lines.flush()
    assert capsys.readouterr().err == "second 99\n"


def test_what_is_told_at_once_puts_the_next_line_off(capsys):
    now = 100.0
    lines = PlainLines(lambda: now)
    now += LINE_EVERY_S - 1
    lines.tell("first", at_once=True)
    now += 1
    lines.tell("second")
    assert capsys.readouterr().err == "first\n"
    now += LINE_EVERY_S
    lines.tell("third")
    assert capsys.readouterr().err == "third\n"


@pytest.mark.parametrize(("stream", "log"), [(Terminal, ""), (io.StringIO, "json")])
def test_neither_a_terminal_nor_a_log_of_json_lines_gets_any(monkeypatch, stream, log):
    monkeypatch.setenv("GOAL_RAY_LOG", log)
    monkeypatch.setattr(sys, "stderr", stream())
    PlainLines().tell("x", at_once=True)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(
    ("unit", "total", "line"),
    [
        ("B", 1000, "work: 30 %, 3 odd, 01:10 left"),
        ("sample", 1000, "work: 30 %, 300 of 1,000 samples, 3 odd, 01:10 left"),
        ("sample", None, "work: 300 samples, 3 odd"),
    ],
)
def test_where_no_terminal_is_a_line_tells_how_far_the_work_is(capsys, unit, total, line):
    now = 1000.0
    with Progress("work", unit, total, lambda: now) as progress:
        for _ in range(5):
            now += LINE_EVERY_S / 3
            progress.add(100, f"{progress.done // 60} odd")
    assert capsys.readouterr().err.splitlines() == [line]


@pytest.mark.parametrize(("error", "end"), [(None, "work: 100%|"), (KeyError, "work:  40%|")])
def test_a_bar_reaches_its_end_unless_the_work_fails(monkeypatch, error, end):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with contextlib.suppress(KeyError), Progress("work", "sample", 10) as progress:
        progress.add(4)
        if error:
            raise error
    assert sys.stderr.getvalue().rstrip().split("\r")[-1].startswith(end)


def test_no_bar_stands_between_json_lines(monkeypatch):
    monkeypatch.setenv("GOAL_RAY_LOG", "json")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress("work", "sample", 10) as progress:
        progress.add(4)
    assert sys.stderr.getvalue() == ""
