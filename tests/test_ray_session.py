"""The Ray cluster that a stage starts for itself."""

import os
import subprocess
import sys

import pytest

LISTENERS = """
import os, psutil, ray
from goal_ray.ray_session import ray_session
with ray_session():
    ray.get(ray.remote(lambda: None).remote())
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = [(c.laddr.ip, p.name()) for p in mine for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    print(sorted({ip.removeprefix("::ffff:") for ip, _ in found}))
print(ray.is_initialized())
"""


BROKEN_START = """
import ray._private.services as services
from goal_ray.cli import run_main
from goal_ray.ray_session import ray_session

def get_node(*_):  # asked for last, when the processes of the node run
    raise {error}

def main(_):
    with ray_session():
        print("started")

services.get_node = get_node
run_main(main)
"""


@pytest.mark.parametrize(
    ("error", "status", "complaint"),
    [
        (
            "Exception('The current node timed out during startup.')",
            2,
            "error: Ray did not start on this machine in its time; is it overloaded? Run the same command again "
            "(Ray says: The current node timed out during startup.)\n",
        ),
        ("KeyboardInterrupt", 130, "interrupted\n"),
    ],
)
def test_a_private_cluster_that_does_not_start_is_one_line_and_no_traceback(error, status, complaint):
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    program = BROKEN_START.format(error=error)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", complaint)


def test_a_private_cluster_listens_on_loopback_only_and_ends_with_its_session():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['127.0.0.1']", "False"], done.stderr
    assert done.stderr == ""
