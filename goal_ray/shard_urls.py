"""From what a user names as shards to the addresses of the tars."""

import glob
import re
from functools import cache, partial

from braceexpand import braceexpand

from goal_ray.errors import ShardError
from goal_ray.patience import may_pass, patiently
from goal_ray.storage import FEW, exists, file_system, kind

SIGNS = re.compile(r"[*?\[\]{}]")


def expand_files(spec: str, suffixes: tuple[str, ...]) -> list[str]:
    """Sorted addresses for a file, a folder, a glob or a brace pattern (`s3://b/train-{000..099}.tar`).

    Of a folder, the visible files right inside it that end in one of `suffixes`. What is there under the very name,
    or the name of the folder before the last part, is no pattern. Raises ShardError where nothing is there, and for
    braces that do not close.
    """
    spec, urls = str(spec), list[str]()
    folder = spec[: spec.rfind("/") + 1]
    fixed = spec if stands_as_written(spec) else folder if stands_as_written(folder) else ""
    try:
        patterns = [fixed + name for name in braceexpand(spec[len(fixed) :])]
    except ValueError:  # its UnbalancedBracesError, which its type stub lacks
        raise ShardError(
            f"{spec}: unbalanced braces; a pattern is like train-{{000..099}}.tar or {{a,b}}.tar"
        ) from None
    files_in = cache(file_names)
    for pattern in patterns:
        fs, path = file_system(pattern)
        # Of very many, each asked for by name would take a storage minutes.
        if len(patterns) > FEW and shard_name(pattern) in files_in(pattern.rpartition("/")[0] or "."):
            found = [path]
        elif kind(pattern) == "directory":
            entries = patiently(partial(fs.ls, path, detail=False), pattern)
            found = [entry for entry in entries if entry.lower().endswith(suffixes)]
            if not found:
                raise ShardError(f"{pattern}: the folder holds no {'/'.join(suffixes)} file")
        elif fixed != spec and any(sign in path for sign in "*?["):
            head, slash, name = path.rpartition("/")
            found = patiently(partial(fs.glob, (glob.escape(head) if fixed else head) + slash + name), pattern)
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


def stands_as_written(name: str) -> bool:
    """Whether a name that looks like a pattern is that of a file or folder."""
    if not SIGNS.search(name):
        return False
    try:
        return exists(name)
    except Exception as error:
        # A storage may refuse odd names, or to tell of what is missing. One that fails is no empty one.
        if may_pass(error):
            raise
        return False


def file_names(folder: str) -> frozenset[str]:
    """The names of the files right inside a folder; none where it is missing."""
    if kind(folder) != "directory":
        return frozenset()
    fs, path = file_system(folder)
    entries = patiently(partial(fs.ls, path, detail=True), folder)
    return frozenset(shard_name(entry["name"]) for entry in entries if entry["type"] == "file")


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
