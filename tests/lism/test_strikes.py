"""Samples that kill their worker, or never end, as the workers see it: without Ray, the deaths are made up."""

import subprocess
import sys
from dataclasses import replace

import pytest
from odd_tars import good, write_members

from goal_ray.config import load_config
from goal_ray.lism import reading
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item
from goal_ray.lism.reading import read_groups
from goal_ray.lism.stages import StageWorker
from goal_ray.lism.strikes import Strikes
from goal_ray.lism.time_limit import TimeLimitError, run_within

FATAL = "its worker died each time"
CONFIG = load_config(LismConfig, overrides=("proposer.name=grid", "images_per_batch=3"))


def died(strikes: Strikes, times: int, *work) -> None:
    """What is left when a worker dies over this work."""
    for _ in range(times):
        strikes.begin(*work)


def mark(items: list[Item]) -> list[Item]:
    """A stage that shows which items it got together."""
    return [replace(item, caption=" ".join(str(each.number) for each in items)) for item in items]


def marked(strikes: Strikes) -> list[Item]:
    """Samples 4, 5 and 6 of shard 7 after that stage."""
    group = Group(7, [Item(number, "key") for number in (4, 5, 6)])
    return StageWorker("match", lambda: mark, 60, strikes)(group).items


@pytest.mark.parametrize("deaths", [0, 1])
def test_a_group_that_was_fatal_less_than_twice_is_worked_on_together(deaths):
    strikes = Strikes()
    died(strikes, deaths, "match", 7, 4)
    assert [item.caption for item in marked(strikes)] == ["4 5 6"] * 3


def test_a_group_that_was_fatal_twice_is_worked_on_one_by_one_without_the_sample_that_was_fatal_alone():
    strikes = Strikes()
    died(strikes, 2, "match", 7, 4)
    died(strikes, 1, "match alone", 7, 5)
    items = marked(strikes)
    assert [item.caption for item in items] == ["4", "", "6"]
    assert (items[1].problem.stage, FATAL in items[1].problem.reason) == ("match", True)
    assert not +strikes.open


def test_a_stage_that_fails_is_not_fatal():
    def refuse(items):  # noqa: ARG001
        raise RuntimeError("no")

    strikes = Strikes()
    group = Group(0, [Item(0, "key"), Item(1, "key")])
    after = StageWorker("match", lambda: refuse, 60, strikes)(group)
    assert [item.problem.reason for item in after.items] == ["RuntimeError: no"] * 2
    assert not +strikes.open


def test_a_model_that_kills_its_worker_while_it_loads_ends_the_run():
    strikes = Strikes()
    died(strikes, 4, "start to match", strikes.place)
    assert StageWorker("match", lambda: mark, 60, strikes).failure == ""
    died(strikes, 5, "start to match", strikes.place)
    assert FATAL in StageWorker("match", lambda: mark, 60, strikes).failure


@pytest.fixture
def seven(tmp_path):
    """A tar of seven usable samples."""
    write_members(tmp_path / "seven.tar", [member for n in range(7) for member in good(str(n), seed=n)])
    return str(tmp_path / "seven.tar")


def problems(url: str, strikes: Strikes, config: LismConfig = CONFIG) -> dict[int, str]:
    """Number -> reason of the samples that cannot be read and decoded; all others must be."""
    items = [item for group in read_groups(0, url, config, strikes) for item in group.items]
    assert [item.number for item in items] == list(range(7))
    assert all((item.picture_HW3 is None) == (item.problem is not None) for item in items)
    return {item.number: item.problem.reason for item in items if item.problem is not None}


def test_a_sample_that_is_fatal_to_decode_is_left_out_alone(seven):
    strikes = Strikes()
    died(strikes, 2, "decode", 0, 3)
    died(strikes, 1, "decode alone", 0, 4)
    died(strikes, 1, "decode alone", 0, 6)  # of a chunk that was never fatal: nobody asks
    assert {number: FATAL in reason for number, reason in problems(seven, strikes).items()} == {4: True}
    assert +strikes.open == {("decode alone", 0, 6): 1}


def test_a_worker_that_dies_while_it_reads_leaves_just_that_chunk_begun(seven):
    strikes = Strikes()
    groups = read_groups(0, seven, CONFIG, strikes)
    next(groups)  # the fourth sample was decoded, or nobody would know that the first group is full
    assert +strikes.open == {("decode", 0, 3): 1}
    groups.close()
    assert not +strikes.open


def test_a_picture_that_takes_too_long_is_left_out_alone(seven, monkeypatch):
    def decode_forever(data, max_pixels, decode=reading.decode_image, met=[]):  # noqa: B006
        met.append(data)
        while len(met) == 3:
            pass
        return decode(data, max_pixels)

    monkeypatch.setattr(reading, "decode_image", decode_forever)
    found = problems(seven, Strikes(), replace(CONFIG, max_seconds_per_image=0.2))
    assert found == {2: "it took longer than 0.2 s; raise max_seconds_per_image if it may"}


def test_a_stage_that_takes_too_long_costs_just_the_sample_that_does():
    def loop(items):
        while any(item.number == 5 for item in items):
            pass
        return mark(items)

    group = Group(0, [Item(number, "key") for number in (4, 5, 6)])
    items = StageWorker("match", lambda: loop, 0.1, Strikes())(group).items
    assert [item.caption for item in items] == ["4", "", "6"]
    assert "longer than 0.1 s" in items[1].problem.reason


def test_the_alarm_never_strikes_after_the_call():
    ends = {"in time": 0, "late": 0}
    for turn in range(120):
        try:
            run_within(0.001, lambda n=turn: [step for step in range(6000 * n) if step < 0])
            ends["in time"] += 1
        except TimeLimitError:
            ends["late"] += 1
        sum(range(1000))
    assert min(ends.values()) > 0


def test_the_alarm_is_no_error_that_the_call_could_take_for_its_own():
    def stubborn():
        while True:
            try:
                sum(range(1000))
            except Exception:
                continue

    with pytest.raises(TimeLimitError, match=r"longer than 0\.05 s"):
        run_within(0.05, stubborn)


def test_native_code_that_never_returns_ends_the_process():
    code = (
        "import time; from goal_ray.lism import time_limit; time_limit.GRACE_S = 0.1\n"
        "time_limit.run_within(0.1, lambda: time.sleep(3600))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr
