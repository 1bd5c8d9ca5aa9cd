"""`shards inspect`: counts from headers, and lengths and sizes of a sample."""

import io
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image
from shard_inputs import CAPTION, good, picture, write_members

from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.shards import inspect as inspecting
from goal_ray.shards.inspect import inspect_shards, print_contents


@pytest.fixture
def shards(tmp_path):
    """A paired tar of 3 samples, one of 4 samples with faults, and a damaged one."""
    draw_scenes(tmp_path / "scenes", 3, 0, SceneSettings(size=48, paired=True))
    segment = b"\xff\xed" + (60_000).to_bytes(2, "big") + bytes(59_998)
    members = [
        ("turned.jpg", picture("JPEG", (30, 20), orientation=6)),
        ("turned.txt", b"One two three."),
        ("late.jpg", b"\xff\xd8" + 2 * segment + picture("JPEG", (40, 10))[2:]),
        ("late.txt", b"x" * 100),
        ("late.cls", b"1"),
        ("bad.png", b"nonsense"),
        ("bad.txt", b"\xff"),
        ("none.json", b"{}"),
    ]
    write_members(tmp_path / "scenes" / "t.tar", members)
    write_members(tmp_path / "scenes" / "x.tar", good("a"))
    (tmp_path / "scenes" / "x.tar").write_bytes((tmp_path / "scenes" / "x.tar").read_bytes()[:900])
    return tmp_path / "scenes"


def test_samples_bytes_and_members_are_counted_per_tar_and_in_total(shards):
    found = inspect_shards(str(shards), workers=1)
    drawn, odd, damaged = found["shards"]
    assert drawn["shard"] == "scenes-000000.tar"
    assert (drawn["samples"], drawn["paired"]) == (3, 3)
    assert drawn["members"] == {"png": 3, "txt": 3, "json": 3, "pairs.json": 3}
    assert drawn["size_bytes"] == (shards / "scenes-000000.tar").stat().st_size
    assert (odd["samples"], odd["paired"]) == (4, 0)
    assert odd["members"] == {"jpg": 2, "txt": 3, "cls": 1, "png": 1, "json": 1}
    assert damaged["damage"].startswith("corrupt or truncated tar")
    assert damaged["samples"] == 0
    total = found["total"]
    assert (total["shards"], total["damaged"], total["samples"], total["paired"]) == (3, 1, 7, 3)
    assert total["members"]["txt"] == 6


def test_captions_and_upright_picture_sizes_are_measured(shards):
    found = inspect_shards(str(shards / "t.tar"), workers=1)
    assert found["sampled"] == 4
    chars = {"count": 2, "min": 14, "p5": 18.3, "median": 57, "mean": 57, "p95": 95.7, "max": 100}
    assert found["caption_chars"] == pytest.approx(chars)
    assert (found["caption_words"]["min"], found["caption_words"]["max"]) == (1, 3)
    assert (found["picture_width_px"]["min"], found["picture_width_px"]["max"]) == (20, 40)
    assert (found["picture_height_px"]["min"], found["picture_height_px"]["max"]) == (10, 30)


def test_a_healthy_webp_is_not_read_beyond_its_first_bytes(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "WEBP", lossless=True)
    assert len(buffer.getvalue()) > inspecting._HEADER_BYTES
    write_members(tmp_path / "w.tar", [("a.webp", buffer.getvalue()), ("a.txt", b"Noise.")])
    with patch.object(inspecting, "read_range", wraps=inspecting.read_range) as read:
        found = inspect_shards(str(tmp_path), workers=1)
    assert found["picture_width_px"]["max"] == 400
    assert max(call.args[2] for call in read.call_args_list) == inspecting._HEADER_BYTES


@pytest.mark.parametrize("size", [(300, 20), (300, 200)], ids=["short", "long"])
def test_a_png_that_is_turned_by_exif_behind_its_pixels_is_measured_upright(tmp_path, size):
    data = picture("PNG", size, orientation=6)
    at = data.index(b"eXIf") - 4
    end = at + 12 + int.from_bytes(data[at : at + 4], "big")
    late = data[:at] + data[end:-12] + data[at:end] + data[-12:]
    write_members(tmp_path / "p.tar", [("a.png", late), ("a.txt", b"Noise.")])
    found = inspect_shards(str(tmp_path), workers=1)
    assert (found["picture_width_px"]["max"], found["picture_height_px"]["max"]) == size[::-1]


def test_no_more_than_a_sample_is_read_of_many_and_the_same_each_time(tmp_path):
    for name in "ab":
        write_members(tmp_path / f"{name}.tar", [member for n in range(20) for member in good(f"{name}{n:02}")])
    with patch.object(inspecting, "_SAMPLE", 10):
        first, second = (inspect_shards(str(tmp_path), workers=1) for _ in range(2))
    assert first == second
    assert first["sampled"] == first["caption_chars"]["count"] == 10
    assert first["total"]["samples"] == 40
    assert first["caption_chars"]["max"] == len(CAPTION)


def test_the_table_names_every_tar_its_damage_and_some_examples(shards, capsys):
    print_contents(inspect_shards(str(shards), workers=1))
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split() == ["shard", "samples", "MB", "paired", "members"]
    assert lines[1].split()[:2] == ["scenes-000000.tar", "3"]
    assert "DAMAGED: corrupt or truncated tar" in lines[3]
    assert lines[4].split()[:3] == ["all", "3", "7"]
    assert "1 damaged" in lines[5]
    assert "of 7 samples, all:" in printed
    assert "\nscene-000000\n  " in printed


def test_shards_without_any_caption_or_picture_are_shown_too(tmp_path, capsys):
    write_members(tmp_path / "x.tar", [("a.json", b"{}")])
    print_contents(inspect_shards(str(tmp_path), workers=1))
    assert "json 1" in capsys.readouterr().out
