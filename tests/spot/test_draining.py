"""Draining a node at the cloud's notice. What a training makes of it: tests/train/test_elastic.py."""

from types import SimpleNamespace

import pytest

from goal_ray.errors import StageError
from goal_ray.spot import __main__ as spot


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A clock that only the pauses between tries move."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], time=lambda: now[0], sleep=lambda s: now.__setitem__(0, now[0] + s)
    )
    monkeypatch.setattr(spot, "time", clock)


class Fickle:
    """A node that is drained at the try after some that failed; `left` is what each was told of the time."""

    def __init__(self, failures: int):
        self.failures, self.left, self.id = failures, [], "n"

    def drain(self, left_s: float, _: str) -> None:
        self.left.append(left_s)
        if len(self.left) <= self.failures:
            raise StageError("Ray's head does not answer")


def test_a_node_that_is_not_drained_at_once_is_drained_while_there_is_time():
    node = Fickle(failures=3)
    spot.drain_in_time(node, 30.0, "aws takes it")
    assert node.left == [30.0, 29.0, 28.0, 27.0]


def test_a_node_that_cannot_be_drained_is_told_when_the_time_is_over():
    node = Fickle(failures=99)
    with pytest.raises(StageError, match="does not answer"):
        spot.drain_in_time(node, 5.0, "aws takes it")
    assert node.left[-1] == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node-id", "ab" * 28], r"has no living node (ab)+; `ray list nodes`"),
        (["--address", "127.0.0.1:1"], r"no Ray is found at 127.0.0.1:1 .*`ray start` first"),
    ],
)
@pytest.mark.usefixtures("cluster")
def test_a_mistake_shows_when_it_is_made_not_at_the_notice(monkeypatch, arguments, message):
    import ray

    if "--address" in arguments:

        def client(address):
            raise ray.exceptions.RpcError(f"{address}: timed out")

        monkeypatch.setattr(ray._raylet, "GcsClient", client)
    else:
        arguments = ["--address", ray.get_runtime_context().gcs_address, *arguments]
    monkeypatch.setattr(spot, "wait_for_notice", None)
    with pytest.raises(StageError, match=message):
        spot.main(["aws", *arguments])


@pytest.mark.usefixtures("cluster")
def test_a_machine_s_own_node_is_found():
    import ray

    context = ray.get_runtime_context()
    assert spot.Node(context.gcs_address, None).id == context.get_node_id()
