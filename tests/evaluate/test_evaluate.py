"""Evaluation as a whole: real tars, a tiny real model, numbers against plain open_clip and NumPy."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from goal_ray.errors import StageError
from goal_ray.evaluate.__main__ import main
from goal_ray.evaluate.run import evaluate, print_table, resolve_model, result_place
from goal_ray.metric_names import DIRECTIONS
from goal_ray.retrieval import retrieval_metrics
from goal_ray.settings import OPEN_CLIP_WEIGHTS
from goal_ray.tar_places import index_shard
from goal_ray.tars import stream_samples, write_tar


def png(colour: str, size: tuple[int, int] = (20, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def pair(colour: str, caption: str) -> dict[str, bytes]:
    return {"png": png(colour), "txt": caption.encode()}


def metrics(result: dict) -> dict:
    return {name: result[name] for name in (*DIRECTIONS, "count", "pictures", "captions")}


def expected(model: str, tars: list[str]) -> dict:
    """The metrics by plain open_clip and a full float64 similarity matrix, each sample a pair."""
    clip, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{model}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model}")
    samples = [sample.members for tar in tars for sample in stream_samples(tar)]
    stored, captions = [members["png"] for members in samples], [members["txt"].decode() for members in samples]
    pictures, texts = list(dict.fromkeys(stored)), list(dict.fromkeys(captions))
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures])
        image = clip.encode_image(pixels, normalize=True).double().numpy()
        text = clip.encode_text(tokenizer(texts), normalize=True).double().numpy()
    similarity = text @ image.T
    belongs = np.zeros(similarity.shape, bool)
    belongs[[texts.index(caption) for caption in captions], [pictures.index(data) for data in stored]] = True

    def summary(similarity: np.ndarray, belongs: np.ndarray) -> dict:
        # 1e-6 is the rounding of the model's float32: similarities that close are a tie.
        best = np.where(belongs, similarity, -2).max(axis=1, keepdims=True)
        rank = (similarity >= best - 1e-6).sum(axis=1)
        recalls = {f"R@{k}": pytest.approx(100 * np.mean(rank <= k)) for k in (1, 5, 25, 50) if k < similarity.shape[1]}
        places = [
            (row >= row[right][:, None] - 1e-6).sum(axis=1) for row, right in zip(similarity, belongs, strict=True)
        ]
        precision = [np.mean(np.arange(1, len(each) + 1) / np.sort(each)) for each in places]
        return {**recalls, "mAP": pytest.approx(100 * np.mean(precision)), "median_rank": float(np.median(rank))}

    return {
        "text_to_image": summary(similarity, belongs),
        "image_to_text": summary(similarity.T, belongs.T),
        "count": int(belongs.sum()),
        "pictures": len(pictures),
        "captions": len(texts),
    }


def test_metrics_are_those_of_plain_open_clip_and_numpy(model, scenes):
    result = evaluate(model, str(scenes))
    assert metrics(result) == expected(model, sorted(map(str, scenes.glob("*.tar"))))
    assert list(result["text_to_image"]) == ["R@1", "R@5", "R@25", "mAP", "median_rank"]
    assert result["skipped"] == []


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_the_batch_size_changes_nothing(model, scenes, batch):
    assert metrics(evaluate(model, str(scenes), batch=batch)) == metrics(evaluate(model, str(scenes)))


def test_the_order_of_the_shards_changes_nothing(model, scenes, tmp_path):
    for number, tar in enumerate(sorted(scenes.glob("*.tar"), reverse=True)):
        shutil.copy(tar, tmp_path / f"{number}.tar")
    assert metrics(evaluate(model, str(tmp_path))) == metrics(evaluate(model, str(scenes)))


def test_a_shard_that_stands_there_twice_counts_once(model, scenes, tmp_path):
    for tar in scenes.glob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    shutil.copy(scenes / "scenes-000001.tar", tmp_path / "copy.tar")
    result = evaluate(model, str(tmp_path))
    assert metrics(result) == metrics(evaluate(model, str(scenes)))
    assert result["repeated"] == 10


def test_several_captions_of_a_picture_and_pictures_of_a_caption_are_all_right(model, tmp_path):
    colours = ("red", "lime", "blue", "black", "white", "gold")
    url = str(tmp_path / "a.tar")
    samples = [pair(colour, f"It is {colour}.") for colour in colours]
    samples += [pair("red", "The colour of blood."), pair("gold", "It is blue."), pair("lime", "Grass.")]
    write_tar(url, ((str(number), members) for number, members in enumerate(samples)))
    result = evaluate(model, url)
    assert (result["count"], result["pictures"], result["captions"], result["repeated"]) == (9, 6, 8, 0)
    assert metrics(result) == expected(model, [url])


def test_equal_keys_in_two_shards_are_two_samples(model, tmp_path):
    write_tar(str(tmp_path / "a.tar"), iter([("0", pair("red", "Red.")), ("1", pair("lime", "Green."))]))
    write_tar(str(tmp_path / "b.tar"), iter([("0", pair("blue", "Blue.")), ("1", pair("gold", "Gold."))]))
    assert evaluate(model, str(tmp_path))["count"] == 4


@pytest.fixture
def damaged(scenes, tmp_path) -> Path:
    """Three tars: a good one of 10, one cut after 4 whole samples, one of 2 good samples and 4 bad ones."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    shutil.copy(scenes / "scenes-000000.tar", folder / "a.tar")
    offset, _ = index_shard(str(scenes / "scenes-000001.tar"))[4].members["png"]
    (folder / "b.tar").write_bytes((scenes / "scenes-000001.tar").read_bytes()[: offset + 10])
    samples = {
        "good": pair("red", "Red."),
        "no-picture": {"txt": b"Nothing."},
        "no-caption": {"png": png("lime")},
        "half-picture": {"png": png("blue")[:50], "txt": b"Blue."},
        "latin": {"png": png("gold"), "txt": b"Caf\xe9"},
        "fine": pair("black", "Black."),
    }
    write_tar(str(folder / "c.tar"), iter(samples.items()))
    return folder


