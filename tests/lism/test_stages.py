"""Reading, and the stages as the actors run them, without Ray."""

import numpy as np
import pytest
from odd_tars import BAD, bad_members, good, picture, write_members
from tiny_sam import tiny_sam
from torch import save

from goal_ray.config import load_config
from goal_ray.errors import ModelError
from goal_ray.lism import reading
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group
from goal_ray.lism.reading import measure_reading, read_groups
from goal_ray.lism.stages import MatchSentences, ProposeRegions, StageWorker
from goal_ray.lism.strikes import Strikes
from goal_ray.pairs import PairRecord
from goal_ray.regions import Regions


def settings(*overrides: str) -> LismConfig:
    return load_config(LismConfig, overrides=("proposer.name=grid", "max_pixels=1_000_000", *overrides))


def only_group(path, config) -> Group:
    (group,) = read_groups(0, str(path), config, Strikes())
    return group


@pytest.fixture
def seven(tmp_path):
    """A tar of seven usable samples."""
    path = tmp_path / "seven.tar"
    write_members(path, [member for n in range(7) for member in good(str(n), seed=n)])
    return path


def test_groups_are_consecutive_samples_and_the_last_knows_how_many(seven):
    groups = list(read_groups(5, str(seven), settings("images_per_batch=3"), Strikes()))
    assert [[item.number for item in group.items] for group in groups] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [group.count for group in groups] == [None, None, 7]
    assert {group.shard for group in groups} == {5}


def test_large_pictures_make_smaller_groups(seven, monkeypatch):
    monkeypatch.setattr(reading, "GROUP_BYTES", 40 * 30 * 3 + 1)
    groups = read_groups(0, str(seven), settings(), Strikes())
    assert [len(group.items) for group in groups] == [2, 2, 2, 1]


def test_a_storage_that_fails_is_no_bad_tar(tmp_path):
    (group,) = read_groups(0, str(tmp_path / "gone.tar"), settings(), Strikes())
    assert "gone.tar cannot be read: FileNotFoundError" in group.failure
    assert group.items == []


def test_a_picture_larger_than_max_side_is_worked_on_small_and_its_boxes_are_in_its_own_pixels(tmp_path, tiny_clip):
    write_members(tmp_path / "a.tar", [("a.png", picture(size=(300, 200))), ("a.txt", b"One thing.")])
    config = settings("max_side_px=60", f"matcher.model.name={tiny_clip}")
    group = only_group(tmp_path / "a.tar", config)
    assert group.items[0].picture_HW3.shape == (40, 60, 3)
    (done,) = MatchSentences(config, {}, "cpu")(ProposeRegions(config, "cpu")(group.items))
    record = PairRecord.from_bytes(done.record, "One thing.", "a")
    assert record.size == (300, 200)
    assert record.regions[0].box == (0, 0, 300, 200)
    assert record.regions[0].source == "image"
    assert (0, 0, 150, 100) in [region.box for region in record.regions]


class Refuses:
    """A proposer that some pictures break: those whose first pixel is black."""

    def propose(self, images):
        if any(image[0, 0].sum() == 0 for image in images):
            raise RuntimeError("no segments")
        return [
            Regions(
                np.array([[0, 0, 9, 9]], np.float32),
                np.ones(1, np.float32),
                np.array([81.0], np.float32),
                np.array(["x"]),
            )
            for _ in images
        ]


def test_a_proposer_that_fails_on_one_picture_costs_just_that_sample(tmp_path):
    black = [("b.png", picture(colour="black")), ("b.txt", b"A hole.")]
    write_members(tmp_path / "a.tar", [*good("a"), *black, *good("c")])
    group = only_group(tmp_path / "a.tar", settings())

    def build():
        stage = ProposeRegions(settings(), "cpu")
        stage.model = Refuses()
        return stage

    after = StageWorker("propose", build, 60, Strikes())(group)
    assert [item.problem and (item.problem.stage, item.problem.reason) for item in after.items] == [
        None,
        ("propose", "RuntimeError: no segments"),
        None,
    ]
    assert [item.regions is not None for item in after.items] == [True, False, True]


def test_samples_with_a_problem_pass_the_stages_untouched(tmp_path, tiny_clip):
    write_members(tmp_path / "bad.tar", bad_members())
    config = settings(f"matcher.model.name={tiny_clip}")
    before = only_group(tmp_path / "bad.tar", config)
    after = before
    for stage in (
        StageWorker("propose", lambda: ProposeRegions(config, "cpu"), 60, Strikes()),
        StageWorker("match", lambda: MatchSentences(config, {}, "cpu"), 60, Strikes()),
    ):
        after = stage(Group.from_row(after.to_row()))
    assert after == before
    assert [item.key for item in before.items] == list(BAD)


def test_every_stage_adds_its_work_to_the_group_and_waiting_for_the_next_stage_is_no_work(tmp_path, monkeypatch):
    write_members(tmp_path / "a.tar", [*good("a"), *bad_members(), *good("b")])
    clock = [0.0]
    monkeypatch.setattr("goal_ray.timing.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(reading, "decode", lambda item, *_: clock.__setitem__(0, clock[0] + 1) or item)
    seconds, images = [], []
    for group in measure_reading(read_groups(0, str(tmp_path / "a.tar"), settings("images_per_batch=6"), Strikes())):
        clock[0] += 100
        stage = StageWorker("propose", lambda: lambda items: clock.__setitem__(0, clock[0] + 3) or items, 60, Strikes())
        for work in stage(group).work:
            seconds.append(work.seconds)
            images.append(work.images)
    assert seconds == [{"read": 7}, {"propose": 3}, {"read": 4}, {"propose": 3}]
    assert images == [6, 6, 5, 5]


def test_a_model_that_does_not_load_fails_the_group_with_its_reason(seven):
    def build():
        raise ModelError("weights are gone")

    after = StageWorker("match", build, 60, Strikes())(only_group(seven, settings()))
    assert after.failure == "cannot start to match: weights are gone"


def test_a_key_that_is_not_utf8_is_printable(tmp_path):
    write_members(tmp_path / "a.tar", good("caf\udce9"))
    assert only_group(tmp_path / "a.tar", settings()).items[0].key == r"caf\xe9"


def test_sam_gives_regions_to_the_matcher(tmp_path, tiny_clip):
    save(tiny_sam().state_dict(), tmp_path / "sam.pth")
    write_members(tmp_path / "a.tar", [*good("a"), *good("b", seed=1)])
    config = settings(
        "proposer.name=sam",
        f"proposer.checkpoint={tmp_path / 'sam.pth'}",
        "proposer.points_per_side=4",
        "proposer.pred_iou_thresh=-1000000",
        "proposer.stability_score_thresh=0",
        f"matcher.model.name={tiny_clip}",
    )
    items = only_group(tmp_path / "a.tar", config).items
    for item, done in zip(items, MatchSentences(config, {}, "cpu")(ProposeRegions(config, "cpu")(items)), strict=True):
        record = PairRecord.from_bytes(done.record, item.caption, item.key)
        assert {region.source for region in record.regions} == {"image", "sam"}
        assert len(record.pairs) == 2
    stage = StageWorker("propose", lambda: ProposeRegions(config, "cpu"), 60, Strikes())
    (work,) = stage(only_group(tmp_path / "a.tar", config)).work
    assert (work.stage, work.images, set(work.seconds)) == ("propose", 2, {"encode", "propose"})
    assert min(work.seconds.values()) > 0
