"""`python chaos.py IN OUT CLIP SEED`: a LISM run on a cluster of two nodes that loses workers and one of the nodes.

A picture whose first pixel is DEADLY kills its worker every time. The order and the moments of the other deaths follow
from SEED.
"""

import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
from processes import workers_below

from goal_ray.config import load_config
from goal_ray.lism import pipeline, run
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item

DEADLY = (1, 2, 3)
GROUP = 4


class DeadlyProposer(pipeline.ProposeRegions):
    """The grid, at the speed of a real proposer, so that deaths strike while there is work."""

    def __call__(self, items: list[Item]) -> list[Item]:
        time.sleep(0.1)
        if any(tuple(item.picture_HW3[0, 0]) == DEADLY for item in items):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(items)


def kill_worker(title: str, patience_s: float) -> bool:
    """Kills a worker whose process title contains a text, once there is one. Returns whether there was in that time."""
    end = time.monotonic() + patience_s
    while True:
        if workers := workers_below(psutil.Process(), title):
            workers[0].kill()
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.1)


def kill_node(node: Any) -> None:
    """Kills a node as a power cut would: its raylet, with which all its workers end."""
    os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)


def main(source: str, target: str, clip: str, seed: int) -> None:
    """Runs LISM, and lets something die before each of some groups that come back."""
    # Here, since the tests import this file, and a Ray that is imported too early binds to more than loopback.
    import ray
    from ray.cluster_utils import Cluster

    overrides = [f"matcher.model.name={clip}", f"images_per_batch={GROUP}", "proposer_actors=[2,2]", "max_bad_share=1"]
    config = load_config(LismConfig, overrides=["proposer.name=grid", "device=cpu", *overrides])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    extra = cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    chance, stream_groups, happened = random.Random(seed), run.stream_groups, []
    victims = ["MapWorker", "Strikes", "node", *(["FlatMap", "MapWorker"] if seed else [])]  # seed 0 is CI's
    chance.shuffle(victims)
    moments = dict(zip(sorted(chance.sample(range(1, 13), len(victims))), victims, strict=True))  # of some 24 groups

    def disturbed(*args: object) -> Iterator[Group]:
        for number, group in enumerate(stream_groups(*args)):
            victim = moments.get(number)
            if victim == "node":
                kill_node(extra)
                happened.append(victim)
            # Reading may be over by now; the others are there, or start again.
            elif victim and kill_worker(victim, patience_s=0 if victim == "FlatMap" else 60):
                happened.append(victim)
            yield group

    pipeline.ProposeRegions, run.stream_groups = DeadlyProposer, disturbed
    run.run_lism(source, target, config)
    print("happened:", *happened, flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]))
