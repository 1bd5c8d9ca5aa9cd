"""How many workers an elastic run starts, and what it makes of their micro-batches."""

import math
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from goal_ray.errors import StageError
from goal_ray.settings import ModelConfig
from goal_ray.train.attempts import GROW_AFTER_S, Attempts
from goal_ray.train.config import DataConfig, EvaluationConfig, TrainConfig
from goal_ray.train.driver_lock import DriverLock
from goal_ray.train.evaluation import Evaluations
from goal_ray.train.failures import WorkerDied
from goal_ray.train.metrics import Metrics
from goal_ray.train.places import Demand, beside_evaluation, growth, lacking, most_workers
from goal_ray.train.recorder import ProgressLine, RunRecorder
from goal_ray.train.worker import is_sent


def elastic(workers, batch=4, **more) -> TrainConfig:
    return TrainConfig(ModelConfig("ViT-B-16"), DataConfig("shards"), workers=workers, batch_per_worker=batch, **more)


@pytest.mark.parametrize(
    ("workers", "resources", "use_gpu", "count"),
    [
        (2, {"CPU": 3}, False, 2),
        (2, {"CPU": 2}, False, None),
        ((1, 4), {"CPU": 64}, False, 4),
        ((1, 4), {"CPU": 64, "GPU": 2}, True, 2),
        ((1, 4), {"CPU": 64}, True, None),
        (1, {"CPU": 1, "GPU": 1}, True, 1),  # a GPU worker holds no CPU, as Ray counts
        (1, {"CPU": 0, "GPU": 1}, True, None),
        ((3, 8), {"CPU": 8}, False, 4),  # 5, 6 and 7 do not share 32 pictures evenly
        ((5, 8), {"CPU": 8}, False, None),
    ],
)
def test_the_most_workers_that_share_a_batch_evenly_and_find_room(workers, resources, use_gpu, count):
    assert most_workers(elastic(workers), use_gpu, resources) == count


def test_a_worker_s_custom_resources_count_too():
    config = elastic((2, 4), worker_resources={"train": 1.0})
    assert most_workers(config, True, {"CPU": 9, "GPU": 9, "train": 3}) == 2  # 3 do not share 16 pictures evenly
    assert lacking(config, True, 2, {"CPU": 9, "GPU": 9, "train": 1}) == "2 workers need 2 trains, the cluster has 1"
    assert (
        lacking(config, False, 2, {"CPU": 2, "train": 2}) == "2 workers and the ingest need 3 CPUs, the cluster has 2"
    )
    assert lacking(config, False, 2, {"CPU": 3, "train": 2}) == ""


@pytest.fixture
def attempts(tmp_path):
    """Of a run whose samples may be bad in two cases, without a cluster."""
    config = elastic(1)
    with ProgressLine("goal") as line, RunRecorder(tmp_path, line, [], Metrics("goal"), 0.0) as recorder:
        evaluations = Evaluations(tmp_path, config.evaluation, lambda *_: None, line.say)
        job = {"run_dir": tmp_path, "total_steps": 10}
        lock = DriverLock(tmp_path / "driver.json", "of this driver")
        yield Attempts(config, job, 2, False, recorder, evaluations, threading.Event(), lock)


def test_bad_samples_are_counted_over_all_workers(attempts):
    attempts.looked_around = math.inf  # there is no cluster to look at
    for number, ending in enumerate([None, None, "spoiled"]):
        sample = {"shard": "a.tar", "key": str(number), "stage": "decode", "reason": "torn"}
        attempts._receive({"bad": [sample, sample]})
        assert attempts._reason_to_end(1, Demand()) == ending


