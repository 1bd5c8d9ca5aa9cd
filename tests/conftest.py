"""Fixtures shared by all tests: tiny real models, and one private Ray cluster for the whole session."""

import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from tiny_architecture import TINY_CLIP

# Tests are never timed: the machine may be busy.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")
# One thread per process: the suite's processes share few cores, and small tensors gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when they are first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that run on the cluster of the session."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of an open_clip architecture that runs in milliseconds."""
    path = tmp_path_factory.mktemp("model") / "tiny_clip.json"
    path.write_text(json.dumps(TINY_CLIP))
    return str(path)


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A local Ray cluster with room for two workers and data tasks."""
    from goal_ray.ray_session import ray_session

    with ray_session(busy_cpus=4):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real captions and weights, named by GOAL_RAY_SHARED; tests that need it are skipped without."""
    folder = os.environ.get("GOAL_RAY_SHARED")
    if not folder:
        pytest.skip("GOAL_RAY_SHARED names no folder with test data")
    return Path(folder)


class S3Server:
    """An S3 server on loopback. What it holds lies in this process and outlasts an outage."""

    def __init__(self) -> None:
        self.port = 0
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        """From now on connections are refused."""
        self.server.stop()
        self.server._server.server_close()

    def fail_for(self, seconds: float) -> threading.Timer:
        """Stops; starts again by itself after a while. Join what it returns."""
        self.stop()
        timer = threading.Timer(seconds, self.start)
        timer.start()
        return timer


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """An S3 server, which this process and those it starts know by their environment."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = S3Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
            patch.setenv(f"AWS_{name}", value)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.port}")
        yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server) -> str:  # noqa: ARG001
    """The address of an empty bucket."""
    import fsspec

    bucket = f"bucket-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `goal-ray ARGUMENTS` in this process; returns (exit status, stdout, stderr)."""
    from goal_ray.__main__ import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["goal-ray", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run
