"""`shards reshard`: the same samples, byte for byte, equally many in each tar."""

import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_inputs import good, members_of, put, write_members

from goal_ray.atomic import write_bytes
from goal_ray.errors import ConfigError, GoalRayError, ShardError
from goal_ray.shards.reshard import Balance, reshard, spread
from goal_ray.tar_places import index_shard

FORMS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
EXTENSIONS = ["png", "txt", "TXT", "pairs.json"]


def mixed(source, out, balance, name=None):
    """Reshards in this process."""
    return reshard(str(source), str(out), name, balance, workers=1)


def all_members(folder: Path) -> list:
    """The members of all tars of a folder, in order."""
    return [member for path in sorted(folder.glob("*.tar")) for member in members_of(path)]


@st.composite
def shards(draw) -> list[tuple[int, list[tuple[str, bytes]]]]:
    """Tars of samples with any members and sizes, long names, and members of no sample between them."""
    made, number = [], 0
    for _ in range(draw(st.integers(1, 4))):
        members = []
        for _ in range(draw(st.integers(1, 6))):
            key = draw(st.sampled_from(["", "folder.d/", "ü" * 60 + "/"])) + f"{number:03}"
            number += 1
            for extension in draw(st.lists(st.sampled_from(EXTENSIONS), min_size=1, max_size=4)):
                members.append((f"{key}.{extension}", b"x" * draw(st.integers(0, 1500))))
            if draw(st.booleans()):
                members.append(("README", b"of no sample"))
        made.append((draw(FORMS), members))
    return made


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tars=shards(), data=st.data(), equal=st.sampled_from(["samples", "bytes"]))
def test_all_members_come_out_in_their_order_with_their_headers(tmp_path_factory, tars, data, equal):
    folder = tmp_path_factory.mktemp("reshard")
    for number, (form, members) in enumerate(tars):
        write_members(folder / "in" / f"{number}.tar", members, form)
    total = sum(len(index_shard(str(path))) for path in (folder / "in").glob("*.tar"))
    count = data.draw(st.integers(1, total))
    counts = mixed(folder / "in", folder / "out", Balance(shards=count, equal=equal))
    assert all_members(folder / "out") == all_members(folder / "in")
    assert [len(index_shard(str(path))) for path in sorted((folder / "out").glob("*.tar"))] == list(counts)
    assert len(counts) == count
    if equal == "samples":
        assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tars=shards(), seed=st.integers(0, 100), size=st.integers(1, 7))
def test_a_shuffle_keeps_exactly_the_samples(tmp_path_factory, tars, seed, size):
    folder = tmp_path_factory.mktemp("shuffle")
    for number, (form, members) in enumerate(tars):
        write_members(folder / "in" / f"{number}.tar", members, form)
    counts = mixed(folder / "in", folder / "out", Balance(samples_per_shard=size, shuffle=seed))
    assert sorted(all_members(folder / "out")) == sorted(all_members(folder / "in"))
    assert max(counts) <= size
    assert max(counts) - min(counts) <= 1


@given(sizes=st.lists(st.integers(512, 50_000), min_size=1, max_size=40), data=st.data())
def test_equal_bytes_are_equal_to_the_largest_sample(sizes, data):
    shards = data.draw(st.integers(1, len(sizes)))
    bounds = spread(np.array(sizes), Balance(shards=shards, equal="bytes"))
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(sizes), shards + 1)
    parts = [sum(sizes[start:end]) for start, end in pairwise(bounds)]
    assert all(start < end for start, end in pairwise(bounds))
    if min(sizes) * 2 > max(sizes) and len(sizes) > 4 * shards:
        assert max(abs(part - sum(sizes) / shards) for part in parts) <= max(sizes)


@pytest.fixture
def source(tmp_path) -> Path:
    """Three tars of 4, 1 and 7 samples."""
    numbers = iter(range(12))
    for name, count in {"a": 4, "b": 1, "c": 7}.items():
        write_members(tmp_path / "in" / f"{name}.tar", [m for _ in range(count) for m in good(f"{next(numbers):02}")])
    return tmp_path / "in"


def keys_in(folder: Path) -> list[str]:
    return [entry.key for path in sorted(folder.glob("*.tar")) for entry in index_shard(str(path))]


def test_a_shuffle_mixes_all_tars_and_its_seed_decides_the_order(source, tmp_path):
    orders = []
    for name, seed in {"one": 1, "same": 1, "other": 2}.items():
        mixed(source, tmp_path / name, Balance(shards=3, shuffle=seed), name="x")
        orders.append(keys_in(tmp_path / name))
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == keys_in(source)
    assert all(len({key < "05" for key in orders[0][start : start + 4]}) == 2 for start in (0, 4, 8))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lost=st.sets(st.integers(0, 4)), shuffle=st.sampled_from([None, 3]))
def test_missing_tars_are_made_again_and_the_others_stay_untouched(tmp_path_factory, source, lost, shuffle):
    out = tmp_path_factory.mktemp("resume") / "out"
    mixed(source, out, Balance(shards=5, shuffle=shuffle))
    before = {path: path.read_bytes() for path in out.glob("*.tar")}
    for number in lost:
        (out / f"out-{number:06d}.tar").unlink()
    put(out, {".out-000004.tar.01.tmp": "half a tar"})
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    mixed(source, out, Balance(shards=5, shuffle=shuffle))
    assert {path: path.read_bytes() for path in out.glob("*.tar")} == before
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_another_input_or_another_balance_does_not_go_on(source, tmp_path):
    mixed(source, tmp_path / "out", Balance(shards=2))
    for balance in (Balance(shards=3), Balance(shards=2, shuffle=1), Balance(shards=2, equal="bytes")):
        with pytest.raises(GoalRayError, match="was begun with other settings"):
            mixed(source, tmp_path / "out", balance)
    write_members(source / "d.tar", good("new"))
    with pytest.raises(GoalRayError, match=r"another input \(inputs"):
        mixed(source, tmp_path / "out", Balance(shards=2))


