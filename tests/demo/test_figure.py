"""The figure of a README: pictures with their regions and sentences."""

from xml.etree import ElementTree

import pytest

from goal_ray.demo import figure
from goal_ray.errors import ConfigError, StageError
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.shard_urls import expand_shards
from goal_ray.tars import stream_samples

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def paired(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figure")
    draw_scenes(folder, 3, 0, SceneSettings(size=64, shard_size=3, paired=True))
    return folder


def test_the_first_samples_are_drawn_with_every_sentence_in_full(paired, tmp_path):
    figure.main([str(paired), str(tmp_path / "pairs.svg")])
    root = ElementTree.parse(tmp_path / "pairs.svg").getroot()
    images = list(root.iter(f"{SVG}image"))
    assert len(images) == 2
    assert all(image.get("href").startswith("data:image/jpeg;base64,") for image in images)
    words = " ".join("".join(root.itertext()).split())
    samples = list(stream_samples(expand_shards(str(paired))[0]))
    for sample in samples[:2]:
        assert all(word in words for word in sample.caption().split())
    assert float(root.get("viewBox").split()[3]) > 2 * figure.GAP_PX


def test_nothing_to_draw_is_an_error_that_says_what_to_give(paired, tmp_path):
    with pytest.raises(ConfigError, match="--samples must be at least 1, not 0"):
        figure.main([str(paired), str(tmp_path / "pairs.svg"), "--samples", "0"])
    draw_scenes(tmp_path / "plain", 1, 0, SceneSettings(size=64))
    with pytest.raises(StageError, match="no pairs in its first samples; give tars that `goal-ray lism` wrote"):
        figure.main([str(tmp_path / "plain"), str(tmp_path / "pairs.svg")])
    assert not (tmp_path / "pairs.svg").exists()
