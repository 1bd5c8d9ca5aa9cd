"""What an output folder is made with, and matchers that would pair at random."""

import pytest

from goal_ray.config import load_config
from goal_ray.errors import ModelError, StageError
from goal_ray.lism.config import LismConfig
from goal_ray.lism.run import check_matcher, check_settings, run_lism
from goal_ray.settings import ModelConfig


def config(*settings):
    return load_config(LismConfig, overrides=list(settings))


def test_settings_may_change_until_something_was_done_with_them(tmp_path):
    check_settings(str(tmp_path), config())
    check_settings(str(tmp_path), config("min_area=0.02"))
    assert "min_area: 0.02" in (tmp_path / "config.yaml").read_text()
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "a.tar.json").write_text("{}")
    check_settings(str(tmp_path), config("min_area=0.02"))
    with pytest.raises(StageError, match=r"other settings \(min_area; see .*settings.json"):
        check_settings(str(tmp_path), config())


@pytest.mark.parametrize("file", ["config.yaml", "a.tar"])
def test_a_folder_of_another_origin_is_left_as_it_is(tmp_path, file):
    (tmp_path / file).write_text("another stage's")
    with pytest.raises(StageError, match=rf"holds {file} but no settings.json"):
        check_settings(str(tmp_path), config())
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "another stage's"


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ('{"editor.fontSize": 12}', r"lacks proposer, .*another program"),
        ("[]", r"lacks proposer, .*another program"),
        ("// mine", "not JSON"),
    ],
)
def test_the_settings_file_of_another_program_is_left_as_it_is(tmp_path, stored, words):
    for name in ("settings.json", "config.yaml"):
        (tmp_path / name).write_text(stored)
    with pytest.raises(StageError, match=rf"settings\.json: {words}.*use another OUT"):
        check_settings(str(tmp_path), config())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "settings.json": stored,
        "config.yaml": stored,
    }


def test_a_place_where_no_folder_can_be_made_is_refused(tmp_path, tiny_clip):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").write_bytes(b"")
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match="file/out: cannot be used as a folder for pairs"):
        run_lism(
            str(tmp_path / "shards"),
            str(tmp_path / "file" / "out"),
            config(f"matcher.model.name={tiny_clip}", "matcher.model.weights=null"),
        )


def test_an_architecture_without_weights_is_no_matcher(tmp_path, tiny_clip):
    with pytest.raises(StageError, match=r"matcher.model.weights is empty"):
        check_matcher(ModelConfig("ViT-B-16"))
    with pytest.raises(ModelError, match=r"matcher.model.weights: 'openia' is no file"):
        check_matcher(ModelConfig("ViT-B-16", "openia"))
    assert check_matcher(ModelConfig("ViT-B-16", "openai")) == ""
    assert check_matcher(ModelConfig(str(tmp_path))) == ""  # a folder brings its own
    assert "random weights would be noise" in check_matcher(ModelConfig(tiny_clip))
