"""What actors do when their GPU is full or lost, without one: the errors are made up, and so is the GPU's answer."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch

from goal_ray.config import load_config
from goal_ray.errors import StageError
from goal_ray.lism import gpu, run, stages
from goal_ray.lism.config import LismConfig
from goal_ray.lism.groups import Group, Item
from goal_ray.lism.pipeline import actor_pools
from goal_ray.lism.run import choose_gpu
from goal_ray.lism.stages import MatchSentences, ProposeRegions, StageWorker
from goal_ray.lism.strikes import START_DEATHS, Strikes

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore lines.")
LOST = "CUDA error: an illegal memory access was encountered"
PRELUDE = f"""
import torch
from goal_ray.lism.groups import Group, Item
from goal_ray.lism.stages import StageWorker
from goal_ray.lism.strikes import Strikes

class Told(Strikes):
    def begin(self, *work):
        print("began", *work, flush=True)
        return super().begin(*work)

    def end(self, *work):
        print("ended", *work, flush=True)

def lose(*_):
    raise torch.AcceleratorError("{LOST}")
"""


def group(size: int) -> Group:
    return Group(0, [Item(number, "key") for number in range(size)])


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, check=False)


class FillsTheGpu:
    """A stage whose GPU has room for so many items; notes the sizes of its attempts."""

    def __init__(self, room: int, too_large: tuple[int, ...] = ()):
        self.room = room
        self.too_large = too_large
        self.sizes: list[int] = []

    def __call__(self, items: list[Item]) -> list[Item]:
        self.sizes.append(len(items))
        if len(items) > self.room or any(item.number in self.too_large for item in items):
            raise FULL
        return items


def test_a_group_too_large_for_the_gpu_is_halved_until_it_fits():
    stage = FillsTheGpu(room=3)
    after = StageWorker("match", lambda: stage, 60, Strikes())(group(10))
    assert stage.sizes == [10, 5, 3, 2, 5, 3, 2]
    assert [item.number for item in after.items] == list(range(10))
    assert all(item.problem is None for item in after.items)


LESS = "match: out of GPU memory, with less at once from now on\n"


class TakesLess:
    """A stage that can take less at once, as a model of two numbers does; notes its attempts.

    room    a GPU has it for so much at once
    needed  number of an item -> the room that it needs besides
    """

    def __init__(self, room: int, needed: dict[int, int] | None = None):
        self.model = SimpleNamespace(at_once=(2, 4))
        self.room = room
        self.needed = needed or {}
        self.attempts: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, items: list[Item]) -> list[Item]:
        self.attempts.append((len(items), self.model.at_once))
        first, second = self.model.at_once
        if first * second + sum(self.needed.get(item.number, 0) for item in items) > self.room:
            raise FULL
        return items


def test_a_stage_whose_gpu_is_too_small_takes_less_at_once_and_remembers_it(capsys):
    stage = TakesLess(room=2)
    worker = StageWorker("match", lambda: stage, 60, Strikes())
    for _ in range(2):
        assert all(item.problem is None for item in worker(group(8)).items)
    assert stage.attempts == [(8, (2, 4)), (8, (1, 4)), (8, (1, 2)), (8, (1, 2))]
    assert capsys.readouterr().err == LESS


def test_a_picture_that_never_fits_leaves_no_trace_in_how_much_others_are_taken_at_once(capsys):
    stage = TakesLess(room=8, needed={5: 100})
    worker = StageWorker("match", lambda: stage, 60, Strikes())
    after = worker(group(16))
    assert [item.number for item in after.items if item.problem is not None] == [5]
    assert "out of GPU memory" in after.items[5].problem.reason
    # The others of its group, from the half without it on, and the next group.
    assert [size for size, at_once in stage.attempts if at_once == (2, 4)] == [16, 8, 4, 4, 2, 1, 1, 2, 8]
    worker(Group(0, [Item(0, "key")]))
    assert stage.attempts[-1] == (1, (2, 4))
    assert capsys.readouterr().err == ""


def test_after_a_moment_in_which_a_neighbour_filled_the_gpu_all_is_as_before(capsys):
    stage = TakesLess(room=0)
    worker = StageWorker("match", lambda: stage, 60, Strikes())
    assert all(item.problem is not None for item in worker(group(2)).items)
    stage.room = 8
    assert all(item.problem is None for item in worker(group(2)).items)
    assert stage.attempts[-1] == (2, (2, 4))
    assert capsys.readouterr().err == ""


def test_a_picture_that_never_fits_on_a_small_gpu_brings_back_the_setting_that_had_helped():
    stage = TakesLess(room=4, needed={2: 100})
    worker = StageWorker("match", lambda: stage, 60, Strikes())
    worker(Group(0, [Item(0, "key")]))
    assert stage.model.at_once == (1, 4)
    after = worker(group(4))
    assert [item.problem is None for item in after.items] == [True, True, False, True]
    assert stage.model.at_once == (1, 4)


def test_a_picture_that_fits_with_less_at_once_but_is_bad_does_not_count_as_help():
    class ThenBad(TakesLess):
        def __call__(self, items):
            super().__call__(items)
            raise ValueError("no")

    stage = ThenBad(room=2)
    (item,) = StageWorker("match", lambda: stage, 60, Strikes())(group(1)).items
    assert item.problem.reason == "ValueError: no"
    assert stage.model.at_once == (2, 4)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (torch.AcceleratorError(LOST), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("CUDA error: out of memory"), False),
    ],
)
def test_a_full_gpu_is_known_by_its_error(error, full):
    assert gpu.is_out_of_memory(error) is full
    assert gpu.is_gpu_error(error) is (full or isinstance(error, torch.AcceleratorError))


def test_a_picture_too_large_for_the_gpu_is_quarantined_with_the_settings_to_change():
    after = StageWorker("match", lambda: FillsTheGpu(room=9, too_large=(2,)), 60, Strikes())(group(4))
    assert [item.problem is None for item in after.items] == [True, True, False, True]
    reason = after.items[2].problem.reason
    assert reason.startswith("out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB.): raise gpus_per_actor")
    assert "matcher.batch" in reason


@pytest.mark.parametrize("error", [FULL, RuntimeError("no")])
def test_what_a_failed_attempt_held_is_free_before_the_next_one(error):
    class Tensor:
        pass

    held: list[weakref.ref] = []

    def work(items):
        assert all(tensor() is None for tensor in held)
        tensor = Tensor()
        held.append(weakref.ref(tensor))
        if len(items) > 1:
            raise type(error)(str(error))
        return items

    after = StageWorker("match", lambda: work, 60, Strikes())(group(4))
    assert [item.problem for item in after.items] == [None] * 4
    assert len(held) == (7 if error is FULL else 5)


def test_memory_is_given_back_before_the_next_attempt(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("give back"))

    def work(items):
        calls.append(len(items))
        if len(items) > 1:
            raise FULL
        return items

    StageWorker("match", lambda: work, 60, Strikes())(group(2))
    assert calls == [2, "wait", "give back", 1, 1]


def test_an_actor_whose_gpu_is_lost_dies_with_its_work_begun_and_blames_no_picture():
    ended = run_python("""
torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lose
StageWorker("match", lambda: lose, 60, Told())(Group(0, [Item(0, "a"), Item(1, "b")]))
print("went on")
""")
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[2:] == ["began match 0 0"]
    assert f"the GPU is lost: AcceleratorError: {LOST}; starting again" in ended.stderr


def test_an_actor_whose_model_does_not_fit_starts_again():
    ended = run_python("""
def build():
    raise torch.OutOfMemoryError("CUDA out of memory.")
StageWorker("match", build, 60, Told())
print("went on")
""")
    assert (ended.returncode, ended.stdout.split()) == (1, ["began", "start", "to", "match"])
    assert "cannot start to match: OutOfMemoryError: CUDA out of memory.; starting again" in ended.stderr


def test_a_model_that_fits_at_no_start_ends_the_run_with_the_settings_to_change():
    def build():
        raise FULL

    strikes = Strikes()
    for _ in range(START_DEATHS):
        strikes.begin("start to match", strikes.place)
    after = StageWorker("match", build, 60, strikes)(group(1))
    assert after.failure == (
        f"cannot start to match: out of GPU memory (CUDA out of memory. Tried to allocate 2 GiB.): {gpu.MORE_MEMORY}"
    )


@pytest.mark.parametrize(
    ("device", "share", "limits"),
    [("cuda", 0.25, [0.25 - 1.5 / 80]), ("cuda", 0.03, [0.015]), ("cuda", 1, []), ("cpu", 0.25, [])],
)
def test_an_actor_keeps_to_its_share_of_the_gpu_from_before_its_model_loads(monkeypatch, device, share, limits):
    calls = []
    h100 = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: h100)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", calls.append)
    monkeypatch.setattr(stages, "build_proposer", lambda *_: calls.append("proposer"))
    monkeypatch.setattr("goal_ray.lism.matching.Matcher", lambda *_: calls.append("matcher"))
    config = load_config(LismConfig, overrides=["proposer.name=grid", f"gpus_per_actor={share}"])
    ProposeRegions(config, device)
    MatchSentences(config, {}, device)
    assert calls == [*limits, "proposer", *limits, "matcher"]


ONE_GPU, ONE_CPU = {"num_gpus": 1.0}, {"num_cpus": 1.0}
DETECTOR = ("proposer.name=detector", "proposer.model=ssdlite320_mobilenet_v3_large", "proposer.checkpoint=none.pth")


def settings(*overrides: str) -> LismConfig:
    fixed = "gpus_per_actor=1", "proposer_actors=[2,3]", "matcher_actors=[4,5]"
    return load_config(LismConfig, overrides=[*fixed, *overrides])


@pytest.mark.parametrize(
    ("overrides", "use_gpu", "pools"),
    [
        (DETECTOR, True, [(2, 3, ONE_GPU), (4, 5, ONE_GPU)]),
        (("proposer.name=grid",), True, [(2, 3, ONE_CPU), (4, 5, ONE_GPU)]),
        (("proposer.name=felzenszwalb",), True, [(2, 3, ONE_CPU), (4, 5, ONE_GPU)]),
        (("proposer.name=grid", "fused=true"), True, [(2, 3, ONE_GPU)]),
        (DETECTOR, False, [(2, 3, ONE_CPU), (4, 5, ONE_CPU)]),
    ],
)
def test_actors_hold_a_share_of_a_gpu_where_they_compute_on_one(overrides, use_gpu, pools):
    found = actor_pools(settings(*overrides), {}, use_gpu, Strikes())
    assert [pool[1:] for pool in found] == pools


@pytest.mark.parametrize(
    ("overrides", "cpus", "gpus"),
    [
        (DETECTOR, 7, 6),
        (("proposer.name=grid",), 7, 4),
        (("proposer.name=grid", "fused=true"), 3, 2),
    ],
)
def test_a_run_on_gpus_needs_those_of_its_actors_and_a_cpu_for_each_actor_and_for_reading(
    monkeypatch, overrides, cpus, gpus
):
    monkeypatch.setattr(run, "is_joined", lambda: False)
    for lacking in ("CPU", "GPU", None):
        have = {"CPU": cpus - (lacking == "CPU"), "GPU": gpus - (lacking == "GPU")}
        monkeypatch.setattr("ray.cluster_resources", lambda have=have: have)
        if lacking is None:
            assert choose_gpu(settings(*overrides), "out") is True
            continue
        with pytest.raises(StageError, match=f"need .* {lacking}s, and the cluster has"):
            choose_gpu(settings(*overrides), "out")
