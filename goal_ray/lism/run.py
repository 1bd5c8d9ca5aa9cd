"""The driver of a LISM run: which shards are missing, the pipeline over them, and their outputs, each exactly once."""

import importlib.metadata
import json
import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from goal_ray import __version__
from goal_ray.atomic import write_bytes
from goal_ray.bad_samples import bad_record, describe_bad
from goal_ray.config import to_tree, to_yaml
from goal_ray.errors import StageError
from goal_ray.events import event, say, wants_json
from goal_ray.lism.config import LismConfig
from goal_ray.lism.counts import ShardCounts, summary
from goal_ray.lism.gallery import draw_gallery
from goal_ray.lism.groups import Item, storable_key
from goal_ray.lism.metrics import Metrics
from goal_ray.lism.output import OutputFolder, json_bytes
from goal_ray.lism.picks import Pick
from goal_ray.lism.pipeline import WorkerLost, stream_groups
from goal_ray.lism.progress import Progress
from goal_ray.lism.reading import Selection
from goal_ray.lism.work import Work
from goal_ray.ray_session import is_joined, ray_session
from goal_ray.sentences import split_sentences
from goal_ray.settings import ModelConfig
from goal_ray.shard_urls import expand_shards, shard_name
from goal_ray.storage import join, list_names, read_bytes, resolved, sizes_bytes

RESULT_KEYS = ("proposer", "matcher", "language", "min_area", "max_area", "max_side_px")
LIMIT_KEYS = ("max_pixels", "max_seconds_per_image")  # they only decide what is quarantined
SUMMARY_FILE = "lism.json"
SETTINGS_FILE = "settings.json"
EARLY_BAD = 100


def run_lism(source: str, target: str, config: LismConfig, retry_quarantined: bool = False) -> dict[str, Any]:
    """Pairs every shard of `source` that `target` lacks. Returns the summary over all shards, earlier ones included.

    retry_quarantined  also do the quarantined samples of finished shards again, and keep the other samples' pairs

    Raises StageError for a target made with other settings, and when too many samples had to be quarantined.
    """
    began = time.perf_counter()
    shards = expand_shards(source)
    split_sentences("Refuses an unknown language before any work.", config.language)
    config.proposer.check()
    notice = check_matcher(config.matcher.model)
    target = target if "://" in target else os.path.abspath(target)
    folder = OutputFolder(target)
    taken = next((shard for shard in shards if resolved(folder.tar(shard)) == resolved(shard)), None)
    if taken is not None:
        raise StageError(f"the output would replace the input {taken}; write to another folder")
    try:
        check_settings(target, config)
    except OSError as error:
        raise StageError(f"{target}: cannot be used as a folder for pairs: {error}; use another OUT") from None
    folder.remove_abandoned()
    sizes = sizes_bytes(shards)
    finished = folder.finished(sizes)
    again = quarantined_again(finished, folder) if retry_quarantined else {}
    pairing, images = Pairing(folder, config, sizes, finished, again), 0
    if pairing.missing:
        with ray_session(busy_cpus=config.least_actors):
            if notice:
                say("lism", target, notice)
            images = pairing.run()
    result = summary((finished[shard] for shard in shards), time.perf_counter() - began, images)
    result["gallery"] = draw_gallery(folder, result)
    write_bytes(join(target, SUMMARY_FILE), json_bytes(result, indent=2))
    if result["quarantined"]:
        check_bad(result["quarantined"], result["samples"], config.max_bad_share, result["first_bad"][0], folder)
    return result


def check_matcher(model: ModelConfig) -> str:
    """Raises ModelError for a matcher that is nowhere, and StageError for one that knows nothing.

    Returns what is to be said of an architecture of one's own without weights: it may be there to try things out.
    """
    from goal_ray.weights import check_model

    check_model(model, "matcher.model")
    if model.weights or os.path.isdir(model.name):
        return ""
    problem = "matcher.model.weights is empty: similarities by random weights would be noise; name a tag or a file"
    if not model.name.endswith(".json"):
        raise StageError(problem)
    return problem


