"""Memory stays flat: a run over far more pixels than its object store holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flat_memory import STORE_BYTES
from odd_tars import picture, write_members

from goal_ray.lism.counts import ShardCounts
from goal_ray.lism.output import OutputFolder

pytestmark = pytest.mark.ray

HERE = Path(__file__).parent
SIZE = (1000, 800)
TARS, SAMPLES = 6, 60


@pytest.mark.slow
def test_ten_times_the_object_store_goes_through_without_spilling_and_without_growth(tiny_clip, tmp_path):
    assert TARS * SAMPLES * SIZE[0] * SIZE[1] * 3 > 10 * STORE_BYTES
    (tmp_path / "in").mkdir()
    for tar in range(TARS):
        colour = (40 * tar, 90, 200)
        plain = {".jpg": picture("JPEG", size=SIZE, colour=colour), ".txt": b"A plain field. It has one colour."}
        members = [(f"{n:03}{extension}", data) for n in range(SAMPLES) for extension, data in plain.items()]
        write_members(tmp_path / "in" / f"{tar}.tar", members)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, HERE / "flat_memory.py", tmp_path / "in", tmp_path / "out", tiny_clip]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["spilled"] == 0
    assert len(list((tmp_path / "out").glob("*.tar"))) == TARS
    for sizes in zip(*result["seen"], strict=True):  # of the driver, and of the largest worker
        warm = len(sizes) // 4
        assert max(sizes[2 * warm :]) < max(sizes[warm : 2 * warm]) + STORE_BYTES / 4


def test_a_thousand_finished_shards_are_recognised_by_their_listings(tmp_path):
    folder = OutputFolder(str(tmp_path))
    shards = {f"/in/{number:04}.tar": number for number in range(1000)}
    for shard, size in shards.items():
        folder.finish(shard, {}, [], ShardCounts(source_bytes=size))
    assert list(folder.finished(shards)) == list(shards)
