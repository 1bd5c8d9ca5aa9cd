"""What the workers of a LISM run report of their work."""

import os
from dataclasses import dataclass

# In the order in which a sample meets them. `encode` is the proposer's image encoder, where it has one; `propose` is
# the rest of the proposer: masks and boxes, or all of it.
PHASES = ("read", "encode", "propose", "match", "write")


@dataclass(frozen=True)
class Work:
    """What a stage took for one group or shard: which worker (node and process), how many images, phase -> seconds."""

    stage: str
    worker: str
    images: int
    seconds: dict[str, float]

    @staticmethod
    def done_here(stage: str, images: int, seconds: dict[str, float]) -> "Work":
        """The work of this process."""
        return Work(stage, f"{os.uname().nodename}:{os.getpid()}", images, seconds)
