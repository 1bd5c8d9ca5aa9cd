"""`goal-ray submit` against a real head that wants a token."""

import json
import os
import secrets
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import open_clip
import pytest
import yaml
from fake_cluster import BIN, ROOT, end_with_children, free_port

from goal_ray.demo.run import HERE as DEMO
from goal_ray.scenes.run import SceneSettings, draw_scenes

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Head:
    """A head on loopback, of two CPUs and a dashboard."""

    address: str
    token: str
    log: Path

    def client(self, token: str | None) -> dict[str, str]:
        """The environment of somebody who has this token, or none."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PYTHONPATH": str(ROOT), "HOME": str(self.log.parent)}
        return environment | ({} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token})

    def submit(self, *arguments: object, token: str | None) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "goal_ray", "submit", "--address", self.address, *map(str, arguments)]
        return subprocess.run(command, env=self.client(token), capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("head")
    port, made = free_port(), Head("", secrets.token_hex(32), folder / "head.log")
    environment = made.client(made.token) | {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds to 127.0.0.1
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}"]
    command += ["--num-cpus=4", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # jobs wait for ever where another Ray has it
    with made.log.open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            head = Head(f"http://127.0.0.1:{port}", made.token, made.log)
            while True:
                assert process.poll() is None, head.log.read_text()
                try:
                    urllib.request.urlopen(f"{head.address}/api/version", timeout=5)
                except urllib.error.HTTPError:  # it answers
                    break
                except OSError:
                    time.sleep(0.2)
            yield head
        finally:
            end_with_children(process)


@pytest.mark.parametrize(("token", "code"), [(None, 401), ("0" * 64, 403)])
def test_without_the_right_token_the_head_refuses_a_request(head, token, code):
    request = urllib.request.Request(f"{head.address}/api/jobs/")
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=30)
    assert refusal.value.code == code


def test_without_a_token_nothing_is_submitted_and_the_remedy_is_said(head):
    refused = head.submit("train", "x.yaml", token=None)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_demo_s_training_runs_as_a_job_that_is_followed_to_its_checkpoint(head, tiny_clip, tmp_path):
    draw_scenes(tmp_path / "scenes", 24, 0, SceneSettings(size=64, shard_size=12, paired=True))
    recipe = yaml.safe_load((DEMO / "finetune.yaml").read_text())
    recipe["model"]["name"] = "model.json"  # in the working folder, which travels with the job
    recipe["data"]["shards"] = str(tmp_path / "scenes")
    work = tmp_path / "work"
    work.mkdir()
    (work / "finetune.yaml").write_text(yaml.safe_dump(recipe))
    (work / "environment.yaml").write_text("env_vars: {GOAL_RAY_LOG: json}")
    (work / "model.json").write_text(Path(tiny_clip).read_text())
    settings = ["max_steps=4", "checkpoint_every=2", "batch_per_worker=4", f"storage_path={tmp_path}/runs"]
    options = ["--working-dir", work, "--runtime-env", work / "environment.yaml", "--name", "goal-1"]
    job = head.submit(*options, "train", "finetune.yaml", *settings, token=head.token)
    assert job.returncode == 0, job.stderr + job.stdout
    assert "trained 4 steps" in job.stdout
    assert "job goal-1 succeeded" in job.stderr
    assert json.loads((tmp_path / "runs/goal/checkpoints/step-00000004/state.json").read_text())["step"] == 4
    open_clip.create_model(f"local-dir:{tmp_path}/runs/goal/model")
    events = [json.loads(line) for line in job.stdout.splitlines() if line.startswith('{"asctime"')]
    saved = [
        (event["run"], event["stage"], event["step"]) for event in events if event["message"] == "checkpoint saved"
    ]
    assert saved == [(f"{tmp_path}/runs/goal", "train", 2), (f"{tmp_path}/runs/goal", "train", 4)]
    assert head.token not in job.stdout + job.stderr + head.log.read_text()


def test_a_job_that_fails_fails_the_command_with_the_job_s_own_error(head, tmp_path):
    job = head.submit("--working-dir", tmp_path, "train", "none.yaml", token=head.token)
    assert job.returncode == 2
    assert "none.yaml: no such config file" in job.stdout
    assert "failed" in job.stderr


def test_a_job_whose_own_process_needs_a_gpu_waits_for_a_node_that_has_one(head, tmp_path):
    submitted = head.submit(
        "--working-dir", tmp_path, "--name", "measured", "--gpus", 1, "--no-wait", "evaluate", "x", token=head.token
    )
    assert submitted.returncode == 0, submitted.stderr
    request = urllib.request.Request(f"{head.address}/api/jobs/measured")
    request.add_header("Authorization", f"Bearer {head.token}")
    with urllib.request.urlopen(request, timeout=30) as answer:
        job = json.load(answer)
    assert job["status"] == "PENDING"
    assert "waiting for resources" in job["message"]


def test_an_address_where_nothing_is_and_a_folder_that_is_not_there_are_refused(head, tmp_path, call):
    status, _, complaint = call("submit", "--address", f"http://127.0.0.1:{free_port()}", "train", "x.yaml")
    assert (status, complaint[:7]) == (2, "error: ")
    assert "--address" in complaint
    status, _, complaint = call("submit", "--address", head.address, "--working-dir", tmp_path / "no", "train")
    assert (status, "no such folder" in complaint) == (2, True)
