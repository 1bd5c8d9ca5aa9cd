"""Places for workers: what the cluster has, what the workers need, and asking a cluster that grows for more."""

from typing import Any

from goal_ray.train.config import TrainConfig

INGEST = {"CPU": 1.0}


class Demand:
    """Groups of places, each with a resource bundle per place, and wanted whole or not at all.

    They are placement groups: an autoscaler starts nodes for one that waits, and it goes with the driver, however that
    ends. (`request_resources` would outlive a killed driver, and keep nodes that cost money.)
    """

    def __init__(self) -> None:
        self.groups: list[list[dict[str, float]]] = []
        self.waiting: list[Any] = []

    def want(self, groups: list[list[dict[str, float]]]) -> None:
        """From now on these are wanted and no others, which are free; nothing where they are already."""
        if groups == self.groups:
            return
        from ray.util import placement_group, remove_placement_group

        for group in self.waiting:
            remove_placement_group(group)
        self.waiting = [placement_group(bundles) for bundles in groups]
        self.groups = groups

    def found(self) -> list[bool]:
        """Which of the groups have their places, held as long as they are wanted."""
        from ray.util import placement_group_table

        return [placement_group_table(group)["state"] == "CREATED" for group in self.waiting]


def most_workers(config: TrainConfig, use_gpu: bool, resources: dict[str, float]) -> int | None:
    """The most workers, of those that share a micro-batch evenly, that resources suffice for; one CPU is the ingest's.

    None where they do not suffice for the fewest.
    """
    counts = (each for each in config.worker_counts if not short_of(config, use_gpu, each, resources))
    return max(counts, default=None)


def short_of(config: TrainConfig, use_gpu: bool, workers: int, resources: dict[str, float]) -> dict[str, float]:
    """What these workers and the ingest need of each resource that there is less of."""
    needed = dict(INGEST)
    for name, amount in config.worker_bundle(use_gpu).items():
        needed[name] = needed.get(name, 0) + workers * amount
    return {name: amount for name, amount in needed.items() if resources.get(name, 0) < amount}


def growth(config: TrainConfig, use_gpu: bool, workers: int, evaluating: bool) -> list[list[dict[str, float]]]:
    """Places for more than these workers, in groups for `Demand`, each enough for the next count of workers.

    Where workers are CPUs, each has one for the ingest too: or it could be the ingest's own that a group finds. And so
    for an evaluation, unless one is `evaluating`.
    """
    step = next((each - workers for each in config.worker_counts if each > workers), 0)
    beside = ([] if use_gpu else [INGEST]) + ([] if evaluating else evaluation_places(config))
    group = [config.worker_bundle(use_gpu)] * step + beside
    return [group] * ((config.max_workers - workers) // step) if step else []


def evaluation_places(config: TrainConfig) -> list[dict[str, float]]:
    """The one place that evaluations need; none where the run has none."""
    return [] if config.evaluation.shards is None else [config.evaluation.bundle]


def beside_evaluation(config: TrainConfig, resources: dict[str, float]) -> dict[str, float]:
    """What an evaluation leaves of resources."""
    taken = {name: amount for bundle in evaluation_places(config) for name, amount in bundle.items()}
    return {name: resources.get(name, 0) - taken.get(name, 0) for name in {**resources, **taken}}


def lacking(config: TrainConfig, use_gpu: bool, workers: int, resources: dict[str, float]) -> str:
    """What so many workers need and resources do not have; empty where they suffice."""
    for name, amount in short_of(config, use_gpu, workers, resources).items():
        who = f"{number_of(workers)} and the ingest" if name == "CPU" else number_of(workers)
        return f"{who} need {amount:g} {name}s, the cluster has {resources.get(name, 0):g}"
    return ""


def cluster_resources() -> dict[str, float]:
    """The resources of all nodes that are alive and will stay."""
    total: dict[str, float] = {}
    for node in node_resources():
        for name, amount in node.items():
            total[name] = total.get(name, 0) + amount
    return total


def node_resources() -> list[dict[str, float]]:
    """The resources of each node that is alive and will stay."""
    import ray

    leaving = draining_nodes()
    return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def draining_nodes() -> set[str]:
    """Ids of the nodes that are about to go, as spot instances do."""
    import ray

    return set(ray._private.state.state.get_draining_nodes() or {})


def number_of(workers: int) -> str:
    """The number in words: "1 worker", "2 workers"."""
    return f"{workers} {'worker' if workers == 1 else 'workers'}"
