"""Events are for log collectors, who ask for them."""

import logging

import pytest

from goal_ray.events import event


@pytest.mark.parametrize(("wish", "records"), [("json", 1), ("", 0)])
def test_events_are_logged_where_they_are_wanted_and_else_say_nothing(monkeypatch, caplog, wish, records):
    monkeypatch.setenv("GOAL_RAY_LOG", wish)
    event("train", "/runs/goal", "sample quarantined", logging.WARNING, shard="a.tar")
    assert len(caplog.records) == records
    for record in caplog.records:
        assert (record.run, record.stage, record.shard) == ("/runs/goal", "train", "a.tar")
