"""From what a user names as shards to the addresses of the tars."""

from functools import cache, partial

from braceexpand import braceexpand

from goal_ray.errors import ShardError
from goal_ray.storage import FEW, exists, file_system, kind, list_names, patiently


def expand_files(spec: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted addresses for a file, a folder, a glob or a brace pattern (`s3://b/train-{000..099}.tar`).

    Of a folder, the visible files right inside it that end in one of `suffixes`. Raises ShardError where nothing is
    there, and for braces that do not close.
    """
    urls: list[str] = []
    try:
        patterns = list(braceexpand(str(spec)))
    except ValueError:  # its UnbalancedBracesError, which its type stub lacks
        raise ShardError(
            f"{spec}: unbalanced braces; a pattern is like train-{{000..099}}.tar or {{a,b}}.tar"
        ) from None
    names_in = cache(lambda folder: frozenset(list_names(folder)))
    for pattern in patterns:
        fs, path = file_system(pattern)
        # Of very many, each asked for by name would take a storage minutes.
        if len(patterns) > FEW and shard_name(pattern) in names_in(pattern.rpartition("/")[0] or "."):
            found = [path]
        elif kind(pattern) == "directory":
            entries = patiently(partial(fs.ls, path, detail=False), pattern)
            found = [entry for entry in entries if entry.lower().endswith(suffixes)]
            if not found:
                raise ShardError(f"{pattern}: the folder holds no {'/'.join(suffixes)} file")
        elif any(sign in path for sign in "*?["):
            found = patiently(partial(fs.glob, path), pattern)
            if not found:
                raise ShardError(f"{pattern}: no file matches")
        elif not exists(pattern):
            raise ShardError(f"{pattern}: no such file or folder")
        else:
            found = [path]
        visible = (entry for entry in found if not entry.rsplit("/", 1)[-1].startswith("."))
        urls.extend(str(fs.unstrip_protocol(entry)).removeprefix("file://") for entry in visible)
    if not urls:
        raise ShardError(f"{spec}: no visible {'/'.join(suffixes)} file")
    return sorted(set(urls))


def expand_shards(spec: str) -> list[str]:
    """Sorted tar addresses for a file, a folder, a glob or a brace pattern (`s3://b/train-{000..099}.tar`).

    Raises ShardError where nothing is there, where a folder holds no `.tar`, or where two tars share a name.
    """
    urls = expand_files(spec, (".tar",))
    by_name: dict[str, str] = {}
    for url in urls:
        other = by_name.setdefault(shard_name(url), url)
        if other != url:
            raise ShardError(f"{other} and {url} share a file name; outputs are named after it: rename one")
    return urls


def shard_name(url: str) -> str:
    """A shard's file name."""
    return url.rsplit("/", 1)[-1]
