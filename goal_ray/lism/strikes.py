"""Which work kills its worker. The count lives outside the workers, in an actor that they ask before they begin.

Ray starts a dead worker's work again without end. Work that was begun and never ended is known here to have been fatal:
the third time, a group of samples is worked on one by one, and a sample that was fatal alone is left out.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from goal_ray.errors import StageError

GROUP_DEATHS = 2  # then a group is worked on one by one
START_DEATHS = 4  # then a stage is given up
ANSWER_S = 60.0


class Strikes:
    """Counts, for every piece of work, how often it was begun and never ended."""

    place = ""  # what a worker is called while it starts

    def __init__(self) -> None:
        self.open: Counter[tuple] = Counter()

    def begin(self, *work: Any) -> int:
        """Notes the beginning. Returns how often this work was fatal before."""
        self.open[work] += 1
        return self.open[work] - 1

    def end(self, *work: Any) -> None:
        """The work is done, or failed without killing anybody."""
        del self.open[work]


@dataclass(frozen=True)
class SharedStrikes:
    """The `Strikes` of a whole cluster; works like one of them in every worker.

    Its actor may be lost with its node and starts again empty. Where it does not answer, nothing counts as fatal.
    """

    actor: Any

    @classmethod
    def start(cls) -> "SharedStrikes":
        """Starts the actor, where possible beside the driver, with whose node all is lost anyway."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": beside}
        return cls(ray.remote(Strikes).options(**options).remote())

    @property
    def place(self) -> str:
        """The calling actor; restarted, it is still the same."""
        import ray

        return ray.get_runtime_context().get_actor_id() or ""

    def begin(self, *work: Any) -> int:
        """As `Strikes.begin`."""
        import ray

        try:
            return ray.get(self.actor.begin.remote(*work), timeout=ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return 0

    def end(self, *work: Any) -> None:
        """As `Strikes.end`; waits for nobody."""
        self.actor.end.remote(*work)


AnyStrikes = Strikes | SharedStrikes


def fatal() -> StageError:
    """Why a sample that was fatal alone cannot be used."""
    return StageError("its worker died each time: killed for memory, its GPU lost, crashed or stuck in native code")


class ReadingWatch:
    """Registers the samples of a shard as they are read and decoded: once a chunk, or singly in a chunk that was fatal.

    left_out  samples that were fatal alone
    """

    STAGE = "decode"

    def __init__(self, strikes: AnyStrikes, shard: int, chunk: int):
        self.strikes = strikes
        self.shard = shard
        self.chunk = chunk
        self.left_out: set[int] = set()
        self.begun: dict[str, int] = {}
        self.singly = False

    def begin(self, number: int) -> bool:
        """To call before a sample is read: the one before it is done. Returns whether to read this one."""
        first = number - number % self.chunk
        if self.begun.get(self.STAGE) != first:
            self.end()
            self.singly = self._begin(self.STAGE, first) >= GROUP_DEATHS
        if self.singly and self._begin(f"{self.STAGE} alone", number):
            self.left_out.add(number)
        return number not in self.left_out

    def _begin(self, stage: str, number: int) -> int:
        if stage in self.begun:
            self.strikes.end(stage, self.shard, self.begun[stage])
        self.begun[stage] = number
        return self.strikes.begin(stage, self.shard, number)

    def end(self) -> None:
        """All that was begun is done."""
        for stage, number in self.begun.items():
            self.strikes.end(stage, self.shard, number)
        self.begun.clear()
