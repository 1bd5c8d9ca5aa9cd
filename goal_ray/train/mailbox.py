"""What driver and workers tell each other: records one way, a wish to stop the other way."""

from typing import Any


class Mailbox:
    """A small Ray actor of the driver's; ends with it."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.stopping = False

    def put(self, record: dict[str, Any]) -> None:
        """Takes a worker's record."""
        self.records.append(record)

    def take(self) -> list[dict[str, Any]]:
        """All records since the last call, in order."""
        taken, self.records = self.records, []
        return taken

    def stop(self) -> None:
        """Asks the workers to save a checkpoint and end."""
        self.stopping = True

    def is_stopping(self) -> bool:
        """Whether the workers were asked to end."""
        return self.stopping


def open_mailbox() -> Any:
    """A new mailbox on the driver's node, where it lives as long as the driver."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    return ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
