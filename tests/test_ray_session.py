"""The Ray cluster that a stage starts for itself."""

import os
import subprocess
import sys

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


def test_a_private_cluster_listens_on_loopback_only_and_ends_with_its_session():
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", LISTENERS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["['127.0.0.1']", "False"], done.stderr
    assert done.stderr == ""
