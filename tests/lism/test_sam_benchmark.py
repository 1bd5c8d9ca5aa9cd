"""The SAM benchmark as a command, on a tiny SAM; its timings mean nothing here."""

import json

import pytest
import torch
from PIL import Image
from tiny_sam import tiny_sam

from goal_ray.errors import GoalRayError
from goal_ray.lism.benchmark import main, matched


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("sam") / "tiny.pth"
    torch.save(tiny_sam().state_dict(), path)
    return path


def test_both_generators_are_measured_on_the_pictures_given(checkpoint, tmp_path, capsys):
    for name, colour in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (90, 60), colour).save(tmp_path / name)
    pictures = [str(tmp_path / name) for name in ("a.png", "b.png")]
    main([str(checkpoint), *pictures, "--points", "2", "--max-side", "64", "--out", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert [row["picture"] for row in result["pictures"]] == pictures
    assert [row["size"] for row in result["pictures"]] == [[64, 43]] * 2
    for row in result["pictures"]:
        assert row["ratio"] == pytest.approx(row["seconds"]["official"] / row["seconds"]["ours"])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_matches_are_counted_from_both_sides():
    official = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    ours = torch.tensor([[0.0, 0, 10, 9.5], [0, 0, 5, 5], [60, 60, 70, 70]])
    assert matched(official, ours) == {
        "official": 2,
        "ours": 3,
        "official_matched": 0.5,
        "ours_matched": pytest.approx(1 / 3),
    }
    nothing = torch.zeros(0, 4)
    assert (matched(nothing, nothing)["official_matched"], matched(official, nothing)["official_matched"]) == (1, 0)


def test_a_missing_checkpoint_and_a_wrong_precision_are_refused(checkpoint, tmp_path):
    with pytest.raises(GoalRayError, match=r"no checkpoint at .*segment_anything"):
        main([str(tmp_path / "none.pth")])
    with pytest.raises(GoalRayError, match="precision"):
        main([str(checkpoint), "--precision", "fp8"])