def test_the_time_in_which_gpu_workers_start_is_gpu_time(attempts, monkeypatch):
    import ray

    def fit():  # they die before they tell what they run on
        raise RuntimeError("the workers could not be started")

    answer = SimpleNamespace(remote=list)
    mailbox = SimpleNamespace(take=answer, stop=answer)
    monkeypatch.setattr("goal_ray.train.attempts.open_mailbox", lambda: mailbox)
    monkeypatch.setattr("goal_ray.train.attempts.is_joined", lambda: False)
    for name, stand_in in (("get", lambda reference: reference), ("kill", lambda _: None)):
        monkeypatch.setattr(ray, name, stand_in)
    monkeypatch.setattr(attempts, "_trainer", lambda *_: SimpleNamespace(fit=fit))
    monkeypatch.setattr(attempts, "_reason_to_end", lambda *_: None)
    attempts.use_gpu = True
    with pytest.raises(RuntimeError, match="could not be started"):
        attempts._attempt(None, 2)
    cost = attempts.recorder.cost
    assert cost.gpu_seconds == cost.worker_seconds > 0


@pytest.mark.parametrize(
    ("leaving", "ending"),
    [({"worker"}, "preempted"), ({"driver"}, "interrupted"), ({"driver", "worker"}, "interrupted"), ({"other"}, None)],
)
def test_a_node_that_leaves_ends_the_attempt_and_the_driver_s_own_the_run(attempts, monkeypatch, leaving, ending):
    import ray

    monkeypatch.setattr("goal_ray.train.attempts.draining_nodes", lambda: leaving)
    monkeypatch.setattr("goal_ray.train.attempts.cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "driver"))
    attempts.nodes.add("worker")
    assert attempts._reason_to_end(1, Demand()) == ending
    assert attempts.interrupted.is_set() is (ending == "interrupted")


@given(
    data=st.data(),
    fewest=st.integers(1, 8),
    most=st.integers(1, 8),
    use_gpu=st.booleans(),
    gpus=st.none() | st.integers(0, 2),
    evaluating=st.booleans(),
)
def test_whatever_is_asked_for_beside_the_workers_leaves_ingest_and_evaluation_their_places(
    data, fewest, most, use_gpu, gpus, evaluating
):
    evaluation = EvaluationConfig() if gpus is None else EvaluationConfig("held-out", cpus=3, gpus=gpus)
    config = elastic((fewest, max(fewest, most)), evaluation=evaluation)
    workers = data.draw(st.sampled_from(config.worker_counts))
    groups = growth(config, use_gpu, workers, evaluating)
    assert bool(groups) == (workers < config.max_workers)
    for group in groups:
        held = Counter({"CPU": 1.0} if use_gpu else {})  # the ingest's, which no GPU worker takes
        held.update(evaluation.bundle if gpus is not None and evaluating else {})
        for bundle in [config.worker_bundle(use_gpu)] * workers + group:
            held.update(bundle)
        # so the run restarts with more workers, and the places asked for are given back
        assert most_workers(config, use_gpu, beside_evaluation(config, held)) > workers


class FakeCluster:
    """Stands for `Demand`: places of one pool, given to the groups that ask first and fit."""

    def __init__(self, **free: float):
        self.free = Counter(free)

    def __call__(self) -> "FakeCluster.Asking":
        return self.Asking(self)

    class Asking:
        def __init__(self, cluster: "FakeCluster"):
            self.cluster, self.groups, self.held = cluster, [], []

        def want(self, groups):
            for group in filter(None, self.held):
                self.cluster.free.update(group)
            self.groups, self.held = groups, [None] * len(groups)

        def found(self):
            for at, group in enumerate(self.groups):
                need = sum(map(Counter, group), Counter())
                if self.held[at] is None and all(self.cluster.free[name] >= need[name] for name in need):
                    self.cluster.free.subtract(need)
                    self.held[at] = need
            return [held is not None for held in self.held]


@pytest.mark.parametrize(
    ("use_gpu", "evaluation", "there", "count"),
    [
        (False, EvaluationConfig(), {"CPU": 5}, 4),
        (False, EvaluationConfig("held-out"), {"CPU": 5}, 2),  # three do not share a batch evenly
        (False, EvaluationConfig("held-out"), {"CPU": 6}, 4),
        (True, EvaluationConfig("held-out", gpus=0), {"CPU": 2, "GPU": 4}, 4),
        (True, EvaluationConfig("held-out", gpus=1), {"CPU": 8, "GPU": 4}, 2),
        (True, EvaluationConfig("held-out", gpus=1), {"CPU": 8, "GPU": 5}, 4),
        (False, EvaluationConfig("held-out"), {"CPU": 2}, 1),  # the fewest do not wait for an evaluation's place
    ],
)
def test_an_elastic_run_starts_with_what_an_evaluation_leaves_and_never_restarts_for_its_place(
    attempts, monkeypatch, use_gpu, evaluation, there, count
):
    import ray

    cluster = FakeCluster(**there)
    monkeypatch.setattr("goal_ray.train.attempts.Demand", cluster)
    monkeypatch.setattr("goal_ray.train.attempts.SETTLED_S", 0.0)
    monkeypatch.setattr("goal_ray.train.attempts.draining_nodes", set)
    monkeypatch.setattr("goal_ray.train.attempts.cluster_resources", lambda: there)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "driver"))
    attempts.config, attempts.use_gpu = elastic((1, 4), evaluation=evaluation), use_gpu
    workers = attempts._wait_for_workers()
    assert workers == count
    assert cluster.free == Counter(there)
    more = cluster()
    for bundle in [attempts.config.worker_bundle(use_gpu)] * workers + [{"CPU": 1.0}]:
        cluster.free.subtract(bundle)
    more.want(growth(attempts.config, use_gpu, workers, evaluating=False))
    assert not any(more.found())
    attempts.room_since = -GROW_AFTER_S  # whatever it was that was found
    assert attempts._reason_to_end(workers, more) is None


