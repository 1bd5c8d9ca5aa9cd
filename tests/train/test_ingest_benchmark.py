"""The ingest benchmark: its tars, its arguments, its counting of CPU time. Its timings would mean nothing here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from goal_ray.errors import GoalRayError
from goal_ray.images import upright_size
from goal_ray.pairs import PairRecord
from goal_ray.tars import stream_samples
from goal_ray.train.ingest_benchmark import UsualPreparation, cpu_seconds, function_batches, main
from goal_ray.train.photo_tars import write_photo_tars

pytestmark = pytest.mark.ray

WORDS = ["the", "of", "photograph", "umbrella", "stones"]


def test_its_tars_keep_the_contract_and_are_the_same_every_time(tmp_path):
    first, again = (tmp_path / name for name in ("first", "again"))
    urls = write_photo_tars(first, (300, 200), 5, 2, WORDS)
    assert len(urls) == 2
    write_photo_tars(again, (300, 200), 5, 2, WORDS)
    for url in urls:
        assert Path(url).read_bytes() == (again / Path(url).name).read_bytes()
    samples = [sample for url in urls for sample in stream_samples(url)]
    assert len(samples) == 5
    for sample in samples:
        record = PairRecord.from_bytes(sample.members["pairs.json"], sample.caption(), "")
        assert upright_size(sample.image_bytes()) == record.size == (300, 200)
        assert 130 <= len(sample.caption().split()) <= 140
        assert len(record.sentences) == len(record.pairs) == 8


def test_both_ways_prepare_every_sample(tmp_path):
    urls = write_photo_tars(tmp_path, (300, 200), 8, 1, WORDS)
    ours = function_batches(urls, 4)
    assert [next(ours), next(ours)] == [4, 4]
    (sample, *_) = stream_samples(urls[0])
    shapes = [tuple(part.shape) for part in UsualPreparation()(sample.members)]
    assert shapes == [(3, 224, 224), (3, 224, 224), (248,), (248,)]


PARENT = """
import subprocess, sys
burn = "import time; [None for _ in iter(lambda: time.process_time() < 1, False)]; print(1, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", burn], stdin=-1)
input()
child.communicate(b"1")
print(1, flush=True)
input()
"""


@pytest.mark.parametrize("ended", [False, True])
def test_cpu_time_of_descendants_counts(ended):
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=-1, stdout=-1) as root:
        root.stdout.readline()
        if ended:
            root.stdin.write(b"1\n")
            root.stdin.flush()
            root.stdout.readline()
        seconds = cpu_seconds(root.pid)
        root.communicate(b"1\n1\n")
    assert 0.9 <= seconds <= 2  # ticks are hundredths


def test_missing_tars_are_refused(tmp_path):
    with pytest.raises(GoalRayError, match="no such file"):
        main(["--shards", str(tmp_path / "none.tar")])


@pytest.mark.slow
def test_the_command_measures_all_three_ways(tmp_path):
    urls = write_photo_tars(tmp_path, (300, 200), 16, 4, WORDS)
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "goal_ray.train.ingest_benchmark", "--shards", str(Path(urls[0]).parent)]
    subprocess.run([*command, "--batch", "4", "--seconds", "1", "--repeats", "1", "--out", str(out)], check=True)
    rows = json.loads(out.read_text())["runs"]
    assert [row["way"] for row in rows] == ["ray", "function", "webdataset"]
    assert all(row["runs"][0]["samples"] > 0 for row in rows)
