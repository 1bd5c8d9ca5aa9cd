"""`shards make` of COCO captions."""

import json

from shard_inputs import PNG, make, put, samples_in, skipped


def coco(folder, images, annotations):
    """Writes a COCO file with its pictures in `train/`."""
    names = {
        image["file_name"]: PNG for image in images if image.get("file_name") and "missing" not in image["file_name"]
    }
    tree = json.dumps({"info": {}, "images": images, "annotations": annotations})
    return put(folder, {"captions.json": tree, **{f"train/{name}": data for name, data in names.items()}})


def test_captions_of_one_coco_image_are_joined_into_one_long_caption(tmp_path):
    folder = coco(
        tmp_path / "coco",
        [{"id": 7, "file_name": "b.jpg", "license": 3}, {"id": 3, "file_name": "a.jpg"}],
        [
            {"image_id": 3, "caption": "One only, as it is "},
            {"image_id": 7, "caption": "A man rides "},
            {"image_id": 7, "caption": "Two people."},
            {"image_id": 7, "caption": ""},
            {"image_id": 7, "caption": "A horse"},
        ],
    )
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    made = samples_in(tmp_path / "out")
    assert [members["txt"] for members in made.values()] == [
        b"A man rides. Two people. A horse.",
        b"One only, as it is ",
    ]
    assert json.loads(made["b"]["json"]) == {
        "id": 7,
        "license": 3,
        "captions": ["A man rides ", "Two people.", "", "A horse"],
    }
    make(folder / "captions.json", tmp_path / "first", images=str(folder / "train"), captions="first")
    assert samples_in(tmp_path / "first")["b"]["txt"] == b"A man rides "


def test_coco_images_without_captions_and_annotations_without_images_are_listed(tmp_path):
    images = [
        {"id": 1, "file_name": "a.jpg"},
        {"id": 2, "file_name": "b.jpg"},
        {"id": 3, "file_name": "missing.jpg"},
        {"id": 4},
    ]
    annotations = [{"image_id": 1, "caption": "x"}, {"image_id": 3, "caption": "x"}, {"image_id": 99, "caption": "x"}]
    folder = coco(tmp_path / "coco", images, annotations)
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    assert list(samples_in(tmp_path / "out")) == ["a"]
    expected = [("b", "no caption"), ("missing", "unreadable"), ("", "bad row"), ("", "no picture")]
    assert skipped(tmp_path / "out") == expected


def test_ids_that_can_name_nothing_are_listed(tmp_path):
    images = [{"id": 1, "file_name": "a.jpg"}, {"id": [2], "file_name": "b.jpg"}]
    images += [{"id": None, "file_name": "c.jpg"}, {"file_name": "d.jpg"}]
    annotations = [{"image_id": 1.0, "caption": "x"}, {"image_id": {"no": 1}, "caption": "y"}]
    annotations += [{"image_id": None, "caption": "x"}, {"caption": "y"}]
    folder = coco(tmp_path / "coco", images, annotations)
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    assert list(samples_in(tmp_path / "out")) == ["a"]
    assert skipped(tmp_path / "out") == [("", "bad row")] * 6


def test_captions_that_are_no_text_are_listed_and_numbers_are_text(tmp_path):
    told = [2024, 1.5, None, float("nan"), False, {"en": "x"}, ["x"]]
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(len(told))]
    annotations = [{"image_id": number, "caption": caption} for number, caption in enumerate(told)]
    folder = coco(tmp_path / "coco", images, annotations)
    make(folder / "captions.json", tmp_path / "out", images=str(folder / "train"))
    assert [members["txt"] for members in samples_in(tmp_path / "out").values()] == [b"2024", b"1.5"]
    assert [kind for _, kind in skipped(tmp_path / "out")] == ["no caption"] * 2 + ["bad caption"] * 3