def check_settings(target: str, config: LismConfig) -> None:
    """Stores the settings that decide the result, or checks that the folder was made with the same.

    Raises StageError for others, unless no shard was begun, and for a folder that holds something else.
    """
    tree = to_tree(config)
    mine = {key: tree[key] for key in RESULT_KEYS}
    path = join(target, SETTINGS_FILE)
    names = list_names(target)
    if SETTINGS_FILE not in names:
        foreign = [name for name in names if name == "config.yaml" or name.endswith(".tar")]
        if foreign:
            raise StageError(
                f"{target}: holds {foreign[0]} but no {SETTINGS_FILE}, so it is of another origin; use another OUT"
            )
    else:
        try:
            stored = json.loads(read_bytes(path))
        except (ValueError, RecursionError) as error:
            raise StageError(f"{path}: not JSON ({error}), so it is of another origin; use another OUT") from None
        lacking = [key for key in RESULT_KEYS if not isinstance(stored, dict) or key not in stored]
        if lacking:
            raise StageError(
                f"{path}: lacks {', '.join(lacking)}, so it is of another program or version; use another OUT"
            )
        changed = [key for key in RESULT_KEYS if stored[key] != mine[key]]
        if changed and any(list_names(join(target, part)) for part in ("done", "quarantine")):
            raise StageError(
                f"{target} was made with other settings ({', '.join(changed)}; see {path}); "
                "use the same ones, or another folder"
            )
    # The settings first: they tell whose folder it is.
    write_bytes(path, json.dumps(mine, indent=2).encode())
    write_bytes(join(target, "config.yaml"), to_yaml(config).encode())


def provenance(config: LismConfig) -> dict[str, Any]:
    """What made the pairs, stored with each of them."""
    tree = to_tree(config)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "open_clip_torch", "sentencex")}
    return {"goal_ray": __version__, **{key: tree[key] for key in (*RESULT_KEYS, *LIMIT_KEYS)}, "versions": versions}


def choose_gpu(config: LismConfig, run: str) -> bool:
    """Whether actors run on GPUs. Raises StageError where the cluster has too little for even the least actors.

    A cluster that was joined may grow, so there it is only said, of the run with this output folder.
    """
    import ray

    have = ray.cluster_resources()
    on_gpu = config.device == "cuda" or (config.device == "auto" and have.get("GPU", 0) > 0)
    actors = config.least_actors
    reading = 1
    needed: dict[str, float] = {"CPU": actors + reading}  # Ray Data gives a CPU to actors on GPUs too
    if on_gpu:
        needed["GPU"] = config.least_gpu_actors * config.gpus_per_actor
    needed |= {name: actors * amount for name, amount in config.actor_resources.items()}
    for name, amount in needed.items():
        if have.get(name, 0) < amount:
            problem = f"the actors and reading need {amount:g} {name}s, and the cluster has {have.get(name, 0):g}"
            if not is_joined():
                raise StageError(
                    f"{problem}; change actor_resources, proposer_actors, matcher_actors, gpus_per_actor or device"
                )
            say("lism", run, f"waiting for the cluster to grow: {problem}")
    return on_gpu


class HalfReplaced(Exception):
    """A worker died between an earlier output of a shard and the new one, so that nothing of it can be kept."""


@dataclass(frozen=True)
class Again:
    """Samples of a finished shard that are to be done again, and the counts of the first time."""

    selection: Selection
    earlier: ShardCounts

    def kept(self, shard: str, folder: OutputFolder) -> list[Item]:
        """The other samples of the shard, with their pairs."""
        numbers = (number for number in range(self.earlier.samples) if number not in self.selection)
        paired = folder.paired(shard) if self.earlier.paired else ()
        return [
            Item(number, storable_key(key)).done(record) for number, (key, record) in zip(numbers, paired, strict=True)
        ]


def quarantined_again(finished: dict[str, ShardCounts], folder: OutputFolder) -> dict[str, Again]:
    """Takes the shards with quarantined samples out of `finished`; says for each which samples these are.

    A shard whose records do not say it is not in the result, and is done again whole.
    """
    bad = [shard for shard, counts in finished.items() if counts.quarantined]
    again = {}
    for shard, records in zip(bad, folder.quarantine(bad), strict=True):
        earlier = finished.pop(shard)
        if all("number" in record for record in records):
            numbers = frozenset(record["number"] for record in records)
            unread = [record["number"] for record in records if record["stage"] == "read"]
            again[shard] = Again(Selection(numbers, min(unread, default=math.inf)), earlier)
    return again


