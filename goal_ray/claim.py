"""An output folder belongs to what it is made of: an interrupted run is never mixed with another."""

import json
from typing import Any

from goal_ray.atomic import remove_abandoned, write_bytes
from goal_ray.errors import StageError
from goal_ray.storage import exists, join, list_names, read_bytes


def claim_folder(folder: str, file: str, wanted: dict[str, Any]) -> None:
    """Records in `file` what the folder is made of, before its first tar, or checks that it is made of the same.

    wanted  plain values for JSON, by name

    Also deletes what killed runs left half written. Raises StageError for a folder that is made of something else, or
    that cannot be one.
    """
    path = join(folder, file)
    try:
        remove_abandoned(folder)
        if not exists(path):
            foreign = [name for name in list_names(folder) if name.endswith(".tar")]
            if foreign:
                raise StageError(
                    f"{folder}: holds {foreign[0]} but no {file}, so it is of another origin; use another OUT"
                )
            write_bytes(path, json.dumps(wanted, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace"))
            return
        found = json.loads(read_bytes(path))
    except OSError as error:
        raise StageError(f"{folder}: cannot be used as the output folder: {error}; use another OUT") from None
    except ValueError as error:
        raise StageError(f"{path}: not JSON ({error}); delete the folder or use another OUT") from None
    if not isinstance(found, dict):
        raise StageError(f"{path}: not what a folder is made of; delete the folder or use another OUT")
    pairs = {key: (found.get(key), value) for key, value in json.loads(json.dumps(wanted)).items()}
    changed = [describe_change(key, old, new) for key, (old, new) in pairs.items() if old != new]
    if changed:
        raise StageError(
            f"{folder}: was begun with other settings or another input ({'; '.join(changed)}; see {path}); "
            "use the same ones, another OUT, or delete the folder"
        )


def describe_change(key: str, old: Any, new: Any) -> str:
    """What has changed, with the values where they are short."""
    return key if isinstance(old, list | dict) or isinstance(new, list | dict) else f"{key} {old}, now {new}"
