"""`python fill_store.py`: fills the object stores of all nodes but the head, says so, and holds on until killed."""

import time

import numpy as np
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

PIECE_BYTES = 10 * 2**20


@ray.remote(num_cpus=0)
class Filler:
    """Holds most of its node's store."""

    def fill(self, store_bytes: int) -> int:
        pieces = int(0.9 * store_bytes) // PIECE_BYTES
        self.held = [ray.put(np.zeros(PIECE_BYTES, np.uint8)) for _ in range(pieces)]
        return len(self.held)


ray.init(log_to_driver=False, logging_level="ERROR")
fillers = []
for node in ray.nodes():
    if node["Alive"] and "node:__internal_head__" not in node["Resources"]:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        filler = Filler.options(scheduling_strategy=here).remote()
        ray.get(filler.fill.remote(int(node["Resources"]["object_store_memory"])))
        fillers.append(filler)
print(f"filled {len(fillers)}", flush=True)
time.sleep(600)
