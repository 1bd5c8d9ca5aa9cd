"""Asking a cluster that grows for the nodes that the workers need."""

from typing import Any


class Demand:
    """Groups of places with these resources, each wanted whole or not at all, from `start` to `end`.

    They are placement groups: an autoscaler starts nodes for one that waits, and it goes with the driver, however that
    ends. (`request_resources` would outlive a killed driver, and keep nodes that cost money.)
    """

    def __init__(self, groups: list[list[dict[str, float]]]):
        self.groups = groups
        self.waiting: list[Any] = []

    def start(self) -> None:
        """From now on the places are wanted; nothing where they are already."""
        from ray.util import placement_group

        if not self.waiting:
            self.waiting = [placement_group(bundles) for bundles in self.groups]

    def found(self) -> list[bool]:
        """Which of the groups have their places, held until `end`; empty before `start`."""
        from ray.util import placement_group_table

        return [placement_group_table(group)["state"] == "CREATED" for group in self.waiting]

    def end(self) -> None:
        """They are no more; those that were found are free."""
        from ray.util import remove_placement_group

        for group in self.waiting:
            remove_placement_group(group)
        self.waiting.clear()
