"""Events are for log collectors, who ask for them."""

import logging

import pytest

from goal_ray.events import event, say


@pytest.mark.parametrize(("wish", "records"), [("json", 1), ("", 0)])
def test_events_are_logged_where_they_are_wanted_and_else_say_nothing(monkeypatch, caplog, wish, records):
    monkeypatch.setenv("GOAL_RAY_LOG", wish)
    event("train", "/runs/goal", "sample quarantined", logging.WARNING, shard="a.tar")
    assert len(caplog.records) == records
    for record in caplog.records:
        assert (record.run, record.stage, record.shard) == ("/runs/goal", "train", "a.tar")


def test_what_people_should_know_is_a_line_or_where_logs_are_json_a_record(monkeypatch, caplog, capsys):
    monkeypatch.delenv("GOAL_RAY_LOG", raising=False)
    say("train", "goal", "going on with 2 workers")
    assert capsys.readouterr().err == "going on with 2 workers\n"
    monkeypatch.setenv("GOAL_RAY_LOG", "json")
    say("train", "goal", "going on with 1 worker")
    assert capsys.readouterr().err == ""
    assert [record.message for record in caplog.records] == ["going on with 1 worker"]
