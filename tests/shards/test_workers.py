"""Work on many shards in processes."""

import os
import signal
import subprocess
import sys
import time

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


WAITING = """
import sys, time
from pathlib import Path
from goal_ray.cli import run_main
from goal_ray.shards.workers import map_shards

def wait(place):
    Path(place).touch()
    time.sleep(600)

if __name__ == "__main__":
    run_main(lambda _: list(map_shards(wait, sys.argv[1:], 2, "x")))
"""


def test_ctrl_c_does_not_wait_for_workers_that_wait_for_a_storage(tmp_path):
    script, places = tmp_path / "wait.py", [tmp_path / "a", tmp_path / "b"]
    script.write_text(WAITING)
    process = subprocess.Popen([sys.executable, script, *places], start_new_session=True, stderr=subprocess.PIPE)
    while not all(place.exists() for place in places):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"interrupted" in complaint
    assert b"Traceback" not in complaint