def test_an_input_made_anew_at_equal_length_does_not_go_on(source, tmp_path):
    mixed(source, tmp_path / "out", Balance(shards=2))
    (tmp_path / "out" / "out-000001.tar").unlink()
    before = (source / "a.tar").stat()
    write_members(source / "a.tar", [member for number in range(90, 94) for member in good(str(number))])
    assert (source / "a.tar").stat().st_size == before.st_size
    with pytest.raises(GoalRayError, match=r"another input \(times or checksums of inputs, which a copy changes too;"):
        mixed(source, tmp_path / "out", Balance(shards=2))


def test_an_object_made_anew_at_equal_length_does_not_go_on(s3, tmp_path):
    write_bytes(f"{s3}/in/a.tar", packed("0", tmp_path))
    for _ in range(2):
        mixed(f"{s3}/in", f"{s3}/out", Balance(shards=2))
    write_bytes(f"{s3}/in/a.tar", packed("1", tmp_path))
    with pytest.raises(GoalRayError, match="times or checksums of inputs"):
        mixed(f"{s3}/in", f"{s3}/out", Balance(shards=2))


def packed(prefix: str, tmp_path: Path) -> bytes:
    """A tar of two samples."""
    write_members(tmp_path / "packed.tar", [*good(f"{prefix}a"), *good(f"{prefix}b")])
    return (tmp_path / "packed.tar").read_bytes()


def test_two_tars_in_one_file_are_refused_before_anything_is_written(source, tmp_path):
    with open(source / "b.tar", "ab") as file:
        file.write((source / "c.tar").read_bytes())
    (source / "c.tar").unlink()
    with pytest.raises(ShardError, match=r"b\.tar: another tar stands behind the end mark"):
        mixed(source, tmp_path / "out", Balance(shards=2))
    assert not (tmp_path / "out").exists()


def test_the_output_never_mixes_with_the_input(source, tmp_path):
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", f"{source}/"):
        with pytest.raises(GoalRayError, match="mix with the input"):
            mixed(source, out, Balance(shards=2))


@pytest.mark.parametrize("shuffle", [None, 1])
def test_a_key_that_stands_twice_is_refused_by_name(source, tmp_path, shuffle):
    write_members(source / "d.tar", [*good("new"), *good("03")])
    with pytest.raises(ShardError, match=r"'03' stands in .*a\.tar and in .*d\.tar.*shards validate"):
        mixed(source, tmp_path / "out", Balance(shards=2, shuffle=shuffle))
    write_members(source / "d.tar", [*good("new"), *good("k"), *good("new")])
    with pytest.raises(ShardError, match=r"d\.tar: the key 'new' stands at two places"):
        mixed(source, tmp_path / "out", Balance(shards=2, shuffle=shuffle))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [100, 1000, 5000])
def test_a_damaged_tar_is_refused_by_name_before_anything_is_written(source, tmp_path, cut):
    (source / "b.tar").write_bytes((source / "b.tar").read_bytes()[:cut])
    with pytest.raises(ShardError, match=r"b\.tar: corrupt or truncated.*goal-ray shards validate"):
        mixed(source, tmp_path / "out", Balance(shards=2))
    assert not (tmp_path / "out").exists()


def test_headers_that_hold_for_all_members_behind_them_are_refused(source, tmp_path):
    with tarfile.open(source / "b.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "a commit"}) as tar:
        tar.addfile(tarfile.TarInfo("b.txt"))
    with pytest.raises(ShardError, match=r"b\.tar: its members share a global header \(comment\).*--format=gnu"):
        mixed(source, tmp_path / "out", Balance(shards=2))


def test_a_tar_whose_members_belong_to_no_sample_is_not_lost_silently(source, tmp_path):
    write_members(source / "d.tar", [("README", b"x")])
    with pytest.raises(ShardError, match=r"d\.tar: holds members but no sample"):
        mixed(source, tmp_path / "out", Balance(shards=2))
    write_members(source / "d.tar", [])
    assert list(mixed(source, tmp_path / "out", Balance(shards=2))) == [6, 6]


@pytest.mark.parametrize(
    "numbers", [{}, {"shards": 1, "samples_per_shard": 1}, {"shards": 0}, {"shards": 1, "shuffle": -1}]
)
def test_senseless_numbers_are_refused(numbers):
    with pytest.raises(ConfigError, match="--"):
        Balance(**numbers)


def test_more_tars_than_samples_are_refused(source, tmp_path):
    with pytest.raises(GoalRayError, match="12 samples cannot be spread over 13 shards"):
        mixed(source, tmp_path / "out", Balance(shards=13))


def test_input_and_output_may_lie_on_another_storage(source, tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in source.iterdir():
        memory.pipe_file(f"/reshard-in/{path.name}", path.read_bytes())
    mixed("memory://reshard-in", "memory://reshard-out", Balance(shards=2, shuffle=1), name="x")
    mixed(source, tmp_path / "out", Balance(shards=2, shuffle=1), name="x")
    for path in (tmp_path / "out").glob("*.tar"):
        assert memory.cat_file(f"/reshard-out/{path.name}") == path.read_bytes()
    memory.rm("/reshard-in", recursive=True)
    memory.rm("/reshard-out", recursive=True)
