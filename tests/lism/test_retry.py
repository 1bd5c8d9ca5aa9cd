"""`--retry-quarantined`: only the samples that were left out are done again."""

import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from odd_tars import good, picture, write_members

from goal_ray.config import load_config
from goal_ray.errors import ShardError
from goal_ray.lism.__main__ import main
from goal_ray.lism.config import LismConfig
from goal_ray.lism.counts import ShardCounts
from goal_ray.lism.groups import Item
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.reading import ALL, Selection, read_groups, read_items
from goal_ray.lism.run import HalfReplaced, Pairing, finish_shard, quarantined_again
from goal_ray.lism.strikes import ReadingWatch, Strikes
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.storage import size_bytes
from goal_ray.tars import stream_samples

CONFIG = load_config(LismConfig, overrides=["proposer.name=grid"])
LARGE = [("large.png", picture(size=(300, 200))), ("large.txt", b"A wide thing. Noise.")]
BROKEN = [("broken.png", picture()[:100]), ("broken.txt", b"Nothing.")]


def records(folder: Path, name: str) -> list[dict]:
    """A tar's records in the quarantine."""
    path = folder / "quarantine" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pairs(path: Path) -> dict[str, bytes]:
    """Key -> pairs.json of a paired tar, in order."""
    return {sample.key: sample.members["pairs.json"] for sample in stream_samples(str(path))}


