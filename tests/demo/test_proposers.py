"""The comparison of region proposers, on a few scenes and a tiny model."""

import json

import pytest

from goal_ray.demo import detector, figure, proposers
from goal_ray.demo.accuracy import lism_accuracy
from goal_ray.scenes.run import SceneSettings, draw_scenes


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_every_proposer_gets_a_row_with_its_accuracy_and_its_speed(tiny_clip, tmp_path, capsys):
    draw_scenes(tmp_path / "scenes", 3, 0, SceneSettings(size=64))
    both = ["--proposer", "name=grid levels=[2]", "--proposer", "name=grid levels=[2,3]"]
    proposers.main([str(tmp_path / "scenes"), str(tmp_path / "out"), *both, f"matcher.model.name={tiny_clip}"])
    rows = json.loads((tmp_path / "out" / "proposers.json").read_text())
    assert [row["regions_per_image"] for row in rows] == [4, 13]
    # The second grid has the cells of the first, and more.
    assert rows[0]["object_recall"] <= rows[1]["object_recall"]
    for number, row in enumerate(rows):
        assert row["images"] == 3
        assert row["images_per_s"] > 0
        assert row["right_region"] == lism_accuracy(str(tmp_path / "out" / f"{number}-grid")).right_region
    printed = capsys.readouterr().out
    assert f"{100 * rows[1]['object_recall']:.1f} %" in printed
    assert "name=grid levels=[2,3]" in printed


@pytest.mark.parametrize("tool", [detector, figure, proposers])
def test_a_tool_of_the_demo_says_how_it_is_called(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: python -m {tool.__name__} [-h]")