@dataclass
class Pairing:
    """Pairs the shards of a run that are not finished.

    sizes     shard -> bytes of its tar
    finished  shard -> what came out of it; `run` adds the others
    again     shards of which only some samples are to be done
    """

    folder: OutputFolder
    config: LismConfig
    sizes: Mapping[str, int]
    finished: dict[str, ShardCounts]
    again: dict[str, Again]

    @property
    def missing(self) -> dict[str, int]:
        """The sizes of the shards that are not finished."""
        return {shard: size for shard, size in self.sizes.items() if shard not in self.finished}

    @property
    def samples_done(self) -> int:
        """The samples that need not be done, or not again."""
        kept = sum(each.earlier.paired for shard, each in self.again.items() if shard not in self.finished)
        return kept + sum(counts.samples for counts in self.finished.values())

    def run(self) -> int:
        """Finishes all shards, with the pipeline anew where it broke down. Returns how many samples were done.

        Raises WorkerLost when an attempt ended so and neither finished a shard nor found one to be done whole: then it
        is no accident.
        """
        before = sum(counts.samples for counts in self.finished.values())
        while missing := self.missing:
            partly = len(self.again)
            try:
                self._attempt(missing)
            except WorkerLost as error:
                if (len(self.missing), len(self.again)) == (len(missing), partly):
                    raise
                event("lism", self.folder.url, "pipeline started again", logging.WARNING, reason=str(error))
                if not wants_json():
                    print(f"{error}; trying", file=sys.stderr)
        # Only now, since a shard that was half replaced has left `again`, and all of it was done.
        kept = sum(each.earlier.paired for each in self.again.values())
        return sum(counts.samples for counts in self.finished.values()) - before - kept

    def _attempt(self, sizes: Mapping[str, int]) -> None:
        """Runs the pipeline over these shards and finishes every one as soon as all its samples are through."""
        import ray

        folder, config, again = self.folder, self.config, self.again
        on_gpu, finish = choose_gpu(config, folder.url), ray.remote(finish_shard)
        shards = list(sizes)
        samples_before = self.samples_done
        bad_before = sum(counts.quarantined for counts in self.finished.values())
        selected = {number: again[shard].selection for number, shard in enumerate(shards) if shard in again}
        waiting: dict[int, dict[int, Item]] = defaultdict(dict)
        work: dict[int, list[Work]] = defaultdict(list)
        expected: dict[int, int] = {}
        writing: dict[Any, str] = {}
        with Progress(folder.url, sum(sizes.values()), len(shards), Metrics(folder.url)) as progress:
            try:
                for group in stream_groups(shards, selected, config, provenance(config), on_gpu):
                    shard, items = shards[group.shard], waiting[group.shard]
                    items.update((item.number, item) for item in group.items)
                    work[group.shard] += group.work
                    bad = [item for item in group.items if item.problem is not None]
                    stages = [item.problem.stage for item in bad if item.problem is not None]
                    progress.passed(len(group.items), size_of(group.items), stages, group.work)
                    if bad and progress.bad > EARLY_BAD:
                        example, all_bad = quarantined(shard, bad[-1]), bad_before + progress.bad
                        check_bad(all_bad, samples_before + progress.images, config.max_bad_share, example, folder)
                    if group.count is not None:
                        expected[group.shard] = group.count
                    if len(items) == expected.get(group.shard):
                        through = list(waiting.pop(group.shard).values()), work.pop(group.shard)
                        writing[finish.remote(shard, sizes[shard], *through, again.get(shard), folder)] = shard
                        progress.skipped(sizes[shard] - size_of(items.values()))
                    self._collect(writing, progress, timeout_s=0)
            except WorkerLost:
                # Or the next attempt would write a shard that a task of this one is writing.
                self._collect(writing, progress, timeout_s=None)
                raise
            self._collect(writing, progress, timeout_s=None)
            if left := len(self.missing):
                raise WorkerLost(f"{left} shards came back incomplete; run the same command again, it goes on")
            progress.all_done()

    def _collect(self, writing: dict[Any, str], progress: Progress, timeout_s: float | None) -> None:
        """Moves the shards that are written by now, or all, from `writing` to `finished`.

        Then raises StageError for one that failed, WorkerLost for one that another attempt may do; one whose worker
        died while it replaced an earlier output is no longer in `again`.
        """
        import ray

        if not writing:
            return
        ready, _ = ray.wait(list(writing), num_returns=len(writing), timeout=timeout_s)
        problems: list[StageError] = []
        for reference in ready:
            shard = writing.pop(reference)
            try:
                counts, work = ray.get(reference)
            except ray.exceptions.RayTaskError as error:
                if isinstance(error.cause, HalfReplaced):
                    del self.again[shard]
                    problems.append(WorkerLost(f"{error.cause}; it is done again whole"))
                    continue
                reason = f"{type(error.cause).__name__}: {error.cause}"
                text = f"the pairs of {shard_name(shard)} cannot be written: {reason}"
                problems.append(StageError(f"{text}; mend it and run the same command again, it goes on"))
            except ray.exceptions.RayError as error:
                problems.append(WorkerLost(f"the pairs of {shard_name(shard)} were not written: {error}"))
            else:
                self.finished[shard] = counts
                progress.finished(counts.pairs, work)
                told = {"samples": counts.samples, "pairs": counts.pairs, "quarantined": counts.quarantined}
                event("lism", self.folder.url, "shard paired", shard=shard_name(shard), **told)
        if problems:  # the first that no other attempt mends, if there is one
            raise min(problems, key=lambda problem: isinstance(problem, WorkerLost))


