"""What clouds do to a cluster that grows and shrinks: nothing is lost, nothing comes twice, and how long it takes.

`make chaos` runs all of it and prints the times; CI runs the shorter tests of deaths in tests/lism and tests/train.
"""

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from fake_cluster import FakeCluster
from processes import workers_below

from goal_ray.atomic import write_bytes
from goal_ray.jsonl import read_records
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.storage import list_names, read_bytes

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PATIENCE_S = 400
TARS, SAMPLES = 12, 8
STEPS, SAVED = 40, 5
KINDS = {
    "decode": {"resources": {"CPU": 2, "decode": 1}, "min": 1, "max": 1},
    "segment": {"resources": {"CPU": 1, "segment": 1}, "min": 2, "max": 3},
    "train": {"resources": {"CPU": 1, "train": 1}, "min": 2, "max": 3},
}


@pytest.fixture(scope="module")
def fake(s3_server, tmp_path_factory) -> Iterator[FakeCluster]:  # noqa: ARG001 (its address is in the environment)
    with FakeCluster(tmp_path_factory.mktemp("fake"), KINDS, idle_minutes=5) as cluster:
        cluster.wait_until(lambda: len(cluster.raylets()) == 5, 120)
        yield cluster


class Lism:
    """LISM from one place to another, on nodes of their own."""

    def __init__(self, fake: FakeCluster, clip: str, source: str, target: str):
        self.fake, self.target = fake, target
        settings = ["fused=true", "proposer_actors=[2,2]", "actor_resources={segment: 1}", "images_per_batch=4"]
        self.command = ["-m", "goal_ray.lism", source, target, f"matcher.model.name={clip}", *settings]

    def start(self) -> subprocess.Popen:
        return self.fake.start(*self.command)

    def tars(self) -> dict[str, bytes]:
        names = [name for name in list_names(self.target) if name.endswith(".tar")]
        return {name: read_bytes(f"{self.target}/{name}") for name in names}

    def wait(self, driver: subprocess.Popen, tars: int) -> float:
        """Waits until so many tars are there; returns how long it took."""
        return wait_for(driver, lambda: sum(name.endswith(".tar") for name in list_names(self.target)) >= tars)


class Training:
    """A training of two workers on nodes of their own."""

    def __init__(self, fake: FakeCluster, clip: str, shards: str, runs: Path):
        self.fake, self.run_dir = fake, runs / "goal"
        runs.mkdir()
        (runs / "train.yaml").write_text(
            f"model: {{name: {clip}}}\ndata: {{shards: '{shards}'}}\noptimizer: {{lr: 1.0e-3, warmup_steps: 3}}\n"
            f"workers: 2\nworker_resources: {{train: 1}}\nbatch_per_worker: 4\nepochs: 100\nmax_steps: {STEPS}\n"
            f"precision: fp32\ncheckpoint_every: {SAVED}\nlog_every: 1\nstorage_path: {runs}\n"
        )
        self.command = ["-m", "goal_ray.train", runs / "train.yaml"]

    def start(self, *more: str) -> subprocess.Popen:
        return self.fake.start(*self.command, *more)

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in read_records(self.run_dir / "metrics.jsonl")]

    def wait(self, driver: subprocess.Popen, steps: int) -> float:
        """Waits until so many steps are logged; returns how long it took."""
        return wait_for(driver, lambda: len(self.losses()) >= steps)


def wait_for(driver: subprocess.Popen, happened: Callable[[], bool]) -> float:
    began = time.monotonic()
    while not happened():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() - began < PATIENCE_S
        time.sleep(0.05)
    return time.monotonic() - began


