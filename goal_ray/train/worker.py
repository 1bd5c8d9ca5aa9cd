"""Ray Train's entry point on a worker. Light to import, since Ray's own actors unpickle references to it."""

import os
import threading
from typing import Any

POLL_S = 0.5


def worker_entry(job_fields: dict[str, Any], mailbox: Any, use_gpu: bool) -> None:
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
    os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), str(context.get_local_rank())
    os.environ["WORLD_SIZE"] = str(context.get_world_size())
    os.environ["LOCAL_WORLD_SIZE"] = str(context.get_local_world_size())
    if not use_gpu:
        use_all_cpus(context.get_local_world_size())
        # DeepSpeed would compile its shared-memory operator, for half a minute and only where a compiler is; it serves
        # inference alone.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    sent: list[Any] = []

    def send(record: dict[str, Any]) -> None:
        if rank == 0 or "bad" in record or "node" in record:
            sent[:] = [mailbox.put.remote(record)]

    wish, done = threading.Event(), threading.Event()
    if rank == 0:
        threading.Thread(target=watch, args=(mailbox, wish, done), name="watch", daemon=True).start()
    send({"node": ray.get_runtime_context().get_node_id(), "pid": os.getpid(), "rank": rank})
    try:
        job = Job(**job_fields, send=send, stopping=wish.is_set)
        train_worker(job, rank, context.get_world_size(), ray.train.torch.get_device())
    finally:
        done.set()
        ray.get(sent)  # records arrive in order, so all are there when the last is


def watch(mailbox: Any, wish: threading.Event, done: threading.Event) -> None:
    """Sets `wish` when the driver wants the run to end; returns when it has, or once `done` is set."""
    import ray

    while not done.wait(POLL_S):
        if ray.get(mailbox.is_stopping.remote()):
            wish.set()
            return


def use_all_cpus(workers_here: int) -> None:
    """Shares this machine's cores among its CPU workers; Ray would leave one thread to each."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
