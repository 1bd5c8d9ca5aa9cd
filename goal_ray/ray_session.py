"""Joining a Ray cluster, or starting a private one on this machine. The only place that calls `ray.init`."""

import logging
import os
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from goal_ray.cores import usable_cores
from goal_ray.errors import StageError
from goal_ray.events import wants_json

# Read when `ray` is first imported, and by the processes it starts. The first, meant for other systems, makes Ray bind
# to 127.0.0.1, which no argument of `ray.init` does. The last keeps Ray from printing a warning into our output when
# the runs of one session have started more processes than three times the CPUs; idle ones cost nothing but memory.
PRIVATE_CLUSTER = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_maximum_startup_concurrency": "16",
}


@contextmanager
def ray_session(busy_cpus: int = 0) -> Iterator[None]:
    """Runs the block on the cluster of RAY_ADDRESS (set in every Ray job), or on a private local one.

    busy_cpus  CPUs that long-lived workers will hold; a local cluster counts two more, for data tasks

    A session that already exists is used and left running. The private one listens on loopback only and is
    shut down at the end. Raises StageError where that one does not start.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        os.environ.update(PRIVATE_CLUSTER)
    import ray

    if ray.is_initialized():
        yield
        return
    if not address:
        # Where Ray was imported before, it has read the environment too early.
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if wants_json():
        quiet = {"log_to_driver": False, "logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO")}
    if address:
        ray.init(address=address, **quiet)
    else:
        try:
            ray.init(
                address="local",
                num_cpus=max(usable_cores(), busy_cpus + 2),
                include_dashboard=False,
                **quiet,
            )
        except Exception as error:  # of a node that is late to start, Ray raises nothing more special
            ray.shutdown()
            raise StageError(
                "Ray did not start on this machine in its time; is it overloaded? Run the same command again "
                f"(Ray says: {textwrap.shorten(str(error), 300)})"
            ) from error
    try:
        yield
    finally:
        ray.shutdown()


def is_joined() -> bool:
    """Whether Ray's cluster is one that was there before; such a cluster may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))


def keep_ray_data_here() -> None:
    """Makes Ray Data's own actors live on this process's node, as long as the cluster.

    They are made, and stay, where Ray Data first runs. In a training that is a worker's node, which then would never
    count as idle, and whose death would leave every later execution in the cluster waiting for them.
    """
    import ray.data

    ray.data.range(1).materialize()


class Breather:
    """Ray Data execution callback: a short rest after every step of its scheduler.

    While the consumer is the slower side, as a training worker is, Ray's loop never waits: it would spin in a thread of
    the consumer's own process, take most of a core, and stall the training behind the interpreter lock.
    """

    REST_S = 0.05

    def before_execution_starts(self, executor: Any) -> None: ...
    def after_execution_succeeds(self, executor: Any) -> None: ...
    def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

    def on_execution_step(self, executor: Any) -> None:  # noqa: ARG002
        time.sleep(self.REST_S)


def quiet_ray_data(preserve_order: bool) -> None:
    """Sets this process's Ray Data context: no progress bars or log chatter, no busy waiting, output order as asked."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if Breather not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Breather)  # type: ignore[arg-type]  # no base: ray comes late
    context.execution_options.preserve_order = preserve_order
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
