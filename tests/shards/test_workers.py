"""Work on many shards in processes."""

import os
import signal

import pytest
from shard_inputs import good, write_members

from goal_ray.errors import ShardError, StageError
from goal_ray.shards.spans import sample_spans
from goal_ray.shards.workers import map_shards


def die(_: str) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_the_death_of_a_worker_is_an_error_that_names_the_remedy():
    with pytest.raises(StageError, match=r"a worker died.*fewer --workers"):
        list(map_shards(die, ["a", "b"], 2, "x"))


def test_an_error_in_a_worker_arrives_as_it_was_raised(tmp_path):
    for name in "ab":
        write_members(tmp_path / f"{name}.tar", [*good("k"), *good("other"), *good("k")])
    with pytest.raises(ShardError, match=r"a\.tar: the key 'k' stands at two places") as error:
        list(map_shards(sample_spans, [str(tmp_path / "a.tar"), str(tmp_path / "b.tar")], 2, "x"))
    assert error.value.key == "k"
