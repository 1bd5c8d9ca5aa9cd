"""One driver at a time in a run folder, and workers that see the same folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from goal_ray.atomic import process_place
from goal_ray.errors import StageError
from goal_ray.train import driver_lock as module
from goal_ray.train.driver_lock import DriverLock, driver_lock

DRIVER = """
import sys
from pathlib import Path
from goal_ray.train.driver_lock import driver_lock
with driver_lock(Path(sys.argv[1]), print):
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "goal"


@pytest.fixture
def said():
    return []


@pytest.fixture
def driver(run_dir):
    """Another driver at work in the run folder, on this machine."""
    command = [sys.executable, "-c", DRIVER, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        yield process
        process.kill()


def test_a_run_folder_with_a_driver_at_work_is_refused_to_another(driver, run_dir, said):
    before = (run_dir / "driver.json").read_text()
    with (
        pytest.raises(StageError, match=rf"in use by another driver \(process {driver.pid} on .*--resume"),
        driver_lock(run_dir, said.append),
    ):
        pass
    assert (run_dir / "driver.json").read_text() == before
    assert said == []


def test_a_driver_that_was_killed_holds_its_run_folder_no_more(driver, run_dir, monkeypatch, said):
    monkeypatch.setattr(module, "is_refreshed", None)  # nothing is waited for
    driver.kill()
    driver.wait()
    with driver_lock(run_dir, said.append) as lock:
        lock.check_held()
        lock.check_seen()


def test_a_process_that_has_the_number_of_a_killed_driver_is_not_that(driver, run_dir, monkeypatch, said):
    monkeypatch.setattr(module, "is_refreshed", None)
    path = run_dir / "driver.json"
    found = json.loads(path.read_text())
    assert found["pid"] == driver.pid
    path.write_text(json.dumps({**found, "started": "1"}))
    with driver_lock(run_dir, said.append) as lock:
        lock.check_held()


def elsewhere(run_dir) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "driver.json").write_text(json.dumps({"place": "another", "pid": 1, "host": "node-3"}))


def test_a_driver_on_another_machine_that_refreshes_its_file_keeps_the_run(run_dir, monkeypatch, said):
    elsewhere(run_dir)
    path = run_dir / "driver.json"
    text = path.read_text()
    times = iter(range(9))
    monkeypatch.setattr(module, "mark", lambda _: (next(times), text))
    with (
        pytest.raises(StageError, match=r"in use by another driver \(process 1 on node-3\)"),
        driver_lock(run_dir, said.append),
    ):
        pass
    assert "may be in use by another driver (process 1 on node-3)" in said[0]


def test_a_driver_on_another_machine_that_refreshes_nothing_is_dead(run_dir, monkeypatch, said):
    monkeypatch.setattr(module, "FRESH_S", 0.0)
    elsewhere(run_dir)
    with driver_lock(run_dir, said.append) as lock:
        lock.check_held()
        assert json.loads(lock.path.read_text())["place"] == process_place()


def test_a_driver_refreshes_its_own_file_alone(run_dir, monkeypatch):
    monkeypatch.setattr(module, "REFRESH_S", 0.01)
    elsewhere(run_dir)
    path = run_dir / "driver.json"
    monkeypatch.setattr(module, "FRESH_S", 60.0)
    with driver_lock(run_dir.with_name("own"), print) as lock:
        assert module.is_refreshed(lock.path)
        monkeypatch.setattr(module, "FRESH_S", 0.0)
        assert not module.is_refreshed(path)


def test_a_folder_made_for_a_run_that_leaves_nothing_goes_again(run_dir, tmp_path, said):
    with driver_lock(run_dir, said.append):
        assert (run_dir / "driver.json").exists()
    assert list(tmp_path.iterdir()) == []
    with driver_lock(run_dir, said.append):
        (run_dir / "config.yaml").touch()
    assert [path.name for path in run_dir.iterdir()] == ["config.yaml"]


def test_a_full_disk_is_told_by_the_setting_and_leaves_no_lock(run_dir, tmp_path, monkeypatch, said):
    real = Path.open

    def full(path, mode="r", **more):
        if mode != "x":
            return real(path, mode, **more)
        path.touch()
        return real(Path("/dev/full"), "w")

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(StageError, match=r"storage_path: .*No space left"), driver_lock(run_dir, said.append):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_driver_whose_run_was_taken_over_leaves_it_to_the_other(run_dir, said):
    with driver_lock(run_dir, said.append) as lock:
        lock.path.write_text("another's")
        with pytest.raises(StageError, match="taken over by another driver"):
            lock.check_held()
    assert lock.path.read_text() == "another's"


@pytest.mark.parametrize(
    ("there", "sign"), [(None, "is not there"), ("an older run's copy", r"driver\.json is another driver's")]
)
def test_a_worker_that_sees_another_folder_is_told_the_setting(run_dir, monkeypatch, there, sign):
    monkeypatch.setattr(module, "SEEN_S", 0.0)
    monkeypatch.setattr(module, "LOOK_S", 0.0)
    run_dir.mkdir(parents=True)
    lock = DriverLock(run_dir / "driver.json", "this run's")
    if there is not None:
        lock.path.write_text(there)
    with pytest.raises(
        StageError, match=rf"storage_path: .* is not one folder for the driver and all workers .*{sign}.*that all nodes"
    ):
        lock.check_seen()
