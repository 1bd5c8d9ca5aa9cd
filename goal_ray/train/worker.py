"""Ray Train's entry point on a worker. Light to import, since Ray's own actors unpickle references to it."""

import os
from typing import Any


def worker_entry(job_fields: dict[str, Any], queue: Any, use_gpu: bool) -> None:
    """Joins the process group to DeepSpeed and runs the loop; what rank 0 sends goes into the queue."""
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
    if not use_gpu:
        use_all_cpus(context.get_local_world_size())
        # DeepSpeed would compile its shared-memory operator, for half a minute and only where a compiler is; it serves
        # inference alone.
        deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed(dist_backend="nccl" if use_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    sent: list[Any] = []

    def send(record: dict[str, Any]) -> None:
        sent[:] = [queue.actor.put_nowait.remote(record)]

    try:
        job = Job(**job_fields, send=send)
        train_worker(job, context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device())
    finally:
        ray.get(sent)  # records arrive in order, so all are there when the last is


def use_all_cpus(workers_here: int) -> None:
    """Shares this machine's cores among its CPU workers; Ray would leave one thread to each."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers_here))
