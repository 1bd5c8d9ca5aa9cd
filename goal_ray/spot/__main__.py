"""`goal-ray spot`, also `python -m goal_ray.spot`."""

import sys
import time
from collections.abc import Sequence
from typing import Any, cast

from goal_ray.cli import parser, run_main
from goal_ray.errors import ConfigError, StageError
from goal_ray.spot.notice import CLOUDS, wait_for_notice

DESCRIPTION = """Tells Ray when the cloud is about to take this machine away.

To be started beside `ray start` on spot machines of AWS or Google Cloud, as the launcher files in cluster/ do. At the
cloud's notice, two minutes ahead on AWS and at most half a minute on Google Cloud, it has Ray drain the node: it gets
no new work, and a training saves, where the time suffices, and goes on without it. On Kubernetes Ray drains a node by
itself, when its pod is told to end."""


def drain(address: str, node_id: str | None, left_s: float, why: str) -> str:
    """Has Ray drain a node, by default this machine's. Returns its id. Raises StageError where Ray will not."""
    import ray
    from ray._private.services import canonicalize_bootstrap_address_or_die
    from ray.core.generated import autoscaler_pb2, gcs_pb2
    from ray.util import get_node_ip_address

    # As `ray drain-node` does, which asks for an id; none of these has types.
    raylet, nodes, draining = (cast(Any, module) for module in (ray._raylet, gcs_pb2, autoscaler_pb2))
    client = raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(address))
    if node_id is None:
        own = get_node_ip_address()
        alive = [info for info in client.get_all_node_info().values() if info.state == nodes.GcsNodeInfo.ALIVE]
        here = [info.node_id.hex() for info in alive if info.node_manager_address == own]
        if len(here) != 1:
            raise StageError(f"{len(here)} of Ray's nodes are at {own}, not 1; say which with --node-id")
        node_id = here[0]
    deadline_ms = int((time.time() + left_s) * 1000)
    preemption = draining.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, objection = client.drain_node(node_id, preemption, why, deadline_ms)
    if not accepted:
        raise StageError(f"Ray does not drain node {node_id}: {objection}")
    return node_id


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
    left_s = wait_for_notice(options.cloud, options.server or CLOUDS[options.cloud][1])
    why = f"{options.cloud} takes this spot machine in {left_s:.0f} s"
    node_id = drain(options.address, options.node_id, left_s, why)
    print(f"{why}; node {node_id} is drained", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)
