"""Joining a Ray cluster, or starting a private one on this machine. The only place that calls `ray.init`."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Read when `ray` is first imported, and by the processes it starts. The first, meant for other systems, makes Ray bind
# to 127.0.0.1, which no argument of `ray.init` does.
LOOPBACK_ONLY = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextmanager
def ray_session(busy_cpus: int = 0) -> Iterator[None]:
    """Runs the block on the cluster of RAY_ADDRESS (set in every Ray job), or on a private local one.

    busy_cpus  CPUs that long-lived workers will hold; a local cluster counts two more, for data tasks

    A session that already exists is used and left running. The private one listens on loopback only and is
    shut down at the end.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(LOOPBACK_ONLY)
    import ray

    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
    else:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, busy_cpus + 2),
            include_dashboard=False,
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def quiet_ray_data(preserve_order: bool) -> None:
    """Sets this process's Ray Data context: no progress bars of its own, no log chatter, output order as asked."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = preserve_order
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
