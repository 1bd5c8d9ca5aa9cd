"""Attempts that break down, and what the next one finds. The pipeline is played, what writes the outputs is real."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from odd_tars import good, write_members

from goal_ray.config import load_config
from goal_ray.errors import StageError
from goal_ray.lism import run
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item, Problem
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.pipeline import WorkerLost
from goal_ray.lism.progress import Progress
from goal_ray.lism.reading import ALL
from goal_ray.lism.run import HalfReplaced, Pairing, finish_shard, quarantined_again
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.storage import size_bytes
from goal_ray.tars import stream_samples

SAMPLES, BAD = 5, 1
IMAGE = Region((0.0, 0.0, 40.0, 30.0), 1.0, "image")
RECORD = PairRecord((40, 30), ((0, 3),), (IMAGE,), (Pair(0, 0, 0.5),), {}).to_bytes()
ITEMS = [Item(number, str(number)).done(RECORD) for number in range(SAMPLES)]


class Folder:
    """An input and an output folder; `path` is where both lie."""

    def __init__(self, path: Path):
        self.path = path
        self.output = OutputFolder(str(path / "out"))

    def shard(self, name: str) -> str:
        """Writes a tar of SAMPLES usable samples."""
        (self.path / "in").mkdir(exist_ok=True)
        write_members(self.path / "in" / name, [each for n in range(SAMPLES) for each in good(str(n), seed=n)])
        return str(self.path / "in" / name)

    def half_done(self, name: str) -> str:
        """A shard that is finished, but for sample BAD in the quarantine."""
        shard = self.shard(name)
        items = [*ITEMS[:BAD], Item(BAD, str(BAD), problem=Problem("decode", "dark")), *ITEMS[BAD + 1 :]]
        finish_shard(shard, size_bytes(shard), items, [], None, self.output)
        return shard

    def pairing(self, *shards: str) -> Pairing:
        """What `--retry-quarantined` has to do for these shards."""
        sizes = {shard: size_bytes(shard) for shard in shards}
        finished = self.output.finished(sizes)
        again = quarantined_again(finished, self.output)
        return Pairing(self.output, load_config(LismConfig, overrides=["proposer.name=grid"]), sizes, finished, again)

    def keys(self, shard: str) -> list[str]:
        """Of the samples in the paired tar."""
        return [sample.key for sample in stream_samples(self.output.tar(shard))]

    def lose_done(self, shard: str) -> None:
        """As a worker leaves it that dies while it replaces the shard's output."""
        (self.path / "out" / "done" / f"{Path(shard).name}.json").unlink()


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


Attempt = Callable[[list[str], dict], Iterable[Group]]


@pytest.fixture
def play(cluster, monkeypatch) -> Callable[..., list[list[str]]]:  # noqa: ARG001
    """Takes what the pipeline gives in each attempt, by shards and selection; returns the names each was asked for."""

    def play(*attempts: Attempt) -> list[list[str]]:
        asked: list[list[str]] = []
        left = iter(attempts)

        def stream_groups(shards: list[str], selected: dict, *_: object) -> Iterable[Group]:
            asked.append([Path(shard).name for shard in shards])
            return next(left)(shards, selected)

        monkeypatch.setattr(run, "stream_groups", stream_groups)
        return asked

    return play


def everything(shards: list[str], selected: dict) -> Iterator[Group]:
    """A pipeline in which nothing happens."""
    for number in range(len(shards)):
        items = [item for item in ITEMS if item.number in selected.get(number, ALL)]
        yield Group(number, items, len(items))