def test_an_evaluation_s_place_is_left_free_where_other_work_holds_some_of_the_cluster(attempts, monkeypatch):
    monkeypatch.setattr("goal_ray.train.attempts.Demand", FakeCluster(CPU=5))
    monkeypatch.setattr("goal_ray.train.attempts.SETTLED_S", 0.0)
    monkeypatch.setattr("goal_ray.train.attempts.cluster_resources", lambda: {"CPU": 64})
    attempts.config = elastic((1, 4))
    assert attempts._wait_for_workers() == 4
    attempts.config = elastic((1, 4), evaluation=EvaluationConfig("held-out"))
    assert attempts._wait_for_workers() == 2  # three do not share a batch evenly
    attempts.evaluations.running = 5, None  # it has its place, beside those five
    monkeypatch.setattr(attempts.evaluations, "poll", lambda **_: None)
    assert attempts._wait_for_workers() == 4


def test_a_run_grows_into_what_the_workers_and_an_evaluation_leave(attempts, monkeypatch):
    import ray

    monkeypatch.setattr("goal_ray.train.attempts.draining_nodes", set)
    monkeypatch.setattr("goal_ray.train.attempts.cluster_resources", lambda: {"CPU": 6})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "driver"))
    attempts.config = elastic((1, 4), evaluation=EvaluationConfig("held-out"))
    attempts.room_since = -GROW_AFTER_S
    assert attempts._reason_to_end(2, Demand()) == "resized"


def test_a_run_that_restarts_for_more_workers_in_vain_waits_longer_before_it_does_again(attempts, monkeypatch):
    waits, found = [], iter([1, 1, 1, 2])

    def attempt(*_):
        waits.append(attempts.grow_after_s / GROW_AFTER_S)
        if len(waits) == 4:
            raise StageError("seen enough")
        return "resized"

    monkeypatch.setattr(attempts, "_attempt", attempt)
    monkeypatch.setattr(attempts, "_wait_for_workers", lambda: next(found))
    with pytest.raises(StageError, match="seen enough"):
        attempts.run(None)
    assert waits == [1, 2, 4, 1]


def test_a_worker_that_dies_after_the_last_checkpoint_leaves_a_finished_run(attempts, monkeypatch):
    monkeypatch.setattr("goal_ray.train.attempts.newest_intact", None)
    tried = []

    def attempt(_, workers):
        assert not tried
        tried.append(workers)
        attempts.newest_saved = attempts.job["total_steps"]
        raise WorkerDied("a training worker died")

    monkeypatch.setattr(attempts, "_attempt", attempt)
    monkeypatch.setattr(attempts, "_wait_for_workers", lambda: 2)
    attempts.config = elastic(2, max_failures=0)
    assert attempts.run(None) == "finished"
    assert tried == [2]


