"""Pictures with regions and sentences, as drawn."""

import pytest
from paired_samples import LEFT, RIGHT, WHOLE, sample

from goal_ray.errors import ShardError
from goal_ray.pages.colours import colour
from goal_ray.pages.pictures import LABEL_RADIUS, draw_picture, place_label
from goal_ray.pairs import Pair


def test_sentences_of_one_region_share_its_colour_and_the_box_is_drawn_once():
    pairs = [Pair(0, 2, 0.3), Pair(1, 1, 0.2), Pair(2, 2, 0.1)]
    picture = draw_picture(sample("One.\nTwo.\nThree.", [WHOLE, LEFT, RIGHT], pairs), "a.tar")
    assert [line.box.colour for line in picture.lines] == [colour(0), colour(1), colour(0)]
    assert len(picture.boxes) == 2


def test_labels_of_boxes_with_a_common_corner_do_not_cover_each_other():
    boxes = [(0, 0, 500, 400), (0, 0, 1000, 400), (0, 0, 250, 200)]
    labels: list[tuple[float, float]] = []
    for box in boxes:
        labels.append(place_label(box, (1000, 400), labels))
    assert len({(round(x / LABEL_RADIUS), round(y / LABEL_RADIUS)) for x, y in labels}) == 3


def test_the_label_of_a_tiny_box_lies_beside_it_and_within_the_picture():
    for x, y in ((500, 300), (0, 0), (990, 390)):
        label_x, label_y = place_label((x, y, x + 10, y + 10), (1000, 400), [])
        assert LABEL_RADIUS <= label_x <= 1000 - LABEL_RADIUS
        assert LABEL_RADIUS <= label_y <= 400 - LABEL_RADIUS
    label_x, label_y = place_label((500, 300, 510, 310), (1000, 400), [])
    assert label_x + LABEL_RADIUS <= 500
    assert label_y + LABEL_RADIUS <= 300


def test_colours_do_not_repeat():
    assert len({colour(number) for number in range(100)}) == 100


def test_of_one_pair_only_its_sentence_and_its_box_are_drawn():
    pairs = [Pair(0, 2, 0.3), Pair(1, 1, 0.2), Pair(1, 2, 0.1)]
    picture = draw_picture(sample("One.\nTwo.", [WHOLE, LEFT, RIGHT], pairs), "a.tar", only=(1, 2))
    ((line),) = picture.lines
    assert (line.text, line.similarity) == ("Two.", 0.1)
    assert picture.boxes == [line.box]
    assert line.box.x > 0


def test_a_pair_that_the_record_lacks_is_refused():
    one = sample("One.\nTwo.", [WHOLE, LEFT], [Pair(0, 1, 0.3)])
    with pytest.raises(ShardError, match="sentence 1 and region 1 are no pair"):
        draw_picture(one, "a.tar", only=(1, 1))


def test_a_sample_without_pairs_is_named_with_the_remedy():
    bare = sample("One.", [WHOLE], [])
    del bare.members["pairs.json"]
    with pytest.raises(ShardError, match=r"a\.tar: sample '.+' has no \.pairs\.json; run `goal-ray lism`"):
        draw_picture(bare, "a.tar")
