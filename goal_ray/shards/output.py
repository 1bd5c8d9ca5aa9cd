"""What `make` and `reshard` share: the names of output shards, and a folder apart from the input."""

from collections.abc import Sequence

from goal_ray.errors import ConfigError, StageError
from goal_ray.shard_urls import shard_name
from goal_ray.storage import resolved


def shards_called(name: str | None, out: str) -> str:
    """What output shards are called: NAME-000000.tar, …; the last part of the folder's name unless it is given."""
    name = name or resolved(out)[1].rstrip("/").rpartition("/")[2] or "shard"
    if "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r}: must be part of a file name that does not start with a dot")
    return name


def tar_name(name: str, number: int) -> str:
    """The file name of an output shard."""
    return f"{name}-{number:06d}.tar"


def refuse_overlap(folder: str, inputs: Sequence[str]) -> None:
    """Raises StageError for an output folder that lies in a folder of the input, or holds a tar of the input."""
    store, place = resolved(folder)
    for url in inputs:
        other_store, other = resolved(url)
        inside = f"{place}/".startswith(f"{other.rstrip('/')}/")
        holds = other.endswith(".tar") and f"{place.rstrip('/')}/{shard_name(other)}" == other
        if store == other_store and (inside or holds):
            raise StageError(f"{folder}: the output would mix with the input {url}; write to another folder")
