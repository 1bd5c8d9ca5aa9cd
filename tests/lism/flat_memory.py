"""`python flat_memory.py IN OUT CLIP`: a LISM run with a small object store; prints what memory it took, as JSON."""

import json
import sys
from collections.abc import Iterator

import psutil

from goal_ray.config import load_config
from goal_ray.lism import run
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group

STORE_BYTES = 80 * 2**20


def private_bytes(process: psutil.Process) -> int:
    """What a process holds, without the object store, which all share."""
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - memory.shared


def main(source: str, target: str, clip: str) -> None:
    """Runs LISM and looks at the memory whenever a group comes back."""
    # Here, since the tests import this file, and a Ray that is imported too early binds to more than loopback.
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    overrides = ["proposer.name=grid", "device=cpu", f"matcher.model.name={clip}", "images_per_batch=1"]
    seen, stream_groups = [], run.stream_groups

    def observed(*args: object) -> Iterator[Group]:
        for group in stream_groups(*args):
            workers = psutil.Process().children(recursive=True)
            seen.append((private_bytes(psutil.Process()), max(map(private_bytes, workers))))
            yield group

    run.stream_groups = observed
    ray.init("local", num_cpus=4, object_store_memory=STORE_BYTES, include_dashboard=False, log_to_driver=False)
    run.run_lism(source, target, load_config(LismConfig, overrides=overrides))
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    print(json.dumps({"seen": seen, "spilled": stats.spilled_bytes_total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
