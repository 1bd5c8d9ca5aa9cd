"""The Ray Data pipeline: read and decode (CPU tasks) → propose (actors) → match (actors), in no fixed order.

What travels is a group: a few consecutive samples of one shard, as one row of the dataset and one block of its own.
Which samples are batched together therefore depends on the shard alone, not on actors, timing or an earlier
interruption, and so do the last digits of floats, on devices of one kind with memory enough for a group; and a group is
small enough to bound the memory of every stage.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from goal_ray.errors import StageError
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group
from goal_ray.lism.reading import ALL, Selection, measure_reading, read_groups
from goal_ray.lism.stages import MatchSentences, ProposeRegions, StageActor, StageWorker
from goal_ray.lism.strikes import AnyStrikes, SharedStrikes
from goal_ray.ray_session import quiet_ray_data


class WorkerLost(StageError):
    """A process of the pipeline died: killed for memory, crashed in native code, gone with its node."""


class ActorPool(NamedTuple):
    """Actors of one kind: their stages, in order, the least and most of them, and what each holds, for Ray."""

    stages: list[Callable[[], StageWorker]]
    least: int
    most: int
    resources: dict[str, float]


def actor_pools(config: LismConfig, provenance: dict[str, Any], use_gpu: bool, strikes: AnyStrikes) -> list[ActorPool]:
    """The pools that groups pass after reading. No actor holds a share of a GPU that it does not compute on."""
    on_cpu = "cpu", {"num_cpus": 1.0}
    on_best = ("cuda", {"num_gpus": config.gpus_per_actor}) if use_gpu else on_cpu
    propose_device, propose_resources = on_cpu if config.proposes_on_cpu else on_best
    match_device, match_resources = on_best
    limit_s = config.max_seconds_per_image
    propose = partial(StageWorker, "propose", partial(ProposeRegions, config, propose_device), limit_s, strikes)
    match = partial(StageWorker, "match", partial(MatchSentences, config, provenance, match_device), limit_s, strikes)
    if config.fused:
        return [ActorPool([propose, match], *config.proposer_actors, match_resources)]
    return [
        ActorPool([propose], *config.proposer_actors, propose_resources),
        ActorPool([match], *config.matcher_actors, match_resources),
    ]


def stream_groups(
    shards: Sequence[str],
    selected: Mapping[int, Selection],
    config: LismConfig,
    provenance: dict[str, Any],
    use_gpu: bool,
) -> Iterator[Group]:
    """Runs the pipeline over shards; every sample of them comes back once, with a record or a problem.

    selected  shard number -> the samples of it that are wanted, where that is not all

    Raises StageError where the run cannot go on, WorkerLost where another attempt may.
    """
    import ray.data
    from ray.data import ActorPoolStrategy, TaskPoolStrategy
    from ray.exceptions import RayError
    from ray.util.annotations import RayDeprecationWarning

    quiet_ray_data(preserve_order=False)
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what it would say is in the StageError
    # Ray Data starts dead actors and tasks again without end; `Strikes` ends that for a sample that kills each of them.
    strikes = SharedStrikes.start()
    items = [{"shard": number, "url": url} for number, url in enumerate(shards)]
    reader = partial(read_rows, selected=selected, config=config, strikes=strikes)
    # Any, since `map` is typed for functions only. A task that hands the shards on one by one spares the driver a block
    # for each of them, which took it a second per thousand before anything began.
    groups: Any = ray.data.from_items(items, override_num_blocks=1).map(hand_on, num_cpus=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)
        # The default, said, since Ray Data would read inside the first actors if all options were the same.
        groups = groups.flat_map(reader, compute=TaskPoolStrategy(config.readers), max_retries=-1)
    dataset = groups
    for pool in actor_pools(config, provenance, use_gpu, strikes):
        dataset = dataset.map(
            StageActor,
            fn_constructor_args=pool.stages,
            compute=ActorPoolStrategy(min_size=pool.least, max_size=pool.most),
            resources=config.actor_resources or None,
            **pool.resources,
        )
    dataset.context.target_max_block_size = 1  # every row fills a block
    try:
        for row in dataset.iter_rows():
            group = Group.from_row(row)
            if group.failure:
                raise StageError(f"{group.failure}; mend it and run the same command again, it goes on")
            yield group
    except RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise WorkerLost(f"a worker died: {reason}; run the same command again, it goes on") from error


def hand_on(row: dict[str, Any]) -> dict[str, Any]:
    """The row as a block of its own."""
    return row


def read_rows(
    row: dict[str, Any], selected: Mapping[int, Selection], config: LismConfig, strikes: AnyStrikes
) -> Iterator[dict[str, bytes]]:
    """`read_groups`, for Ray Data."""
    groups = read_groups(row["shard"], row["url"], config, strikes, selected.get(row["shard"], ALL))
    return (group.to_row() for group in measure_reading(groups))