class SmallDisk:
    """A file system of its own, with room for so many bytes."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting a file system needs root")

    def give(self, size_bytes: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size_bytes}", self.folder], check=True)

    def end(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)


@pytest.fixture
def disk(tmp_path) -> Iterator[SmallDisk]:
    disk = SmallDisk(tmp_path / "disk")
    yield disk
    disk.end()


def size_below(folder: Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fail(driver: subprocess.Popen) -> str:
    """Waits for a driver that must fail; returns what it said."""
    _, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 2, errors
    return errors


def finish(driver: subprocess.Popen) -> str:
    """Waits for a driver that must succeed; returns what it said."""
    _, errors = driver.communicate(timeout=PATIENCE_S)
    assert driver.returncode == 0, errors
    return errors


def node_with(fake: FakeCluster, worker: str) -> psutil.Process:
    """A node on which a worker of this name runs."""
    for raylet in fake.raylets():
        if workers_below(raylet, worker):
            return raylet
    raise AssertionError(f"no node runs {worker}")


def end_node(raylet: psutil.Process) -> None:
    """Kills a node with all that runs on it, as a machine goes that loses its power."""
    for process in [*raylet.children(recursive=True), raylet]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


@contextmanager
def slowed(raylet: psutil.Process) -> Iterator[None]:
    """Lets a node and all that runs on it work for a fifth of the time only, as an overcommitted machine does."""
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.1):
            node = [raylet, *raylet.children(recursive=True)]
            for process in node:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            over.wait(0.4)
            for process in node:
                with suppress(psutil.NoSuchProcess):
                    process.resume()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextmanager
def stopwatch(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"\n{what}: {time.monotonic() - began:.1f} s")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chaos") / "scenes"
    draw_scenes(folder, TARS * SAMPLES, 0, SceneSettings(size=192, shard_size=SAMPLES))
    return str(folder)


@pytest.fixture(scope="module")
def paired(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("chaos") / "paired"
    draw_scenes(folder, 32, 0, SceneSettings(size=64, shard_size=8, paired=True))
    return str(folder)


@pytest.fixture(scope="module")
def tars(fake, scenes, tiny_clip, tmp_path_factory) -> dict[str, bytes]:
    """What LISM makes of the scenes when nothing happens."""
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path_factory.mktemp("undisturbed") / "out"))
    with stopwatch("LISM, undisturbed"):
        finish(lism.start())
    assert len(lism.tars()) == TARS
    return lism.tars()


@pytest.fixture(scope="module")
def losses(fake, paired, tiny_clip, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of a training in which nothing happens."""
    training = Training(fake, tiny_clip, paired, tmp_path_factory.mktemp("undisturbed") / "runs")
    with stopwatch("training, undisturbed"):
        finish(training.start())
    assert [step for step, _ in training.losses()] == list(range(1, STEPS + 1))
    return training.losses()


def test_lism_outlives_a_node(fake, scenes, tars, tiny_clip, tmp_path):
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path / "out"))
    driver = lism.start()
    lism.wait(driver, 3)
    end_node(node_with(fake, "StageActor"))
    done = len(lism.tars())
    print(f"\nLISM, a node killed: the next tar after {lism.wait(driver, done + 1):.1f} s")
    with stopwatch("and from then on, with what the dead node had in hand"):
        finish(driver)
    assert lism.tars() == tars


def test_lism_goes_on_after_its_driver_was_killed(fake, scenes, tars, tiny_clip, tmp_path):
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path / "out"))
    driver = lism.start()
    lism.wait(driver, 3)
    driver.kill()
    driver.communicate()
    done = len(lism.tars())
    again = lism.start()
    print(f"\nLISM, the driver killed: the next tar after {lism.wait(again, done + 1):.1f} s")
    finish(again)
    assert lism.tars() == tars


def test_lism_goes_on_beside_full_object_stores(fake, scenes, tars, tiny_clip, tmp_path):
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path / "out"))
    filler = fake.start(Path(__file__).with_name("fill_store.py"))
    try:
        assert any(line.startswith("filled") for line in iter(filler.stdout.readline, ""))
        with stopwatch("LISM beside full object stores"):
            finish(lism.start())
    finally:
        filler.kill()
        filler.communicate()
    assert lism.tars() == tars


def test_lism_waits_for_a_storage_that_is_away(fake, scenes, tars, tiny_clip, s3, s3_server):
    for name in list_names(scenes):
        if name.endswith(".tar"):
            write_bytes(f"{s3}/in/{name}", read_bytes(f"{scenes}/{name}"))
    lism = Lism(fake, tiny_clip, f"{s3}/in", f"{s3}/out")
    driver = lism.start()
    lism.wait(driver, 2)
    back = s3_server.fail_for(seconds=20)
    back.join()
    done = len(lism.tars())
    print(f"\nLISM, its storage away for 20 s: the next tar {lism.wait(driver, done + 1):.1f} s after it was back")
    finish(driver)
    assert lism.tars() == tars