@pytest.fixture(scope="module")
def retried(cluster, tiny_clip, tmp_path_factory):  # noqa: ARG001
    """An output before and after a retry that allows larger pictures, and the same output made at once."""
    folder = tmp_path_factory.mktemp("retry")
    (folder / "in").mkdir()
    write_members(folder / "in" / "mixed.tar", [*good("a"), *LARGE, *good("b", 1), *BROKEN, *good("c", 2)])
    write_members(folder / "in" / "none.tar", [*LARGE, *LARGE])
    write_members(folder / "in" / "fine.tar", good("x"))
    write_members(folder / "in" / "cut.tar", [*good("p"), *good("q", 1), *good("r", 2)])
    whole = (folder / "in" / "cut.tar").read_bytes()
    with tarfile.open(folder / "in" / "cut.tar") as tar:
        damage = tar.getmembers()[2].offset
    (folder / "in" / "cut.tar").write_bytes(whole[:damage] + bytes(len(whole) - damage - 512) + b"x" * 512)
    fixed = ["proposer.name=grid", f"matcher.model.name={tiny_clip}", "max_bad_share=1"]

    def lism(target: str, *arguments: str) -> SimpleNamespace:
        main([str(folder / "in"), str(folder / target), *fixed, *arguments])
        out = folder / target
        tars = {path.name: pairs(path) for path in out.glob("*.tar")}
        return SimpleNamespace(
            tars=tars,
            bad={name: records(out, name) for name in ("mixed.tar", "none.tar", "fine.tar", "cut.tar")},
            summary=json.loads((out / "lism.json").read_text()),
            times={path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")},
        )

    before = lism("out", "max_pixels=10000")
    after = lism("out", "max_pixels=1000000", "--retry-quarantined")
    return SimpleNamespace(folder=folder, before=before, after=after, at_once=lism("fresh", "max_pixels=1000000"))


@pytest.mark.slow
def test_a_sample_that_is_usable_now_joins_the_others_in_its_place(retried):
    assert list(retried.before.tars["mixed.tar"]) == ["a", "b", "c"]
    assert list(retried.after.tars["mixed.tar"]) == ["a", "large", "b", "c"]
    assert retried.after.tars["mixed.tar"]["large"] == retried.at_once.tars["mixed.tar"]["large"]


@pytest.mark.slow
def test_pairs_that_were_there_stay_and_say_with_which_limits_they_were_made(retried):
    before, after = retried.before.tars["mixed.tar"], retried.after.tars["mixed.tar"]
    assert {key: after[key] for key in before} == before
    limits = {key: json.loads(record)["provenance"]["max_pixels"] for key, record in after.items()}
    assert limits == {"a": 10000, "large": 1000000, "b": 10000, "c": 10000}


@pytest.mark.slow
def test_a_sample_that_is_still_bad_stays_in_the_quarantine(retried):
    assert [(bad["number"], bad["key"]) for bad in retried.before.bad["mixed.tar"]] == [(1, "large"), (3, "broken")]
    assert [(bad["number"], bad["key"]) for bad in retried.after.bad["mixed.tar"]] == [(3, "broken")]
    assert retried.after.bad == retried.at_once.bad


@pytest.mark.slow
def test_a_shard_without_quarantined_samples_is_not_touched(retried):
    assert retried.before.times["fine.tar"] == retried.after.times["fine.tar"]


@pytest.mark.slow
def test_a_shard_of_which_nothing_was_usable_gets_its_tar(retried):
    assert "none.tar" not in retried.before.tars
    assert set(retried.after.tars) == set(retried.at_once.tars)


@pytest.mark.slow
def test_the_summary_is_that_of_a_run_at_once(retried):
    for name in ("samples", "paired", "quarantined", "sentences", "similarity_histogram", "reasons", "first_bad"):
        assert retried.after.summary[name] == retried.at_once.summary[name]


@pytest.fixture
def five(tmp_path):
    """A tar of five usable samples."""
    write_members(tmp_path / "five.tar", [member for n in range(5) for member in good(str(n), seed=n)])
    return tmp_path / "five.tar"


def test_only_selected_samples_are_decoded_and_they_keep_their_numbers(five):
    groups = list(read_groups(0, str(five), CONFIG, Strikes(), Selection(frozenset([1]), onwards=3)))
    assert [(item.number, item.key) for group in groups for item in group.items] == [(1, "1"), (3, "3"), (4, "4")]
    assert groups[-1].count == 3


@pytest.mark.parametrize("selection", [ALL, Selection(frozenset([2, 4])), Selection(frozenset(), onwards=2)])
def test_a_key_at_two_places_is_bad_at_the_later_one_whichever_samples_are_selected(tmp_path, selection):
    members = [*BROKEN, *good("b"), *[(name.replace("b.", "broken."), data) for name, data in good("b", 1)]]
    write_members(tmp_path / "x.tar", [*members, *good("c"), *good("b", 2)])
    items = list(read_items(str(tmp_path / "x.tar"), CONFIG, ReadingWatch(Strikes(), 0, 16), selection))
    assert [item.number for item in items] == [number for number in range(5) if number in selection]
    twice = [item.number for item in items if item.problem is not None and "two places" in item.problem.reason]
    assert twice == [2, 4]
    assert {item.problem.stage for item in items if item.number in twice} == {"decode"}


def test_damage_where_the_tar_was_whole_before_is_no_bad_sample(five):
    five.write_bytes(five.read_bytes()[:3000])
    watch = ReadingWatch(Strikes(), 0, 16)
    with pytest.raises(ShardError, match="truncated"):
        list(read_items(str(five), CONFIG, watch, Selection(frozenset([3]))))
    assert [item.problem.stage for item in read_items(str(five), CONFIG, watch, ALL)] == ["read"]


def test_a_damaged_end_is_retried_from_the_damage_on(tmp_path, five):
    folder = OutputFolder(str(tmp_path / "out"))
    shard = str(five)
    at = {"shard": "five.tar", "key": "", "reason": ""}
    bad = [{**at, "number": 1, "stage": "decode"}, {**at, "number": 3, "stage": "read"}]
    counts = counted(shard, 2, bad)
    folder.finish(shard, {0: b"{}", 2: b"{}"}, bad, counts)
    finished = folder.finished({shard: size_bytes(shard)})
    again = quarantined_again(finished, folder)[shard]
    assert finished == {}
    assert [number for number in range(6) if number in again.selection] == [1, 3, 4, 5]
    assert [(item.number, item.key, item.record) for item in again.kept(shard, folder)] == [
        (0, "0", b"{}"),
        (2, "2", b"{}"),
    ]


def test_samples_that_are_kept_count_as_done_before_and_after_the_others_are_done(tmp_path, five):
    folder, shard = OutputFolder(str(tmp_path / "out")), str(five)
    bad = [{"shard": "five.tar", "key": "1", "reason": "", "stage": "decode", "number": 1}]
    folder.finish(shard, dict.fromkeys((0, 2, 3, 4), b"{}"), bad, counted(shard, 4, bad))
    sizes = {shard: size_bytes(shard)}
    finished = folder.finished(sizes)
    pairing = Pairing(folder, CONFIG, sizes, finished, quarantined_again(finished, folder))
    assert (pairing.missing, pairing.samples_done) == (sizes, 4)
    finished[shard] = counted(shard, 5, [])
    assert (pairing.missing, pairing.samples_done) == ({}, 5)


def test_a_worker_that_died_between_the_new_tar_and_its_end_makes_the_shard_be_done_whole(tmp_path, five):
    folder, shard = OutputFolder(str(tmp_path / "out")), str(five)
    image = Region((0.0, 0.0, 60.0, 40.0), 1.0, "image")
    record = PairRecord((60, 40), ((0, 3),), (image,), (Pair(0, 0, 0.5),), {}).to_bytes()
    bad = [{"shard": "five.tar", "key": "1", "reason": "", "stage": "decode", "number": 1}]
    folder.finish(shard, dict.fromkeys((0, 2, 3, 4), record), bad, counted(shard, 4, bad))
    again = quarantined_again(folder.finished({shard: size_bytes(shard)}), folder)[shard]
    done_now = [Item(1, "1").done(record)]
    counts, _ = finish_shard(shard, size_bytes(shard), done_now, [], again, folder)
    assert (counts.paired, counts.quarantined) == (5, 0)
    (tmp_path / "out" / "done" / "five.tar.json").unlink()
    with pytest.raises(HalfReplaced, match=r"while it wrote the pairs of five\.tar"):
        finish_shard(shard, size_bytes(shard), done_now, [], again, folder)


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_share_of_bad_samples_is_that_of_all_also_when_only_bad_ones_are_tried(tiny_clip, tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        members = [member for n in range(12) for member in good(f"{name}{n}", n)]
        write_members(tmp_path / "in" / f"{name}.tar", [*members, *BROKEN])
    monkeypatch.setattr("goal_ray.lism.run.EARLY_BAD", 0)
    fixed = ["proposer.name=grid", f"matcher.model.name={tiny_clip}", "max_bad_share=0.1"]
    for more in ([], ["--retry-quarantined"]):
        main([str(tmp_path / "in"), str(tmp_path / "out"), *fixed, *more])
        summary = json.loads((tmp_path / "out" / "lism.json").read_text())
        assert (summary["paired"], summary["quarantined"]) == (24, 2)


def test_a_shard_whose_records_tell_no_numbers_is_done_again_whole(tmp_path, five):
    folder = OutputFolder(str(tmp_path / "out"))
    bad = [{"shard": "five.tar", "key": "", "reason": "", "stage": "decode"}]
    folder.finish(str(five), {0: b"{}"}, bad, counted(str(five), 1, bad))
    finished = folder.finished({str(five): size_bytes(str(five))})
    assert quarantined_again(finished, folder) == {}
    assert finished == {}


def counted(shard: str, paired: int, bad: list[dict]) -> ShardCounts:
    """The counts of a shard with so many paired samples, and these bad ones."""
    counts = ShardCounts(size_bytes(shard))
    for _ in range(paired):
        counts.add_pairs(3, 1, [0.5], 0, 1)
    for record in bad:
        counts.add_bad(record)
    return counts
