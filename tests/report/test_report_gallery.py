"""Pictures with their regions and sentences."""

import json
import re
import shutil

import pytest
from html_page import read_page, section
from paired_samples import LEFT, WHOLE, encoded, sample, write_samples

from goal_ray.pages.pictures import VIEW_SIDE
from goal_ray.pairs import Pair, Region
from goal_ray.report.gallery import draw_gallery
from goal_ray.report.run import write_report
from goal_ray.tars import Sample, stream_samples


def articles(page):
    return section(page, "gallery").find("article")


def test_every_sentence_has_the_colour_and_number_of_its_region(make_run, paired):
    page = read_page(write_report([str(make_run())]).url)
    samples = {each.key: each for tar in paired.glob("*.tar") for each in stream_samples(str(tar))}
    shown = articles(page)
    assert len(shown) == len(samples) == 6
    for article in shown:
        key = article.find("svg")[0].attributes["aria-label"]
        truth, caption = json.loads(samples[key].members["json"]), samples[key].caption()
        scale = VIEW_SIDE / max(truth["size"])
        drawn = {rect.attributes["stroke"]: rect.attributes for rect in article.find("rect", "edge")}
        numbers = dict(zip([c.attributes["fill"] for c in article.find("circle")], article.find("text"), strict=True))
        items = article.find("li")
        assert len(items) == len(truth["sentences"])
        for item, sentence in zip(items, truth["sentences"], strict=True):
            assert caption[sentence["start"] : sentence["end"]] in item.text
            if sentence["object"] is None:
                assert item.attributes["class"] == "whole"
                assert "whole image" in item.text
                continue
            its_colour = item.attributes["style"].removeprefix("--c: ")
            assert item.find("span", "badge")[0].text == numbers[its_colour].text
            x0, y0, x1, y1 = truth["objects"][sentence["object"]]["box"]
            box = [float(drawn[its_colour][name]) for name in ("x", "y", "width", "height")]
            assert box == pytest.approx([x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale], abs=0.1)


def test_the_similarity_stands_beside_the_sentence(make_run, tmp_path):
    tar = write_samples(tmp_path / "a.tar", sample("One.\nTwo.", [WHOLE, LEFT], [Pair(0, 1, 0.31), Pair(1, 0, -0.02)]))
    items = articles(read_page(write_report([str(make_run())], shards=tar).url))[0].find("li")
    assert [item.find("span", "similarity")[0].text for item in items] == ["0.310", "-0.020"]


def test_a_sentence_without_a_pair_is_marked(make_run, tmp_path):
    tar = write_samples(tmp_path / "a.tar", sample("One.\nTwo.", [WHOLE, LEFT], [Pair(0, 1, 0.3)]))
    items = articles(read_page(write_report([str(make_run())], shards=tar).url))[0].find("li")
    assert [item.attributes.get("class") for item in items] == [None, "unpaired"]
    assert "no region" in items[1].text


def test_captions_and_keys_are_escaped(make_run, tmp_path):
    hostile = """</li><script>alert("1")</script><img src='http://x/y.png'>&amp;"""
    key = 'a" onload="alert(1)<b>'
    tar = write_samples(tmp_path / "a.tar", sample(hostile, [WHOLE, LEFT], [Pair(0, 1, 0.3)], key=key))
    page = read_page(write_report([str(make_run())], shards=tar).url)
    assert not [e.tag for e in page.inside if e.tag in ("script", "img", "b")]
    assert hostile in articles(page)[0].find("li")[0].text
    assert articles(page)[0].find("svg")[0].attributes["aria-label"] == key
    assert not [e for e in page.inside if "onload" in e.attributes]


def test_control_signs_of_captions_and_keys_are_shown_and_not_sent(make_run, tmp_path):
    signs = "".join(chr(code) for code in (*range(1, 0x20), *range(0x7F, 0xA0)) if chr(code) not in "\t\n\r")
    caption = f"A nul \0, {signs}."
    tar = write_samples(tmp_path / "a.tar", sample(caption, [WHOLE, LEFT], [Pair(0, 1, 0.3)], key="bell\7\x1b[31m"))
    url = write_report([str(make_run())], shards=tar).url
    with open(url, encoding="utf-8", newline="") as file:
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", file.read())
    article = articles(read_page(url))[0]
    assert r"A nul \x00, \x01\x02" in article.find("li")[0].text
    assert article.find("svg")[0].attributes["aria-label"] == r"bell\x07\x1b[31m"


