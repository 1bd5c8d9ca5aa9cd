"""What `make` and `reshard` share: the folder they write to belongs to one source and its settings."""

import json
from collections.abc import Sequence
from typing import Any

from goal_ray.errors import ConfigError, StageError
from goal_ray.shard_urls import shard_name
from goal_ray.storage import exists, join, list_names, read_bytes, remove_abandoned, resolved, write_bytes


def shards_called(name: str | None, out: str) -> str:
    """What output shards are called: NAME-000000.tar, …; the last part of the folder's name unless it is given."""
    name = name or resolved(out)[1].rstrip("/").rpartition("/")[2] or "shard"
    if "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r}: must be part of a file name that does not start with a dot")
    return name


def tar_name(name: str, number: int) -> str:
    """The file name of an output shard."""
    return f"{name}-{number:06d}.tar"


def claim_folder(folder: str, file: str, wanted: dict[str, Any]) -> None:
    """Records in `file` what the folder is made of, before the first tar, or checks that it is made of the same.

    Raises StageError for a folder that is made of something else, so that an interrupted run is not mixed with another.
    """
    for part in ("", "done"):
        remove_abandoned(join(folder, part))
    path = join(folder, file)
    if not exists(path):
        foreign = [name for name in list_names(folder) if name.endswith(".tar")]
        if foreign:
            raise StageError(f"{folder}: holds {foreign[0]} but no {file}, so it is of another origin; use another OUT")
        write_bytes(path, json.dumps(wanted, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
        return
    try:
        found = json.loads(read_bytes(path))
    except ValueError as error:
        raise StageError(f"{path}: not JSON ({error}); delete the folder or use another OUT") from None
    changed = [key for key, value in json.loads(json.dumps(wanted)).items() if found.get(key) != value]
    if changed:
        raise StageError(
            f"{folder}: was begun with other settings or another input ({', '.join(changed)}; see {path}); "
            "use the same ones, another OUT, or delete the folder"
        )


def refuse_overlap(folder: str, inputs: Sequence[str]) -> None:
    """Raises StageError for an output folder that lies in a folder of the input, or holds a tar of the input."""
    store, place = resolved(folder)
    for url in inputs:
        other_store, other = resolved(url)
        inside = f"{place}/".startswith(f"{other.rstrip('/')}/")
        holds = other.endswith(".tar") and f"{place.rstrip('/')}/{shard_name(other)}" == other
        if store == other_store and (inside or holds):
            raise StageError(f"{folder}: the output would mix with the input {url}; write to another folder")
