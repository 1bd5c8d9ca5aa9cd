"""Ray Train's entry point on a worker. Light to import, since Ray's own actors unpickle references to it."""

import os
import threading
from typing import Any

from goal_ray.train.driver_lock import DriverLock

POLL_S = 0.5


def worker_entry(job_fields: dict[str, Any], mailbox: Any, use_gpu: bool, lock: DriverLock) -> None:
    """Joins the process group to DeepSpeed and runs the loop; what it sends goes into the mailbox."""
    import logging
    import warnings

    os.environ["DS_ACCELERATOR"] = "cuda" if use_gpu else "cpu"
    warnings.filterwarnings("ignore")
    import deepspeed
    import ray.train
    import ray.train.torch

    from goal_ray.train.loop import Job, train_worker

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    context = ray.train.get_context()
    rank = context.get_world_rank()
    device = ray.train.torch.get_device()
    # DeepSpeed takes LOCAL_RANK for the GPU's index; Ray's ranks are in another order than its GPUs from ten on.
    os.environ["LOCAL_RANK"] = str(device.index if use_gpu else context.get_local_rank())
    os.environ["RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    if use_gpu:
        from deepspeed.accelerator import cuda_accelerator

        cuda_accelerator.pynvml = None  # with it DeepSpeed takes the names of GPUs for numbers, which MIG's are not
    if not use_gpu or job_fields["config"].offload != "none":
        # A GPU's worker leaves half of the cores to those that read its pictures.
        share_cores(context.get_local_world_size() * (2 if use_gpu else 1))
    if not use_gpu:
        # DeepSpeed would compile its shared-memory operator, for half a minute and only where a compiler is; it serves
        # inference alone.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    sent: list[Any] = []

    def send(record: dict[str, Any]) -> None:
        if is_sent(record, rank):
            sent[:] = [mailbox.put.remote(record)]

    wish, done = threading.Event(), threading.Event()
    if rank == 0:
        threading.Thread(target=watch, args=(mailbox, wish, done), name="watch", daemon=True).start()
    send({"node": ray.get_runtime_context().get_node_id()})
    try:
        lock.check_seen()
        job = Job(**job_fields, send=send, stopping=wish.is_set)
        train_worker(job, rank, context.get_world_size(), device)
    finally:
        done.set()
        ray.get(sent)  # records arrive in order, so all are there when the last is


def is_sent(record: dict[str, Any], rank: int) -> bool:
    """Whether the driver gets a rank's record: all of the first's; of the others' what they may be alone to tell."""
    return rank == 0 or bool({"bad", "node", "nonfinite"} & record.keys())


def watch(mailbox: Any, wish: threading.Event, done: threading.Event) -> None:
    """Sets `wish` when the driver wants the run to end; returns when it has, or once `done` is set."""
    import ray

    while not done.wait(POLL_S):
        if ray.get(mailbox.is_stopping.remote()):
            wish.set()
            return


def share_cores(parts: int) -> None:
    """Gives PyTorch a part of this machine's cores; Ray would leave it one thread."""
    import torch

    from goal_ray.cores import usable_cores

    torch.set_num_threads(max(1, usable_cores() // parts))
