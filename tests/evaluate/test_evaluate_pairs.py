"""Evaluation of sentences and regions, and of both with captions and pictures."""

import io
import math
import shutil
from pathlib import Path

import pytest
from PIL import Image

from goal_ray.errors import ConfigError, StageError
from goal_ray.evaluate.__main__ import main
from goal_ray.evaluate.run import evaluate
from goal_ray.pairs import PairRecord, best_pairs
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.tars import stream_samples, write_tar


def numbers(result: dict, *more: str) -> dict:
    """The metrics of one ranking, and what else is named."""
    return {name: result[name] for name in ("text_to_image", "image_to_text", "count", *more)}


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> Path:
    """Twelve scenes with the pairs of the truth."""
    folder = tmp_path_factory.mktemp("paired")
    draw_scenes(folder, 12, 5, SceneSettings(shard_size=5, size=48, paired=True))
    return folder


@pytest.mark.parametrize("pairs", [1, 3, 99])
def test_local_and_joint_metrics_are_those_of_shards_of_crops_and_sentences(model, paired, tmp_path, pairs):
    def crops():
        for tar in sorted(paired.glob("*.tar")):
            for sample in stream_samples(str(tar)):
                image, caption = Image.open(io.BytesIO(sample.image_bytes())), sample.caption()
                record = PairRecord.from_bytes(sample.members["pairs.json"], caption, "")
                for number, found in enumerate(best_pairs(record, pairs)):
                    start, end = record.sentences[found.sentence]
                    buffer = io.BytesIO()
                    x0, y0, x1, y1 = record.regions[found.region].box
                    image.crop((math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1))).save(buffer, "PNG")
                    yield f"{sample.key}-{number}", {"png": buffer.getvalue(), "txt": caption[start:end].encode()}

    write_tar(str(tmp_path / "crops.tar"), crops())
    result, local = evaluate(model, str(paired), pairs=pairs), evaluate(model, str(tmp_path / "crops.tar"))
    assert numbers(result["local"]) == numbers(local)
    for tar in paired.glob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    joint = evaluate(model, str(tmp_path))
    assert numbers(result["joint"]) == numbers(joint)
    whole = evaluate(model, str(paired))
    assert numbers(result, "pictures", "captions") == numbers(whole, "pictures", "captions")


def test_pairs_are_printed_beside_the_whole(model, paired, capsys):
    main([model, str(paired), "--pairs", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("   ")[0].strip() for line in lines[2:8]] == [
        "text → image",
        "image → text",
        "sentence → region",
        "region → sentence",
        "joint, text → image",
        "joint, image → text",
    ]


def test_pairs_of_shards_without_pairs_are_refused_with_the_remedy(model, scenes):
    with pytest.raises(StageError, match=r"no pairs.json; run `goal-ray lism` on the shards, or leave out --pairs"):
        evaluate(model, str(scenes), pairs=1)


def test_samples_without_any_pair_do_not_count_as_measured(model, tmp_path):
    nothing = PairRecord((20, 10), (), (), (), {}).to_bytes()
    picture = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(picture, "PNG")
    members = {"png": picture.getvalue(), "txt": b"It is red.", "pairs.json": nothing}
    write_tar(str(tmp_path / "a.tar"), iter([("7", members)]))
    with pytest.raises(StageError, match="no sample has a pair of sentence and region; leave out --pairs"):
        evaluate(model, str(tmp_path), pairs=1)


def test_a_negative_number_of_pairs_is_refused(model, scenes):
    with pytest.raises(ConfigError, match="pairs must not be negative"):
        evaluate(model, str(scenes), pairs=-1)