def test_big_pictures_are_shrunk(make_run, tmp_path):
    big = sample("One.", [Region((0, 0, 3000, 500), 1.0, "sam")], [Pair(0, 0, 0.3)], size=(3000, 1000))
    page = write_report([str(make_run())], shards=write_samples(tmp_path / "a.tar", big))
    assert page.size_bytes < 300_000 < len(big.members["jpg"])
    rect = articles(read_page(page.url))[0].find("rect", "edge")[0].attributes
    assert (float(rect["width"]), float(rect["height"])) == pytest.approx((1000, 166.7), abs=0.1)


def test_a_seed_gives_one_page_and_another_seed_other_pictures(make_run, tmp_path):
    run = str(make_run())

    def page(seed: int) -> bytes:
        url = write_report([run], out=str(tmp_path / "page.html"), images=2, seed=seed).url
        with open(url, "rb") as file:
            return file.read()

    assert page(0) == page(0)
    assert page(0) != page(1)


def test_pictures_are_drawn_from_all_tars(paired):
    gallery = draw_gallery(str(paired), images=2, seed=0)
    assert {picture.shard for picture in gallery.pictures} == {"scenes-000000.tar", "scenes-000001.tar"}


def test_bad_samples_are_skipped_and_counted(make_run, tmp_path):
    good = sample("One.", [WHOLE, LEFT], [Pair(0, 1, 0.3)], key="good")
    folder = tmp_path / "shards"
    write_samples(
        folder / "a.tar",
        Sample("broken", {**good.members, "jpg": good.members["jpg"][:200]}),
        Sample("unpaired", {"jpg": good.members["jpg"], "txt": b"One."}),
        Sample("edited", {**good.members, "txt": b"On"}),
        Sample("resized", {**good.members, "jpg": encoded(40, 30)}),
        good,
    )
    (folder / "b.tar").write_bytes(b"no tar" * 100)
    page = read_page(write_report([str(make_run())], shards=str(folder)).url)
    assert [article.find("svg")[0].attributes["aria-label"] for article in articles(page)] == ["good"]
    assert "5 skipped" in section(page, "gallery").text


def test_the_last_run_with_local_pairs_gives_the_pictures(make_run, paired, scenes):
    global_only = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0", f"data.shards={scenes}")
    page = read_page(write_report([str(make_run("goal")), str(make_run("global", global_only))]).url)
    assert f"drawn from {paired}" in section(page, "gallery").text


def test_without_a_run_with_local_pairs_the_page_says_so(make_run):
    global_only = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0")
    page = read_page(write_report([str(make_run("global", global_only))]).url)
    assert "no run was trained on local pairs; choose paired shards with --shards" in section(page, "gallery").text


def test_shards_that_have_gone_are_named_and_the_page_is_still_written(make_run, paired, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(paired, moved)
    run = make_run(settings=(f"data.shards={moved}",))
    shutil.rmtree(moved)
    page = read_page(write_report([str(run)]).url)
    assert f"No pictures: {moved}: no such file or folder; choose paired shards" in section(page, "gallery").text
    assert section(page, "curves").find("svg")


def test_shards_on_storage_that_cannot_be_reached_do_not_stop_the_page(make_run):
    page = read_page(write_report([str(make_run(settings=("data.shards=nostore://bucket/a.tar",)))]).url)
    assert "No pictures: " in section(page, "gallery").text


def test_shards_without_pairs_are_named_with_the_remedy(make_run, scenes):
    page = read_page(write_report([str(make_run(settings=(f"data.shards={scenes}",)))]).url)
    text = section(page, "gallery").text
    assert f"No pictures: {scenes}: none of the samples can be shown" in text
    assert "run `goal-ray lism` on these shards" in text


def test_no_pictures_are_drawn_where_none_are_wanted(make_run):
    page = write_report([str(make_run())], images=0)
    assert page.pictures == 0
    assert not articles(read_page(page.url))