@pytest.fixture
def at_work(attempts, monkeypatch):
    """Attempts whose workers, of no cluster, are at work until the test's end."""
    import ray

    over = threading.Event()
    trainer = SimpleNamespace(fit=over.wait)
    monkeypatch.setattr(attempts, "_trainer", lambda *_: trainer)
    monkeypatch.setattr(attempts, "_wait_for_workers", lambda: 1)
    monkeypatch.setattr("goal_ray.train.attempts.POLL_S", 0.01)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    yield attempts
    over.set()


def mailbox(take) -> SimpleNamespace:
    return SimpleNamespace(take=SimpleNamespace(remote=take), stop=SimpleNamespace(remote=list))


def test_a_driver_that_loses_its_mailbox_starts_no_workers_beside_the_living(at_work, monkeypatch):
    import ray

    def get(_):
        raise ray.exceptions.RayActorError

    opened = []
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr("goal_ray.train.attempts.open_mailbox", lambda: opened.append(1) or mailbox(list))
    with pytest.raises(StageError, match=r"the driver, not a worker, failed \(RayActorError.*--resume") as caught:
        at_work.run(None)
    assert not isinstance(caught.value, WorkerDied)
    assert opened == [1]


def test_an_evaluation_begins_when_the_workers_have_their_places(at_work, monkeypatch):
    import ray

    letters = [[], [{"node": "a"}], []]
    polled = []

    def poll(may_start):
        polled.append(may_start)
        if not letters:
            raise StageError("seen enough")

    monkeypatch.setattr(ray, "get", lambda letter: letter)
    monkeypatch.setattr("goal_ray.train.attempts.open_mailbox", lambda: mailbox(lambda: letters.pop(0)))
    monkeypatch.setattr(at_work, "_reason_to_end", lambda *_: None)
    monkeypatch.setattr(at_work.evaluations, "poll", poll)
    with pytest.raises(StageError, match="seen enough"):
        at_work.run(None)
    assert polled == [False, True, True]


def test_a_checkpoint_that_a_worker_saved_elsewhere_ends_the_run_by_its_setting(attempts, monkeypatch, tmp_path):
    monkeypatch.setattr("goal_ray.train.attempts.SEEN_S", 0.0)
    with pytest.raises(StageError, match=r"storage_path: .* is not one folder.*step-00000005.*that all nodes share"):
        attempts._receive({"saved": 5})
    for step in (5, 10):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    attempts._receive({"saved": 5})
    attempts._receive({"saved": 7})  # there was one, until the newer ones were enough
    assert attempts.newest_saved == 7


def test_a_run_that_another_driver_took_over_ends(attempts):
    attempts.lock.path.write_text('{"pid": 7, "host": "node-3"}')
    with pytest.raises(StageError, match=r"taken over by another driver \(process 7 on node-3\)"):
        attempts._reason_to_end(1, Demand())


def test_a_loss_that_is_not_finite_is_told_by_every_worker_and_counted_once(attempts, monkeypatch):
    counted = []
    monkeypatch.setattr(attempts.recorder.prometheus, "count", lambda *what: counted.append(what))
    for rank in range(3):
        assert is_sent({"nonfinite": 4}, rank)
        attempts._receive({"nonfinite": 4})
    assert counted == [("nonfinite_losses",)]
    assert is_sent({"saved": 4}, 0)
    assert not is_sent({"saved": 4}, 1)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_fewer_workers_take_the_same_micro_batch_in_chunks_of_what_a_worker_can_hold(workers):
    config = elastic((1, 4))
    assert config.global_batch == 16
    assert config.worker_batch(workers) * workers == 16
    assert config.worker_batch(workers) / config.chunks(workers) == 4


def test_a_chunk_bounds_what_goes_through_the_towers_at_once():
    config = elastic(2, batch=10, chunk=4)
    assert (config.worker_batch(2), config.chunks(2)) == (10, 3)
    assert elastic(2, batch=10).chunks(2) == 1