def test_lism_waits_for_a_node_that_stands_still(fake, scenes, tars, tiny_clip, tmp_path):
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path / "out"))
    driver = lism.start()
    lism.wait(driver, 2)
    slow = workers_below(node_with(fake, "StageActor"), "StageActor")
    for process in slow:
        process.suspend()
    waking = threading.Timer(20, lambda: [process.resume() for process in slow])
    waking.start()
    with stopwatch("LISM, an actor that stands still for 20 s: the rest"):
        finish(driver)
    waking.join()
    assert lism.tars() == tars


def test_lism_goes_on_beside_a_slow_node(fake, scenes, tars, tiny_clip, tmp_path):
    lism = Lism(fake, tiny_clip, scenes, str(tmp_path / "out"))
    driver = lism.start()
    lism.wait(driver, 2)
    with slowed(node_with(fake, "StageActor")), stopwatch("LISM, a node slowed to a fifth: the rest"):
        finish(driver)
    assert lism.tars() == tars


def test_lism_goes_on_after_its_disk_was_full(fake, scenes, tars, tiny_clip, disk):
    lism = Lism(fake, tiny_clip, scenes, str(disk.folder / "out"))
    disk.give(sum(map(len, tars.values())) // 2)
    said = fail(lism.start())
    assert "No space left on device" in said
    assert "run the same command again" in said
    assert "Traceback" not in said
    assert lism.tars().items() < tars.items()
    assert not list((disk.folder / "out").rglob("*.tmp"))
    disk.give(1 << 30)
    with stopwatch("LISM, its disk full half-way: the rest"):
        finish(lism.start())
    assert lism.tars() == tars


def test_a_training_outlives_a_node(fake, paired, losses, tiny_clip, tmp_path):
    training = Training(fake, tiny_clip, paired, tmp_path / "runs")
    driver = training.start()
    training.wait(driver, 2 * SAVED + 2)
    end_node(node_with(fake, "RayTrainWorker"))
    reached = len(training.losses())
    rewound = wait_for(driver, lambda: len(training.losses()) < reached)
    again = training.wait(driver, reached + 2)
    print(f"\ntraining, a node killed: noticed after {rewound:.1f} s, where it had been after {again:.1f} s more")
    said = finish(driver)
    assert "restart 1 of" in said
    assert training.losses() == losses


def test_a_training_waits_for_a_slow_node(fake, paired, losses, tiny_clip, tmp_path):
    training = Training(fake, tiny_clip, paired, tmp_path / "runs")
    driver = training.start()
    training.wait(driver, 2)
    with slowed(node_with(fake, "RayTrainWorker")), stopwatch("training, a node slowed to a fifth: the rest"):
        said = finish(driver)
    assert "restart" not in said
    assert training.losses() == losses


def test_a_training_goes_on_after_its_driver_was_killed(fake, paired, losses, tiny_clip, tmp_path):
    training = Training(fake, tiny_clip, paired, tmp_path / "runs")
    driver = training.start()
    training.wait(driver, SAVED + 2)
    driver.kill()
    driver.communicate()
    again = training.start("--resume")
    print(f"\ntraining, the driver killed: step {STEPS // 2} after {training.wait(again, STEPS // 2):.1f} s")
    finish(again)
    assert training.losses() == losses


def test_a_training_goes_on_after_its_disk_was_full(fake, paired, losses, tiny_clip, disk):
    training = Training(fake, tiny_clip, paired, disk.folder / "runs")
    disk.give(1 << 30)
    driver = training.start()
    training.wait(driver, 2 * SAVED)
    disk.give(size_below(disk.folder) + (1 << 16))
    said = fail(driver)
    assert "No space left on device" in said
    assert "--resume" in said
    assert "Traceback" not in said
    disk.give(1 << 30)
    with stopwatch("training, its disk full half-way: the rest"):
        finish(training.start("--resume"))
    assert training.losses() == losses


def test_a_training_waits_for_a_storage_that_is_away(fake, paired, losses, tiny_clip, tmp_path, s3, s3_server):
    for name in list_names(paired):
        if name.endswith(".tar"):
            write_bytes(f"{s3}/{name}", read_bytes(f"{paired}/{name}"))
    training = Training(fake, tiny_clip, s3, tmp_path / "runs")
    driver = training.start()
    training.wait(driver, 1)
    back = s3_server.fail_for(seconds=20)
    with stopwatch("training, its storage away for 20 s: the rest"):
        finish(driver)
    back.join()
    assert training.losses() == losses
    assert json.loads((training.run_dir / "result.json").read_text())["steps"] == STEPS