def test_a_shard_whose_new_output_was_written_though_nobody_heard_of_it_is_left_as_it_is(folder):
    shard = folder.half_done("a.tar")
    again = folder.pairing(shard).again[shard]
    task = shard, size_bytes(shard), [ITEMS[BAD]], [], again, folder.output
    counts, _ = finish_shard(*task)
    files = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.path.rglob("*") if path.is_file()}
    repeated, work = finish_shard(*task)
    assert repeated == counts
    assert (counts.samples, counts.paired, work.images) == (SAMPLES, SAMPLES, 0)
    assert files == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_task_whose_worker_dies_after_its_last_write_is_run_again_by_ray_and_the_shard_is_done_once(
    folder, play, monkeypatch
):
    shard, died = folder.half_done("a.tar"), folder.path / "died"

    def dies_once(*task):
        answer = finish_shard(*task)
        if not died.exists():
            died.touch()
            os._exit(1)
        return answer

    monkeypatch.setattr(run, "finish_shard", dies_once)
    asked = play(everything)
    pairing = folder.pairing(shard)
    assert pairing.run() == 1
    assert died.exists()
    assert asked == [["a.tar"]]
    assert (pairing.finished[shard].samples, pairing.finished[shard].paired) == (SAMPLES, SAMPLES)
    assert folder.keys(shard) == [item.key for item in ITEMS]


def test_shards_that_are_being_written_when_the_pipeline_breaks_are_not_done_again(folder, play):
    half, whole = folder.half_done("a.tar"), folder.shard("b.tar")

    def breaks(shards, selected):
        yield next(everything(shards, selected))
        raise WorkerLost("a worker died")

    asked = play(breaks, everything)
    assert folder.pairing(half, whole).run() == 1 + SAMPLES
    assert asked == [["a.tar", "b.tar"], ["b.tar"]]
    for shard in (half, whole):
        assert folder.keys(shard) == [item.key for item in ITEMS]


@pytest.mark.parametrize("others", [0, 1])
def test_a_shard_that_was_half_replaced_is_done_whole_and_all_its_samples_count(folder, play, others):
    half, *rest = (folder.half_done(f"{name}.tar") for name in "ab"[: 1 + others])

    def loses(shards, selected):
        folder.lose_done(half)
        # The others first: they are on their way when the half replaced one is found.
        yield from reversed(list(everything(shards, selected)))

    asked = play(loses, everything)
    assert folder.pairing(half, *rest).run() == SAMPLES + others
    assert asked == [["a.tar", "b.tar"][: 1 + others], ["a.tar"]]
    assert folder.keys(half) == [item.key for item in ITEMS]


def test_an_attempt_that_got_no_further_ends_the_run_and_is_not_told_as_its_end(folder, play, monkeypatch, caplog):
    monkeypatch.setenv("GOAL_RAY_LOG", "json")
    caplog.set_level("INFO")
    asked = play(lambda *_: [Group(0, ITEMS[:2])])
    with pytest.raises(WorkerLost, match="2 shards came back incomplete"):
        folder.pairing(folder.shard("a.tar"), folder.shard("b.tar")).run()
    assert asked == [["a.tar", "b.tar"]]
    assert "all shards paired" not in caplog.messages


class NoMetrics:
    def shard(self, *_): ...
    def speed(self, *_): ...


@pytest.mark.parametrize(
    ("broken", "raised"),
    [(HalfReplaced("a worker died"), WorkerLost), (OSError("disk full"), StageError)],
    ids=["half", "disk"],
)
def test_shards_that_are_written_by_the_time_that_another_fails_are_finished(folder, cluster, broken, raised):  # noqa: ARG001
    import ray

    shards = [folder.half_done(f"{name}.tar") for name in "abc"]
    pairing = folder.pairing(*shards)
    done = finish_shard(shards[2], size_bytes(shards[2]), [ITEMS[BAD]], [], pairing.again[shards[2]], folder.output)

    @ray.remote
    def fail(error):
        raise error

    half = HalfReplaced("a worker died")
    writing = {fail.remote(half): shards[0], fail.remote(broken): shards[1], ray.put(done): shards[2]}
    with Progress("out", 1, 3, NoMetrics()) as progress, pytest.raises(StageError) as failure:
        pairing._collect(writing, progress, timeout_s=None)
    assert type(failure.value) is raised
    assert writing == {}
    assert pairing.finished == {shards[2]: done[0]}
    assert shards[0] not in pairing.again