def test_bad_samples_are_skipped_and_listed_with_the_reason(model, damaged):
    result = evaluate(model, str(damaged), max_bad_share=0.5)
    assert result["count"] == 10 + 4 + 2
    found = {(Path(record["shard"]).name, record["key"]): record["reason"] for record in result["skipped"]}
    words = {
        ("b.tar", ""): "corrupt or truncated tar",
        ("c.tar", "no-picture"): "has no picture",
        ("c.tar", "no-caption"): "has no .txt caption",
        ("c.tar", "half-picture"): "PNG",
        ("c.tar", "latin"): "not UTF-8",
    }
    assert list(found) == list(words)
    assert all(word in found[name] for name, word in words.items())


def test_more_bad_samples_than_allowed_fail_the_evaluation(model, damaged, tmp_path):
    # 5 of 21: a damaged tar counts as one.
    evaluate(model, str(damaged), max_bad_share=5 / 21)
    with pytest.raises(
        StageError, match=r"5 of 21 samples could not be used .*0\.23.*b\.tar: corrupt.*--max-bad-share"
    ):
        evaluate(model, str(damaged), max_bad_share=0.23, out=str(tmp_path / "x.json"))
    assert not (tmp_path / "x.json").exists()


def test_shards_without_one_usable_sample_are_refused(model, tmp_path):
    write_tar(str(tmp_path / "a.tar"), iter([("7", {"txt": b"Nothing."})]))
    with pytest.raises(StageError, match=r"no usable sample in 1 shards; .*a\.tar: '7' \(decode\): sample '7'"):
        evaluate(model, str(tmp_path), max_bad_share=1)


def test_the_most_frequent_problem_is_told_with_its_share_and_one_example(model, tmp_path):
    broken = {
        "a": {"png": png("red")},
        **{f"n{number}": {"png": b"%d junk" % number, "txt": b"x"} for number in range(3)},
    }
    write_tar(str(tmp_path / "a.tar"), iter(broken.items()))
    example = r"for example .*a\.tar: 'n0' \(decode\): not a JPEG, PNG or WebP picture"
    with pytest.raises(StageError, match=rf"no usable sample .*; the most frequent problem \(3 of 4\), {example}"):
        evaluate(model, str(tmp_path))
    write_tar(str(tmp_path / "b.tar"), iter([("good", pair("red", "Red."))]))
    with pytest.raises(StageError, match=rf"^4 of 5 .*; the most frequent problem \(3 of 4\), {example}"):
        evaluate(model, str(tmp_path))


def test_a_run_folder_stands_for_its_newest_complete_checkpoint(run):
    assert resolve_model(str(run), None) == str(run / "checkpoints" / "step-00000010")


def test_a_runs_numbers_go_into_its_folder_and_onto_the_screen(run, scenes, capsys):
    main([str(run), f"{scenes}/scenes-000000.tar"])
    place = run / "evaluation" / "scenes-000000.json"
    result = json.loads(place.read_text())
    printed = capsys.readouterr().out
    assert "10 pairs of 10 pictures and 10 captions; 0 skipped; on cpu in " in printed
    assert printed.splitlines()[1].split() == ["R@1", "R@5", "mAP", "median"]
    for line, direction in zip(printed.splitlines()[2:4], DIRECTIONS, strict=True):
        assert line.startswith(direction.replace("_to_", " → "))
        assert [float(number) for number in line.split()[3:]] == [round(x, 2) for x in result[direction].values()]
    assert printed.endswith(f"written to {place}\n")


