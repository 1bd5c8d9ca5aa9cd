"""`goal-ray spot`, also `python -m goal_ray.spot`."""

import sys
import time
from collections.abc import Sequence
from typing import Any, cast

from goal_ray.cli import parser, run_main
from goal_ray.errors import ConfigError, StageError
from goal_ray.spot.notice import CLOUDS, wait_for_notice

AGAIN_S = 1.0
DESCRIPTION = """Tells Ray when the cloud is about to take this machine away.

To be started beside `ray start` on spot machines of AWS or Google Cloud, as the launcher files in cluster/ do. At the
cloud's notice, two minutes ahead on AWS and at most half a minute on Google Cloud, it has Ray drain the node: it gets
no new work, and a training saves, where the time suffices, and goes on without it. On Kubernetes Ray drains a node by
itself, when its pod is told to end."""


class Node:
    """A node of a Ray cluster that can be drained.

    address  of Ray's head; "auto" is that of this machine's Ray
    node_id  by default this machine's

    Raises StageError where there is none.
    """

    def __init__(self, address: str, node_id: str | None):
        from ray._private.services import canonicalize_bootstrap_address_or_die
        from ray.exceptions import RayError

        try:
            self.address = canonicalize_bootstrap_address_or_die(address)
            self.id = self._find(node_id)
        except (RayError, OSError, RuntimeError) as error:
            raise StageError(
                f"no Ray is found at {address} ({error}); run `ray start` first, or give its head with --address"
            ) from None

    def _find(self, node_id: str | None) -> str:
        from ray.core.generated import gcs_pb2
        from ray.util import get_node_ip_address

        own, alive = get_node_ip_address(), cast(Any, gcs_pb2).GcsNodeInfo.ALIVE
        nodes = [info for info in self._client().get_all_node_info().values() if info.state == alive]
        if node_id is not None:
            if node_id not in [info.node_id.hex() for info in nodes]:
                raise StageError(f"Ray at {self.address} has no living node {node_id}; `ray list nodes` shows them")
            return node_id
        here = [info.node_id.hex() for info in nodes if info.node_manager_address == own]
        if len(here) != 1:
            raise StageError(f"{len(here)} of Ray's nodes are at {own}, not 1; say which with --node-id")
        return here[0]

    def _client(self) -> Any:
        import ray

        return cast(Any, ray._raylet).GcsClient(address=self.address)

    def drain(self, left_s: float, why: str) -> None:
        """Has Ray drain it. Raises StageError where Ray will not."""
        from ray.core.generated import autoscaler_pb2
        from ray.exceptions import RayError

        # As `ray drain-node` does.
        preemption = cast(Any, autoscaler_pb2).DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline_ms = int((time.time() + left_s) * 1000)
        try:
            accepted, objection = self._client().drain_node(self.id, preemption, why, deadline_ms)
        except (RayError, OSError, RuntimeError) as error:
            raise StageError(f"Ray's head at {self.address} does not answer: {error}") from None
        if not accepted:
            raise StageError(f"Ray does not drain node {self.id}: {objection}")


def drain_in_time(node: Node, left_s: float, why: str) -> None:
    """Drains a node, tried again until the machine's time is over. Raises what the last try met."""
    until = time.monotonic() + left_s
    while True:
        try:
            return node.drain(max(0.0, until - time.monotonic()), why)
        except StageError as error:
            if time.monotonic() + AGAIN_S > until:
                raise
            print(f"{error}; trying again", file=sys.stderr, flush=True)
            time.sleep(AGAIN_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Waits for the notice, drains the node, and ends."""
    command = parser(
        "spot", DESCRIPTION, "goal-ray spot aws", {"CLOUD": f"whose machine this is: {' or '.join(CLOUDS)}"}
    )
    command.add_argument(
        "--address", metavar="HOST:PORT", default="auto", help="Ray's head; by default that of this machine's Ray"
    )
    command.add_argument("--node-id", metavar="ID", help="another node than this machine's")
    command.add_argument("--server", metavar="URL", help="another metadata server than the cloud's own")
    options = command.parse_args(arguments)
    if options.cloud not in CLOUDS:
        raise ConfigError(f"cloud {options.cloud!r} is unknown; there are: {', '.join(CLOUDS)}")
    node = Node(options.address, options.node_id)  # what is wrong with it shows now, not at the notice
    left_s = wait_for_notice(options.cloud, options.server or CLOUDS[options.cloud][1])
    why = f"{options.cloud} takes this spot machine in {left_s:.0f} s"
    drain_in_time(node, left_s, why)
    print(f"{why}; node {node.id} is drained", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
