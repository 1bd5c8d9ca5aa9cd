"""The driver of a LISM run: which shards are missing, the pipeline over them, and their outputs, each exactly once."""

import importlib.metadata
import json
import os
import time
from collections import defaultdict
from typing import Any

from tqdm import tqdm

from goal_ray import __version__
from goal_ray.config import to_tree, to_yaml
from goal_ray.errors import StageError
from goal_ray.lism.config import LismConfig
from goal_ray.lism.output import OutputFolder, ShardCounts, summary, total_counts
from goal_ray.lism.pipeline import Row, stream_rows
from goal_ray.ray_session import ray_session
from goal_ray.shards import expand_shards, shard_name
from goal_ray.storage import exists, join, read_bytes, write_bytes
from goal_ray.text import split_sentences

RESULT_KEYS = ("proposer", "matcher", "language", "min_area", "max_area", "max_side_px", "max_pixels")
SUMMARY_FILE = "lism.json"
SETTINGS_FILE = "settings.json"
EARLY_BAD = 100


def run_lism(source: str, target: str, config: LismConfig) -> dict[str, Any]:
    """Pairs every shard of `source` that `target` lacks. Returns the summary over all shards, earlier ones included.

    Raises StageError for a target made with other settings, and when too many samples had to be quarantined.
    """
    began = time.perf_counter()
    shards = [os.path.abspath(url) if os.path.exists(url) else url for url in expand_shards(source)]
    split_sentences("Refuses an unknown language before any work.", config.language)
    target = target if "://" in target else os.path.abspath(target)
    if any(join(target, shard_name(url)) == url for url in shards):
        raise StageError(f"{target} holds the input; write to another folder")
    folder = OutputFolder(target)
    check_settings(target, config)
    missing = [shard for shard in shards if shard not in folder.finished(shards)]
    if missing:
        actors = config.proposer_actors[0] + config.matcher_actors[0]
        with ray_session(busy_cpus=actors):
            pair_shards(missing, folder, config)
    counts = total_counts(folder, shards)
    result = summary(counts, time.perf_counter() - began)
    write_bytes(join(target, SUMMARY_FILE), json.dumps(result, indent=2).encode())
    check_bad(counts, config.max_bad_share, folder, shards)
    return result


def check_settings(target: str, config: LismConfig) -> None:
    """Stores the settings that decide the result, or checks that the folder was made with the same."""
    tree = to_tree(config)
    mine = {key: tree[key] for key in RESULT_KEYS}
    path = join(target, SETTINGS_FILE)
    if exists(path):
        stored = json.loads(read_bytes(path))
        changed = [key for key in RESULT_KEYS if stored.get(key) != mine[key]]
        if changed:
            raise StageError(
                f"{target} was made with other settings ({', '.join(changed)}; see {path}); "
                "use the same ones, or another folder"
            )
    else:
        write_bytes(path, json.dumps(mine, indent=2).encode())
        write_bytes(join(target, "config.yaml"), to_yaml(config).encode())


def provenance(config: LismConfig) -> dict[str, Any]:
    """What made the pairs, stored with each of them."""
    tree = to_tree(config)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "sentencex")}
    return {"goal_ray": __version__, **{key: tree[key] for key in RESULT_KEYS}, "versions": versions}


def pair_shards(shards: list[str], folder: OutputFolder, config: LismConfig) -> None:
    """Runs the pipeline and finishes every shard as soon as all its samples are through."""
    import ray

    use_gpu = config.device == "cuda" or (config.device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    if use_gpu and ray.cluster_resources().get("GPU", 0) < config.gpus_per_actor:
        raise StageError("device=cuda, but the cluster has no GPU; use device=cpu")
    finish = ray.remote(finish_shard)
    waiting: dict[int, dict[int, Row]] = defaultdict(dict)
    sizes: dict[int, int] = {}
    writing: list[Any] = []
    quarantined = 0
    bar = tqdm(desc="lism", unit=" images", dynamic_ncols=True)
    with bar:
        for row in stream_rows(shards, config, provenance(config), use_gpu):
            number = row["shard"]
            waiting[number][row["sample"]] = row
            if row["last"]:
                sizes[number] = row["sample"] + 1
            quarantined += bool(row["error"])
            bar.update()
            bar.set_postfix_str(f"{len(sizes)}/{len(shards)} shards read, {quarantined} quarantined", refresh=False)
            if len(waiting[number]) == sizes.get(number):
                writing.append(finish.remote(shards[number], list(waiting.pop(number).values()), folder))
            if row["error"] and quarantined > EARLY_BAD and quarantined > config.max_bad_share * bar.n:
                raise StageError(
                    f"{quarantined} of the first {bar.n} samples could not be used, more than "
                    f"max_bad_share={config.max_bad_share}; the last: {shards[number]} {row['key']!r}: {row['error']}"
                )
        ray.get(writing)
    if waiting:
        raise StageError(f"{len(waiting)} shards came back incomplete; run the same command again")


def finish_shard(shard: str, rows: list[Row], folder: OutputFolder) -> None:
    """Writes one shard's outputs from its rows."""
    counts, pairs, bad = ShardCounts(), {}, []
    for row in sorted(rows, key=lambda row: row["sample"]):
        if row["error"]:
            counts.add_bad()
            bad.append({"shard": shard_name(shard), "key": row["key"], **json.loads(row["error"])})
            continue
        record = json.loads(row["pairs"])
        regions = record["regions"]
        whole = sum(regions[pair["region"]]["source"] == "image" for pair in record["pairs"])
        counts.add_pairs(len(regions) - 1, [pair["similarity"] for pair in record["pairs"]], whole)
        pairs[int(row["sample"])] = row["pairs"]
    folder.finish(shard, pairs, bad, counts)


def check_bad(counts: ShardCounts, max_bad_share: float, folder: OutputFolder, shards: list[str]) -> None:
    """Raises StageError when more samples are in the quarantine than the run allows."""
    if counts.quarantined > max_bad_share * counts.samples:
        first = next(record for shard in shards for record in folder.quarantine(shard))
        raise StageError(
            f"{counts.quarantined} of {counts.samples} samples are in the quarantine, more than "
            f"max_bad_share={max_bad_share}; the first: {first['shard']} {first['key']!r} ({first['stage']}): "
            f"{first['reason']}; all of them: {folder.url}/quarantine/"
        )
