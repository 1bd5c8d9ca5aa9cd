"""`python watch.py`: the nodes of the cluster of RAY_ADDRESS, twice a second, a JSON line each time they change.

A line: seconds since the start, and for every node but the head (id, its custom resource, whether that is in use).
"""

import json
import sys
import time

import ray

CUSTOM = sys.argv[1:]

ray.init(log_to_driver=False, logging_level="ERROR")
began, last = time.monotonic(), None
while True:
    free = ray._private.state.available_resources_per_node()
    nodes = []
    for node in ray.nodes():
        total = node["Resources"]
        if node["Alive"] and "node:__internal_head__" not in total:
            kind = next((name for name in CUSTOM if name in total), "")
            busy = bool(kind) and free.get(node["NodeID"], {}).get(kind, 0) < total[kind]
            nodes.append((node["NodeID"][-5:], kind, busy))
    if nodes != last:
        print(json.dumps({"seconds": round(time.monotonic() - began, 1), "nodes": nodes}), flush=True)
        last = nodes
    time.sleep(0.5)
