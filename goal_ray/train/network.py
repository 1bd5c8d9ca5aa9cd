"""How a training's workers find each other: on the network of their nodes, and nowhere else.

Ray Train's own way has two faults. Gloo takes the address that a machine's own name leads to, which on Debian and its
kin is 127.0.1.1: workers on several machines do not find each other. And torch's store, where they meet, listens on
every network of its machine, also where Ray was started on loopback alone. Light to import, like `worker`.
"""

import os
import socket
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(minutes=30)  # with a worker that waits for its data, as Ray Train has it
STORES: list[Any] = []


def process_group(backend: str) -> Any:
    """Ray Train's TorchConfig for a backend, "nccl" or "gloo", that connects the workers by `open_store` and `join`."""
    import ray
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class NodeBackend(base):
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            ranks = len(worker_group)
            meeting = worker_group.execute_single(0, open_store)
            joining = [
                worker_group.execute_single_async(rank, join, rank, ranks, meeting, backend_config.backend)
                for rank in range(ranks)
            ]
            ray.get(joining)

    class NodeConfig(TorchConfig):
        backend_cls = NodeBackend

    return NodeConfig(backend=backend)


def open_store() -> tuple[str, int]:
    """Opens the store on this node's address, in the lead worker. Returns its host and port."""
    from ray.util import get_node_ip_address
    from torch.distributed import TCPStore

    host = get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
    port = listening.getsockname()[1]
    STORES[:] = [
        TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()),
    ]
    return host, port


def join(rank: int, ranks: int, meeting: tuple[str, int], backend: str) -> None:
    """Joins this worker to the others' process group; all of them have to."""
    import torch.distributed as dist

    choose_interface()
    # DeepSpeed makes groups of its own, without saying how long they wait: for 10 minutes, on NCCL.
    dist.distributed_c10d.default_pg_nccl_timeout = PATIENCE
    store = STORES.pop() if rank == 0 else dist.TCPStore(*meeting, is_master=False)
    dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=PATIENCE)


def choose_interface() -> None:
    """Names the interface of this node's address to Gloo and NCCL, unless the environment names one."""
    import psutil
    from ray.util import get_node_ip_address

    own = get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if own in [each.address for each in addresses]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without the sign it is the beginning of a name
