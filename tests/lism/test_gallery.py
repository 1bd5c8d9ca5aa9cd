"""OUT/gallery.html over tars that are paired by hand, without Ray."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from html_page import read_page, section
from odd_tars import picture, write_members

from goal_ray.lism.counts import ShardCounts, summary
from goal_ray.lism.gallery import TITLES, draw_gallery
from goal_ray.lism.groups import Item, Problem
from goal_ray.lism.output import OutputFolder
from goal_ray.lism.run import finish_shard
from goal_ray.pairs import Pair, PairRecord, Region
from goal_ray.storage import size_bytes

WHOLE, LEFT = Region((0, 0, 40, 30), 1.0, "image"), Region((0, 0, 10, 30), 1.0, "grid")
HOSTILE = """</div><script>alert("1")</script><img src='http://x/y.png'>&amp;"""
ODD_KEY = 'a" onload="alert(1)<b>caf\udce9'


MADE_BY = {"proposer": {"name": "grid"}, "matcher": {"model": {"name": "ViT-B-16"}, "min_similarity": 0.2}, "n": None}


def make(
    folder: Path,
    name: str,
    captions: list[str],
    pairs: list[list[Pair]],
    keys: list[str] | None = None,
    made_by: dict[str, Any] = MADE_BY,
):
    """Pairs one tar, a sentence for each line of a caption; a sample without pairs is bad. Returns its counts."""
    keys = keys or [f"{name}-{number}" for number in range(len(captions))]
    members = [
        (f"{key}.{extension}", data)
        for number, (key, caption) in enumerate(zip(keys, captions, strict=True))
        for extension, data in (("png", picture(seed=number)), ("txt", caption.encode()))
    ]
    (folder / "in").mkdir(exist_ok=True)
    write_members(folder / "in" / f"{name}.tar", [("README", b"of no sample"), *members])
    items = []
    for number, (key, caption, mine) in enumerate(zip(keys, captions, pairs, strict=True)):
        shown = key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        if not mine:
            items.append(Item(number, shown, problem=Problem("decode", f"caption of sample {shown!r} is empty")))
            continue
        ends = [at for at, sign in enumerate(caption + "\n") if sign == "\n"]
        sentences = tuple(zip([0, *(end + 1 for end in ends[:-1])], ends, strict=True))
        record = PairRecord((40, 30), sentences, (WHOLE, LEFT), tuple(mine), made_by)
        items.append(Item(number, shown).done(record.to_bytes()))
    shard = str(folder / "in" / f"{name}.tar")
    counts, _ = finish_shard(shard, size_bytes(shard), items, [], None, OutputFolder(str(folder / "out")))
    return counts


def draw(folder: Path, *counts, seconds: float = 100.0, images: int = 22) -> str | None:
    result = summary(counts, seconds, images)
    return draw_gallery(OutputFolder(str(folder / "out")), result)


def cards(folder: Path, name: str):
    """The cards of one section of pairs."""
    return section(read_page(folder / "out" / "gallery.html"), name).find("article")


@pytest.fixture
def two(tmp_path):
    """The counts of two shards, of 20 pairs each of similarity 0.00 to 0.39, and one bad sample in between."""
    return [
        make(
            tmp_path,
            name,
            [f"{name} {n} one.\n{name} {n} two." for n in range(11)],
            [
                [] if n == 5 else [Pair(s, s, (first + 2 * (n - (n > 5)) + s) / 100) for s in range(2)]
                for n in range(11)
            ],
        )
        for name, first in (("x", 0), ("y", 20))
    ]


def test_best_and_worst_pairs_of_all_shards_are_shown_each_with_its_own_sentence_and_box(two, tmp_path):
    assert draw(tmp_path, *two) == "gallery.html"
    for title, similarities in (("best", range(39, 27, -1)), ("worst", range(12))):
        shown = cards(tmp_path, title)
        assert len(shown) == 12
        for card, hundredth in zip(shown, similarities, strict=True):
            name, sample = "xy"[hundredth // 20], hundredth % 20 // 2
            sample += sample >= 5
            assert card.find("div", "from")[0].text == f"{name}-{sample} · {name}.tar"
            assert f"{hundredth / 100:.3f}{name} {sample} {('one', 'two')[hundredth % 2]}." in card.text
            whole = hundredth % 2 == 0
            assert ("whole image" in card.text) == whole
            boxes = [[float(box.attributes[at]) for at in ("x", "y", "width", "height")] for box in card.find("rect")]
            assert boxes == ([] if whole else [[0, 0, 250, 750]] * 2)


def test_the_page_is_the_same_in_whatever_order_shards_are_finished(two, tmp_path):
    def page(counts):
        draw(tmp_path, *counts)
        return section(read_page(tmp_path / "out" / "gallery.html"), "numbers").text, [
            [card.text for card in cards(tmp_path, title)] for title in TITLES
        ]

    assert page(two) == page(two[::-1])


def test_the_page_has_the_numbers_of_the_summary_and_the_kinds_of_reasons(two, tmp_path):
    draw(tmp_path, *two)
    page = read_page(tmp_path / "out" / "gallery.html")
    tiles = [
        (tile.find("b")[0].text, tile.find("span")[0].text) for tile in section(page, "numbers").find("div", "tile")
    ]
    assert tiles == [
        ("22", "samples"),
        ("20", "paired"),
        ("2", "in the quarantine"),
        ("2.0", "sentences per image"),
        ("1.0", "regions per image"),
        ("2.0", "pairs per image"),
        ("100.0 %", "of the sentences have a pair"),
        ("50.0 %", "of the pairs are with the whole image"),
        ("0:01:40", "h:mm:ss took the last run, of 22 samples"),
        ("0.2", "images/s in it, its start included"),
    ]
    assert [cell.text for cell in section(page, "quarantine").find("td")] == [
        "2",
        "decode: caption of sample … is empty",
    ]
    assert section(page, "work").find("td")[0].text == "write"
    assert [int(bar.text) for bar in section(page, "similarities").find("div", "bars")[0].find("div")] == [2] * 20
    assert "Of the pairs, 5 % lie below 0.02, 25 % below 0.10" in section(page, "similarities").text


def made_by(page) -> list[tuple[str, str]]:
    """The settings that the page tells."""
    return [(row.find("dt")[0].text, row.find("dd")[0].text) for row in section(page, "made-by").find("div")[1:]]


def test_the_page_tells_what_made_the_pairs_and_all_numbers_before_the_pictures(two, tmp_path):
    draw(tmp_path, *two)
    page = read_page(tmp_path / "out" / "gallery.html")
    assert made_by(page) == [
        ("proposer.name", "grid"),
        ("matcher.model.name", "ViT-B-16"),
        ("matcher.min_similarity", "0.2"),
        ("n", "null"),
    ]
    names = [each.attributes["id"] for each in page.find("section")]
    assert set(names[:-3]) == {"numbers", "similarities", "made-by", "work", "quarantine"}
    assert names[-3:] == list(TITLES)


def test_a_setting_that_differs_between_pairs_is_told_with_all_its_values(tmp_path):
    limits = ({"max_pixels": 10, "versions": {"torch": "2"}}, {"max_pixels": 20, "versions": {"torch": "2"}})
    counts = [
        make(tmp_path, name, ["One."], [[Pair(0, 1, similarity)]], made_by=each)
        for name, similarity, each in zip("ab", (0.3, 0.2), limits, strict=True)
    ]
    draw(tmp_path, *counts)
    settings = dict(made_by(read_page(tmp_path / "out" / "gallery.html")))
    assert set(settings.pop("max_pixels").split(" or ")) == {"10", "20"}
    assert settings == {"versions.torch": "2"}


def test_a_run_that_had_nothing_left_to_do_tells_no_speed(two, tmp_path):
    draw(tmp_path, *two, images=0)
    numbers = section(read_page(tmp_path / "out" / "gallery.html"), "numbers")
    assert "images/s" not in numbers.text
    assert "last run" not in numbers.text


def histogram(folder: Path, similarities: list[float], times: int = 1):
    """The bars, and the labels below them, of pairs with these similarities; and the labels that are always shown."""
    counts = ShardCounts()
    for similarity in similarities:
        counts.add_pairs(1, 1, [similarity], 0, 1)
    counts.similarity_histogram = [times * count for count in counts.similarity_histogram]
    draw(folder, counts)
    found = section(read_page(folder / "out" / "gallery.html"), "similarities")
    (bars,), (edges,) = found.find("div", "bars"), found.find("div", "edges")
    labels = [(label.text, label.attributes.get("class")) for label in edges.find("span")]
    return bars, [text for text, _ in labels], [text for text, class_ in labels if class_ != "more"]


def test_every_bar_has_the_number_where_it_begins_and_a_narrow_screen_shows_some_round_ones(tmp_path):
    bars, labels, narrow = histogram(tmp_path, [n / 100 for n in range(-3, 25)])
    assert len(bars.find("div")) == 28
    assert labels[:5] == ["-0.03", "-0.02", "-0.01", "+0.00", "+0.01"]
    assert narrow == ["+0.00", "+0.05", "+0.10", "+0.15", "+0.20"]


@pytest.mark.parametrize(("bars", "times", "upright"), [(8, 99_999, False), (8, 1_000_000, True), (28, 10, True)])
def test_counts_too_long_to_stand_side_by_side_on_a_phone_stand_upright(tmp_path, bars, times, upright):
    drawn, _, _ = histogram(tmp_path, [n / 100 for n in range(bars)], times)
    assert ("upright" in drawn.attributes["class"].split()) == upright
    assert {bar.text for bar in drawn.find("div")} == {f"{times:,}"}
    assert drawn.find("div")[0].attributes["title"] == f"+0.00 to +0.01: {times:,}"


@pytest.mark.parametrize("rule", [".tile b", ".made dd", ".plain td", ".pair .said", ".pair .from"])
def test_long_words_and_numbers_break_before_they_leave_their_place(two, tmp_path, rule):
    draw(tmp_path, *two)
    style = read_page(tmp_path / "out" / "gallery.html").find("style")[0].text
    assert "overflow-wrap: anywhere" in style.partition(f"\n{rule} {{")[2].partition("}")[0]


def test_captions_and_keys_are_escaped_and_the_page_loads_nothing(tmp_path):
    draw(tmp_path, make(tmp_path, "a", [HOSTILE], [[Pair(0, 1, 0.3)]], [ODD_KEY]))
    page = read_page(tmp_path / "out" / "gallery.html")
    assert not [e.tag for e in page.inside if e.tag in ("script", "img", "link") or "onload" in e.attributes]
    (card,) = cards(tmp_path, "best")
    assert HOSTILE in card.text
    assert r'a" onload="alert(1)<b>caf\xe9 · a.tar' in card.text
    (image,) = card.find("image")
    assert image.attributes["href"].startswith("data:image/jpeg;base64,")
    assert [e for e in page.find("meta") if "default-src 'none'" in e.attributes.get("content", "")]


def test_a_paired_tar_that_has_gone_or_changed_leaves_its_pairs_without_pictures_and_says_why(two, tmp_path):
    shutil.move(tmp_path / "out" / "y.tar", tmp_path / "moved.tar")
    (tmp_path / "out" / "x.tar").write_bytes(bytes(100) + (tmp_path / "out" / "x.tar").read_bytes())
    assert draw(tmp_path, *two) == "gallery.html"
    assert all("cannot be shown: FileNotFoundError" in card.text for card in cards(tmp_path, "best"))
    assert all("x.tar: no sample at byte" in card.text for card in cards(tmp_path, "worst"))
    ids = [each.attributes["id"] for each in read_page(tmp_path / "out" / "gallery.html").find("section")]
    assert "made-by" not in ids


def test_a_page_that_cannot_be_written_is_said_and_is_no_error(two, tmp_path, capsys):
    (tmp_path / "out" / "gallery.html").mkdir()
    assert draw(tmp_path, *two) is None
    assert "no gallery.html: IsADirectoryError" in capsys.readouterr().err


def test_a_run_without_a_pair_has_a_page_too(tmp_path):
    draw(tmp_path, make(tmp_path, "a", [" "], [[]]))
    assert "There is no pair." in read_page(tmp_path / "out" / "gallery.html").text
    assert cards(tmp_path, "random") == []


@pytest.mark.usefixtures("two")
def test_done_holds_at_most_twelve_pairs_of_each_kind(tmp_path):
    picks = json.loads((tmp_path / "out" / "done" / "x.tar.json").read_text())["picks"]
    assert {name: len(pairs) for name, pairs in picks.items()} == {"random": 12, "best": 12, "worst": 12}