def size_of(items: Iterable[Item]) -> int:
    """Bytes of samples in their tar."""
    return sum(item.size_bytes for item in items)


def finish_shard(
    shard: str, source_bytes: int, items: list[Item], work: list[Work], again: Again | None, folder: OutputFolder
) -> tuple[ShardCounts, Work]:
    """Writes one shard's outputs from its samples. Returns its counts, and the work of writing.

    Raises HalfReplaced where nothing of an earlier output is to be had.
    """
    counts, pairs, bad = ShardCounts(source_bytes), {}, []
    for done in work:
        for phase, seconds in done.seconds.items():
            counts.add_work(phase, seconds, done.images)
    if again is not None:
        stored = folder.counts(shard)
        if stored is None:
            raise HalfReplaced(f"a worker died while it wrote the pairs of {shard_name(shard)}")
        if stored != again.earlier:
            # It was written to its end by a task whose answer was lost, and Ray, or the next attempt, runs this one.
            return stored, Work.done_here("write", 0, {})
        items = [*items, *again.kept(shard, folder)]
        for phase, (busy, images) in again.earlier.work.items():
            counts.add_work(phase, busy, images)
    for item in sorted(items, key=lambda item: item.number):
        if item.problem is not None:
            bad.append(quarantined(shard, item))
            counts.add_bad(bad[-1])
            continue
        pairs[item.number] = item.record
        record = json.loads(pairs[item.number])
        regions = record["regions"]
        whole = sum(regions[pair["region"]]["source"] == "image" for pair in record["pairs"])
        similarities = [pair["similarity"] for pair in record["pairs"]]
        paired_sentences = len({pair["sentence"] for pair in record["pairs"]})
        counts.add_pairs(len(regions) - 1, len(record["sentences"]), similarities, whole, paired_sentences)
        at = shard_name(shard), item.number, item.key
        counts.add_picks([Pick(*at, pair["sentence"], pair["region"], pair["similarity"]) for pair in record["pairs"]])
    keys = {item.number: item.key for item in items if item.problem is None}
    written = folder.finish(shard, pairs, bad, counts, keys)
    return counts, written


def quarantined(shard: str, item: Item) -> dict[str, Any]:
    """The quarantine's record of a sample."""
    assert item.problem is not None
    record = bad_record(shard_name(shard), item.key, item.problem.stage, item.problem.reason)
    return {**record, "number": item.number}


def check_bad(bad: int, samples: int, max_bad_share: float, example: dict[str, Any], folder: OutputFolder) -> None:
    """Raises StageError where more samples are bad than the run allows."""
    if bad > max_bad_share * samples:
        raise StageError(
            f"{bad} of {samples} samples cannot be used, more than max_bad_share={max_bad_share}; one of them: "
            f"{describe_bad(example)}; the finished shards' are in {join(folder.url, 'quarantine')}. What is done "
            "stays: mend the input, or raise max_bad_share, and run the same command again"
        )
