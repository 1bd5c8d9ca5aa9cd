"""A cloud's notice that it takes a machine. What Ray and a training make of it: tests/train/test_elastic.py."""

import threading

import pytest
from metadata_server import MetadataServer

from goal_ray.errors import StageError
from goal_ray.spot import notice
from goal_ray.spot.notice import CLOUDS, wait_for_notice


@pytest.fixture
def machine():
    with MetadataServer() as server:
        yield server


def ok(body: bytes) -> bytes:
    return b"HTTP/1.0 200 OK\r\n\r\n" + body


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_notice_is_none(machine, cloud):
    assert CLOUDS[cloud][0](machine.url) is None


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 120.0), ("gcp", 30.0)])
def test_a_notice_says_how_long_there_is(machine, cloud, seconds):
    machine.give_notice(120)
    assert CLOUDS[cloud][0](machine.url) == pytest.approx(seconds, abs=3)


def test_a_time_that_is_over_is_now(machine):
    machine.give_notice(-60)
    assert CLOUDS["aws"][0](machine.url) == 0


@pytest.mark.parametrize("cloud", CLOUDS)
def test_the_notice_is_waited_for_over_answers_that_fail(machine, cloud, monkeypatch):
    monkeypatch.setattr(notice, "POLL_S", 0.01)
    found = []
    waiting = threading.Thread(target=lambda: found.append(wait_for_notice(cloud, machine.url)))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    machine.failures = 3
    machine.nonsense = [b"no HTTP at all\r\n\r\n", ok(b"\xff not JSON"), ok(b"{}"), ok(b'{"time": 7}')]
    machine.give_notice(120)
    waiting.join(30)
    assert 0 < found[0] <= 120


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_machine_of_another_cloud_is_told(cloud):
    with MetadataServer() as gone:
        pass
    with pytest.raises(StageError, match=rf"the metadata server of {cloud}, does not answer"):
        wait_for_notice(cloud, gone.url)