def test_the_table_of_all_metrics_fits_80_columns(capsys):
    found = dict.fromkeys(("R@1", "R@5", "R@25", "R@50", "mAP"), 100.0) | {"median_rank": 123456.5}
    both = dict.fromkeys(DIRECTIONS, found)
    counts = {"count": 5000, "pictures": 5000, "captions": 5000, "repeated": 0, "skipped": []}
    print_table({**both, "local": both, "joint": both, **counts, "device": "cpu", "seconds": 1.0})
    head, *table = capsys.readouterr().out.splitlines()
    assert len(table) == 7
    assert max(map(len, (head, *table))) <= 80
    assert all(line.endswith("   100.00" * 5 + " 123456.5") for line in table[1:])


def test_the_table_has_the_recalls_that_only_a_larger_ranking_has(capsys):
    few, many = ({"R@1": 50.0, **more, "mAP": 50.0, "median_rank": 1.5} for more in ({}, {"R@5": 75.0}))
    small, large = dict.fromkeys(DIRECTIONS, few), dict.fromkeys(DIRECTIONS, many)
    counts = {"count": 4, "pictures": 4, "captions": 4, "repeated": 0, "skipped": []}
    print_table({**small, "local": small, "joint": large, **counts, "device": "cpu", "seconds": 1.0})
    _, head, first, *_, last = capsys.readouterr().out.splitlines()
    assert head.split() == ["R@1", "R@5", "mAP", "median"]
    assert first.split()[3:] == ["50.00", "–", "50.00", "1.5"]
    assert last.split()[4:] == ["50.00", "75.00", "50.00", "1.5"]


@pytest.mark.parametrize(
    ("shards", "name"),
    [
        ("docci/test/", "test"),
        ("docci/test.tar", "test"),
        ("s3://bucket/docci/test/*.tar", "test"),
        ("docci/test-{000..009}.tar", "test-_000..009"),
        ("*.tar", "shards"),
    ],
)
def test_the_default_file_is_named_after_the_shards(run, shards, name):
    assert result_place(str(run), shards, None) == str(run / "evaluation" / f"{name}.json")


def test_a_result_in_another_precision_leaves_that_in_fp32(run, scenes):
    for precision in ("fp32", "bf16"):
        evaluate(str(run), f"{scenes}/scenes-000000.tar", precision=precision)
    found = {path.name: json.loads(path.read_text())["precision"] for path in (run / "evaluation").iterdir()}
    assert found == {"scenes-000000.json": "fp32", "scenes-000000-bf16.json": "bf16"}


def test_results_of_other_shards_with_the_same_name_stay(run):
    first = Path(result_place(str(run), "docci/test", None))
    first.parent.mkdir()
    first.write_text('{"shards": "docci/test"}')
    second = Path(result_place(str(run), "dci/test", None))
    assert first.name == "test.json"
    assert second.name.startswith("test-")
    assert result_place(str(run), "docci/test", None) == str(first)
    second.write_text('{"shards": "dci/test"}')
    assert result_place(str(run), "dci/test", None) == str(second)


def test_out_names_another_place_and_bare_models_have_none(run, model, tmp_path, scenes, capsys):
    out = tmp_path / "deep" / "x.json"
    assert main([str(run), str(scenes), "--out", str(out)]) is None
    assert json.loads(out.read_text())["count"] == 30
    assert not (run / "evaluation").exists()
    assert result_place(model, str(scenes), None) is None
    assert f"written to {out}" in capsys.readouterr().out


def test_the_first_skipped_samples_are_shown_on_stderr(model, damaged, capsys):
    write_tar(str(damaged / "d.tar"), iter((str(n), {"txt": b"x"}) for n in range(3)))
    main([model, str(damaged), "--max-bad-share", "1"])
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(shown) == 6
    assert "b.tar: corrupt" in shown[0]
    assert shown[-1] == "skipped: 3 more; --out FILE lists them all"


def test_an_architecture_takes_weights_from_a_file(tiny_clip, model, scenes):
    result = evaluate(tiny_clip, str(scenes), weights=str(Path(model) / OPEN_CLIP_WEIGHTS))
    assert metrics(result) == metrics(evaluate(model, str(scenes)))


def test_a_gpu_too_full_to_rank_on_costs_no_embedding(model, scenes, monkeypatch):
    expected = evaluate(model, str(scenes))
    full = [torch.OutOfMemoryError("CUDA out of memory.")]

    def rank(*given, **named):
        if full:
            raise full.pop()
        return retrieval_metrics(*given, **named)

    monkeypatch.setattr("goal_ray.evaluate.run.retrieval_metrics", rank)
    assert metrics(evaluate(model, str(scenes))) == metrics(expected)
    assert not full


def test_the_precision_is_stored_with_the_numbers(model, scenes, tmp_path):
    main([model, str(scenes), "--precision", "bf16", "--out", str(tmp_path / "x.json")])
    result = json.loads((tmp_path / "x.json").read_text())
    assert (result["precision"], result["count"]) == ("bf16", 30)
