"""Evaluation of sentences and regions, and of both with captions and pictures."""

import io
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from goal_ray.errors import ConfigError, StageError
from goal_ray.evaluate.__main__ import main
from goal_ray.evaluate.run import evaluate
from goal_ray.pairs import Pair, PairRecord, Region, best_pairs
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
    with pytest.raises(
        StageError,
        match=r"for example \S+scenes-000000\.tar: sample '\S+' has no \.pairs\.json; run .*, or leave out --pairs",
    ):
        evaluate(model, str(scenes), pairs=1)


def alike(path: Path, boxes: list[tuple], size=(60, 40), recorded=(60, 40)) -> None:
    """Six pictures, each with a caption of a sentence for every box."""
    rng = np.random.default_rng(0)

    def samples():
        for number in range(6):
            sentences = [f"Picture {number} has part {at}." for at in range(len(boxes))]
            caption = "".join(f"{sentence}\n" for sentence in sentences)
            ends = np.cumsum([len(sentence) + 1 for sentence in sentences]).tolist()
            spans = tuple((end - len(sentence) - 1, end - 1) for sentence, end in zip(sentences, ends, strict=True))
            regions = tuple(Region(box, 1.0, "sam") for box in boxes)
            pairs = tuple(Pair(at, at, 0.5) for at in range(len(boxes)))
            buffer = io.BytesIO()
            pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
            Image.fromarray(pixels).save(buffer, "PNG")
            record = PairRecord(recorded, spans, regions, pairs, {}).to_bytes()
            yield f"{number}", {"png": buffer.getvalue(), "txt": caption.encode(), "pairs.json": record}

    write_tar(str(path), samples())


def test_a_region_that_is_the_whole_picture_is_that_picture(model, tmp_path):
    alike(tmp_path / "a.tar", [(0.0, 0.0, 60.0, 40.0)])
    result = evaluate(model, str(tmp_path), pairs=1)
    assert numbers(result["joint"]) == numbers(result["local"]) == numbers(result)
    assert result["count"] == 6


def test_regions_of_the_same_pixels_are_one(model, tmp_path):
    box = (10.2, 10.0, 30.5, 39.9)
    results = {}
    for name, other in [("same", box), ("alike", (10.4, 10.3, 30.2, 39.2)), ("other", (9.9, 10.0, 30.5, 39.9))]:
        alike(tmp_path / f"{name}.tar", [box, other])
        results[name] = evaluate(model, str(tmp_path / f"{name}.tar"), pairs=2)
    assert results["alike"]["local"] == results["same"]["local"]
    assert results["alike"]["joint"] == results["same"]["joint"]
    assert results["other"]["local"] != results["same"]["local"]


def test_pairs_for_a_picture_of_another_size_are_not_measured(model, tmp_path):
    alike(tmp_path / "a.tar", [(50.0, 40.0, 80.0, 60.0)], recorded=(80, 60))
    with pytest.raises(StageError, match=r"pairs are for \(80, 60\) pixels, the picture has \(60, 40\)"):
        evaluate(model, str(tmp_path), pairs=1)


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
