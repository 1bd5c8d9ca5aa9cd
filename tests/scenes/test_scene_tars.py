"""The stage as a whole: tars, determinism, refusals, the command line."""

import json
import subprocess
import sys

import pytest
import webdataset

from goal_ray.errors import ConfigError, StageError
from goal_ray.pairs import PairRecord
from goal_ray.scenes.__main__ import main
from goal_ray.scenes.run import SceneSettings, draw_scene, draw_scenes
from goal_ray.tars import stream_samples

SMALL = SceneSettings(shard_size=3, size=48)


def content(folder):
    """File name -> bytes of every tar."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        draw_scenes(tmp_path / name, 5, seed, SMALL)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert list(content(tmp_path / "a")) == ["scenes-000000.tar", "scenes-000001.tar"]
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_a_scene_does_not_depend_on_how_many_are_drawn(tmp_path):
    few, many = draw_scenes(tmp_path / "few", 4, 1, SMALL), draw_scenes(tmp_path / "many", 7, 1, SMALL)
    samples = [[sample for tar in tars for sample in stream_samples(tar)] for tars in (few, many)]
    assert [len(part) for part in samples] == [4, 7]
    assert samples[0] == samples[1][:4]


def test_the_webdataset_library_reads_the_tars(tmp_path):
    tars = draw_scenes(tmp_path, 4, 1, SMALL)
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"scene-{index:06d}" for index in range(4)]
    for sample in samples:
        assert list(sample["png"].size) == sample["json"]["size"]
        assert sample["txt"].endswith(".")


def test_our_own_reader_finds_picture_and_caption(tmp_path):
    (tar,) = draw_scenes(tmp_path, 1, 1, SMALL)
    (sample,) = stream_samples(tar)
    assert {extension: sample.members[extension] for extension in ("png", "txt", "json")} == draw_scene(1, 0, SMALL)[1]
    assert sample.caption() == sample.members["txt"].decode()


def test_paired_scenes_hold_the_truth_as_pairs_and_are_else_the_same(tmp_path):
    main([str(tmp_path / "paired"), "--count", "3", "--size", "48", "--paired"])
    draw_scenes(tmp_path / "plain", 3, 0, SceneSettings(size=48))
    paired, plain = (list(stream_samples(str(tmp_path / name / "scenes-000000.tar"))) for name in ("paired", "plain"))
    for sample, same in zip(paired, plain, strict=True):
        record = PairRecord.from_bytes(sample.members.pop("pairs.json"), sample.caption(), sample.key)
        assert sample == same
        truth = json.loads(sample.members["json"])
        assert [record.regions[pair.region].box for pair in record.pairs] == [
            tuple(truth["objects"][sentence["object"]]["box"])
            for sentence in truth["sentences"]
            if sentence["object"] is not None
        ]
        assert [record.sentences[pair.sentence] for pair in record.pairs] == [
            (sentence["start"], sentence["end"]) for sentence in truth["sentences"] if sentence["object"] is not None
        ]


def test_rerunning_draws_only_what_is_missing(tmp_path):
    first, second = draw_scenes(tmp_path, 6, 1, SMALL)
    before = content(tmp_path)
    kept_since = (tmp_path / "scenes-000000.tar").stat().st_mtime_ns
    (tmp_path / "scenes-000001.tar").unlink()
    assert draw_scenes(tmp_path, 6, 1, SMALL) == [first, second]
    assert content(tmp_path) == before
    assert (tmp_path / "scenes-000000.tar").stat().st_mtime_ns == kept_since


@pytest.mark.parametrize(
    ("count", "seed", "changed"),
    [(5, 1, SMALL), (4, 2, SMALL), (4, 1, SceneSettings(shard_size=3, size=48, short=True))],
)
def test_a_folder_with_scenes_of_other_settings_is_refused_with_the_difference(tmp_path, count, seed, changed):
    draw_scenes(tmp_path, 4, 1, SMALL)
    before = content(tmp_path)
    with pytest.raises(
        StageError, match=r"other settings .*(count 4, now 5|seed 1, now 2|short False, now True)[;)].*another OUT"
    ):
        draw_scenes(tmp_path, count, seed, changed)
    assert content(tmp_path) == before


def test_tars_of_unknown_settings_are_refused(tmp_path):
    draw_scenes(tmp_path, 1, 1, SMALL)
    (tmp_path / "scenes.json").unlink()
    with pytest.raises(StageError, match=r"no scenes\.json"):
        draw_scenes(tmp_path, 1, 1, SMALL)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_an_unreadable_settings_file_is_refused(tmp_path, text):
    (tmp_path / "scenes.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StageError, match=r"scenes\.json"):
        draw_scenes(tmp_path, 1, 1, SMALL)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "taken").write_text("not a folder")
    with pytest.raises(StageError, match="another OUT"):
        draw_scenes(tmp_path / "taken", 1, 1, SMALL)


def test_the_settings_are_recorded(tmp_path):
    draw_scenes(tmp_path, 2, 1, SMALL)
    recorded = json.loads((tmp_path / "scenes.json").read_text())
    assert recorded | {"count": 2, "seed": 1, "shard_size": 3, "size": 48, "short": False} == recorded


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "count must be at least 1"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--min-objects", "5", "--max-objects", "4"], "min_objects <= max_objects"),
        (["--max-objects", "10"], "<= 9"),
        (["--min-objects", "0"], "1 <= min_objects"),
        (["--size", "8"], "between 32 and 4096"),
        (["--shard-size", "0"], "shard_size must be at least 1"),
        (["--crops", "1.5"], "crops must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        main([str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_short_captions_of_one_object_come_from_the_command_line(tmp_path, capsys):
    flags = ["--count", "3", "--seed", "1", "--size", "48", "--short", "--crops", "1"]
    main([str(tmp_path), *flags])
    assert "3 scenes in 1 tars" in capsys.readouterr().out
    captions = [sample.caption() for sample in stream_samples(str(tmp_path / "scenes-000000.tar"))]
    assert [caption.count(".") for caption in captions] == [1, 1, 1]


def test_the_module_runs_and_shows_an_error_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "goal_ray.scenes", str(tmp_path), "--count", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "count must be at least 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_teaches_with_defaults_and_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert "default: 250" in shown
    assert "goal-ray scenes scenes/train --count 1000" in shown
