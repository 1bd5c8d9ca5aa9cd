"""From what a user names to the addresses of tars."""

import pytest

from goal_ray.atomic import write_bytes
from goal_ray.errors import ShardError
from goal_ray.shard_urls import expand_files, expand_shards


def test_shards_are_found_by_file_folder_glob_and_braces(tmp_path):
    for name in ("b-0.tar", "b-1.tar", "note.md", ".hidden.tar"):
        (tmp_path / name).write_bytes(b"")
    both = [str(tmp_path / "b-0.tar"), str(tmp_path / "b-1.tar")]
    for spec in (tmp_path, tmp_path / "b-*.tar", tmp_path / "b-{0..1}.tar"):
        assert expand_shards(str(spec)) == both
    assert expand_shards(both[0]) == both[:1]


@pytest.mark.parametrize(
    ("spec", "error"), [("missing", "no such"), ("x-*.tar", "no file matches"), ("", "holds no .tar")]
)
def test_a_spec_that_finds_nothing_is_refused(tmp_path, spec, error):
    with pytest.raises(ShardError, match=error):
        expand_shards(str(tmp_path / spec))


@pytest.mark.parametrize("spec", ["train-{000..099.tar", "train-000}.tar", "{a,{b}.tar"])
def test_braces_that_do_not_close_are_refused_naming_the_spec(spec):
    with pytest.raises(ShardError) as caught:
        expand_shards(spec)
    assert str(caught.value).startswith(f"{spec}: unbalanced braces; ")


def test_two_shards_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(b"")
    with pytest.raises(ShardError, match="share a file name"):
        expand_shards(str(tmp_path / "{a,b}" / "x.tar"))


def test_files_of_some_suffixes_are_found_in_a_folder_whatever_their_case(tmp_path):
    for name in ("b.csv", "a.TSV", "c.txt", ".d.csv"):
        (tmp_path / name).write_bytes(b"")
    assert expand_files(str(tmp_path), (".csv", ".tsv")) == [str(tmp_path / "a.TSV"), str(tmp_path / "b.csv")]
    with pytest.raises(ShardError, match=r"holds no \.json file"):
        expand_files(str(tmp_path), (".json",))


def test_a_brace_pattern_of_very_many_shards_finds_them_all_or_names_the_missing_one(tmp_path):
    for number in range(150):
        (tmp_path / f"t-{number:03}.tar").touch()
    assert len(expand_shards(str(tmp_path / "t-{000..149}.tar"))) == 150
    with pytest.raises(ShardError, match=r"t-150\.tar: no such file"):
        expand_shards(str(tmp_path / "t-{000..150}.tar"))


def test_a_brace_pattern_of_very_many_folders_means_the_tars_inside(tmp_path):
    for number in range(102):
        (tmp_path / f"part-{number:03}").mkdir()
        (tmp_path / f"part-{number:03}" / f"{number}.tar").touch()
    found = expand_shards(str(tmp_path / "part-{000..101}"))
    assert sorted(found) == sorted(str(tmp_path / f"part-{number:03}" / f"{number}.tar") for number in range(102))


@pytest.mark.parametrize("name", ["train[1].tar", "a{b.tar", "a{1,2}.tar", "a?.tar", "a*.tar", "x::y.tar"])
def test_a_file_is_found_by_its_name_whatever_is_in_it(tmp_path, name):
    for each in (name, "train1.tar", "a1.tar", "a2.tar"):
        (tmp_path / each).touch()
    assert expand_shards(str(tmp_path / name)) == [str(tmp_path / name)]


@pytest.mark.parametrize("folder", ["x{1,2}", "x[1]"])
@pytest.mark.parametrize("pattern", ["", "/b-*.tar", "/b-{0..1}.tar", "/b-[01].tar"])
def test_a_folder_is_found_by_its_name_whatever_is_in_it(tmp_path, folder, pattern):
    for each in (folder, "x1", "x2"):
        (tmp_path / each).mkdir()
        for number in range(2):
            (tmp_path / each / f"b-{number}.tar").touch()
    found = expand_shards(str(tmp_path / f"{folder}{pattern}"))
    assert found == [str(tmp_path / folder / f"b-{number}.tar") for number in range(2)]


def test_a_pattern_finds_the_objects_of_a_bucket(s3):
    for number in range(3):
        write_bytes(f"{s3}/a/{number}.tar", b"")
    both = [f"{s3}/a/{number}.tar" for number in range(2)]
    for pattern in ("a/{0..1}.tar", "a/[01].tar", "{a,a}/{0,1}.tar"):
        assert expand_shards(f"{s3}/{pattern}") == both
