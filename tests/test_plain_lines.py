"""Plain lines, on a clock that the tests turn."""

import io
import sys

import pytest

from goal_ray.plain_lines import LINE_EVERY_S, PlainLines


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
