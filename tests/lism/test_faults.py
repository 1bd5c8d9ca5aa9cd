"""Exactly once under faults: whatever dies, the outputs are those of an undisturbed run."""

import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from chaos import DEADLY
from odd_tars import good, picture, write_members

from goal_ray.atomic import write_bytes
from goal_ray.config import load_config
from goal_ray.lism.config import LismConfig
from goal_ray.lism.run import run_lism
from goal_ray.storage import list_names, read_bytes

pytestmark = pytest.mark.ray

TARS, SAMPLES = 16, 6
DEADLY_TAR, DEADLY_KEY = "t3.tar", "04"
ROOT = Path(__file__).parents[2]


def write_tars(folder: Path, deadly: bytes) -> Path:
    """Tars of usable samples, and one whose picture is given."""
    folder.mkdir()
    for tar in range(TARS):
        members = [member for n in range(SAMPLES) for member in good(f"{n:02}", seed=SAMPLES * tar + n)]
        if f"t{tar}.tar" == DEADLY_TAR:
            members = [(name, deadly if name == f"{DEADLY_KEY}.png" else data) for name, data in members]
        write_members(folder / f"t{tar}.tar", members)
    return folder


def tars_of(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of the paired tars."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def leftovers(folder: Path) -> list[str]:
    """Hidden files anywhere in a folder."""
    return [str(path) for path in folder.rglob(".*")]


def quarantined(folder: Path) -> list[tuple[str, str, str]]:
    """(shard, key, reason) of every sample that was left out."""
    lines = [line for path in (folder / "quarantine").iterdir() for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    return [(record["shard"], record["key"], record["reason"]) for record in records]


def is_whole(path: Path) -> bool:
    """Whether a tar stands complete, to its very end."""
    try:
        with tarfile.open(path) as tar:
            return bool(tar.getmembers()) and path.stat().st_size % tarfile.RECORDSIZE == 0
    except tarfile.TarError:
        return False


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Looks at every visible tar of a folder while the block runs, again and again; collects those not whole."""
    torn, over = [], threading.Event()

    def look() -> None:
        while not over.wait(0.1):
            torn.extend(path.name for path in folder.glob("*.tar") if not is_whole(path))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield torn
    finally:
        over.set()
        watcher.join()


@pytest.fixture(scope="module")
def undisturbed(cluster, tiny_clip, tmp_path_factory) -> dict[str, bytes]:  # noqa: ARG001
    """The tars of a run in which nothing dies, and the deadly picture is a broken one."""
    folder = tmp_path_factory.mktemp("undisturbed")
    fixed = ["proposer.name=grid", f"matcher.model.name={tiny_clip}", "images_per_batch=4", "max_bad_share=1"]
    source = write_tars(folder / "in", deadly=picture()[:50])
    run_lism(str(source), str(folder / "out"), load_config(LismConfig, overrides=fixed))
    return tars_of(folder / "out")


def run_python(*arguments: object) -> subprocess.Popen:
    """Starts this Python on our code, with a Ray of its own; its environment is what this process's is now."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, [ROOT, here, here.parent]))
    environment = {**os.environ, "PYTHONPATH": paths, "RAY_USAGE_STATS_ENABLED": "0"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_deaths_of_workers_and_of_a_node_change_no_output(undisturbed, tiny_clip, tmp_path, seed):
    source = write_tars(tmp_path / "in", deadly=picture(colour=DEADLY))
    with watched(tmp_path / "out") as torn:
        chaos = run_python(Path(__file__).parent / "chaos.py", source, tmp_path / "out", tiny_clip, seed)
        printed, errors = chaos.communicate()
    assert chaos.returncode == 0, errors
    # Not always the last line: other libraries print too.
    (happened,) = re.findall("happened: (.*)$", printed, re.MULTILINE)
    assert {*happened.split()} >= {"MapWorker", "Strikes", "node"}
    assert torn == []
    assert tars_of(tmp_path / "out") == undisturbed
    ((shard, key, reason),) = quarantined(tmp_path / "out")
    assert (shard, key) == (DEADLY_TAR, DEADLY_KEY)
    assert "its worker died" in reason
    assert leftovers(tmp_path / "out") == []


def start_cli(source: str, target: str, clip: str) -> subprocess.Popen:
    """Starts `goal-ray lism` with a private cluster."""
    settings = ["proposer.name=grid", f"matcher.model.name={clip}", "images_per_batch=4", "max_bad_share=1"]
    return run_python("-m", "goal_ray.lism", source, target, *settings)


def kill_driver(driver: subprocess.Popen, target: str, tars: int) -> list[psutil.Process]:
    """Kills a driver once there are so many tars, and with it every process it had started.

    Ray's agents, which hold nothing, notice it within a minute and are returned.
    """
    while sum(name.endswith(".tar") for name in list_names(target)) < tars:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)  # the storage may be served by this very process
    mine = psutil.Process(driver.pid).children(recursive=True)
    agents = [process for process in mine if "Agent" in process.name()]
    driver.kill()
    _, alive = psutil.wait_procs([process for process in mine if process not in agents], timeout=30)
    assert alive == []
    driver.communicate()
    return agents


@pytest.mark.slow
def test_drivers_that_are_killed_again_and_again_change_no_output(undisturbed, tiny_clip, tmp_path):
    source, target = write_tars(tmp_path / "in", deadly=picture()[:50]), tmp_path / "out"
    agents = []
    with watched(target) as torn:
        for tars in (0, 1, 5, TARS - 1):
            agents += kill_driver(start_cli(source, target, tiny_clip), str(target), tars)
        last = start_cli(source, target, tiny_clip)
        _, errors = last.communicate()
    assert last.returncode == 0, errors
    assert torn == []
    assert tars_of(target) == undisturbed
    assert leftovers(target) == []
    assert psutil.wait_procs(agents, timeout=90)[1] == []


@pytest.mark.slow
def test_on_s3_a_run_goes_on_after_its_driver_was_killed(undisturbed, tiny_clip, tmp_path, s3):
    source = write_tars(tmp_path / "in", deadly=picture()[:50])
    for path in source.iterdir():
        write_bytes(f"{s3}/in/{path.name}", path.read_bytes())
    kill_driver(start_cli(f"{s3}/in", f"{s3}/out", tiny_clip), f"{s3}/out", tars=3)
    before = set(list_names(f"{s3}/out"))
    assert len({name for name in before if name.endswith(".tar")}) < TARS
    again = start_cli(f"{s3}/in", f"{s3}/out", tiny_clip)
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert f"samples {TARS * SAMPLES}: paired {TARS * SAMPLES - 1}, quarantined 1" in printed
    names = [name for name in list_names(f"{s3}/out") if name.endswith(".tar")]
    assert {name: read_bytes(f"{s3}/out/{name}") for name in names} == undisturbed
