"""A Ray cluster on loopback whose nodes are processes of this machine, started and ended by Ray's own autoscaler."""

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray.autoscaler._private.fake_multi_node as fake_provider

from goal_ray.atomic import is_running

HEAD_ID = "f" * 51 + "00000"
STORE_BYTES = 100 * 2**20
LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    *(f"{whose}setup_commands" for whose in ("", "head_", "worker_")),
    *(f"{whose}_start_ray_commands" for whose in ("head", "worker")),
)
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end_with_children(process: subprocess.Popen) -> None:
    """Kills a process that we started, and all that it has started; the cluster is of no more use."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(tree, timeout=30)


class FakeCluster:
    """A head without CPUs, and an autoscaler; `address` is where drivers join. A context manager.

    node_types    name -> {"resources": ..., "min": least nodes, "max": most}
    idle_minutes  after which a node without work goes
    environment   for every process of the cluster
    """

    def __init__(
        self,
        folder: Path,
        node_types: Mapping[str, Mapping[str, Any]],
        idle_minutes: float = 0.15,
        environment: Mapping[str, str] | None = None,
    ):
        port = free_port()
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            **(environment or {}),
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # binds to 127.0.0.1
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        }
        self.environment.pop("RAY_ADDRESS", None)
        self.config = {
            "cluster_name": "fake",
            "max_workers": sum(kind["max"] for kind in node_types.values()),
            "upscaling_speed": 100,
            "idle_timeout_minutes": idle_minutes,
            "provider": {
                "type": "fake_multinode",
                "launch_multiple": True,
                "disable_node_updaters": True,  # they would connect by SSH
                "head_node_id": HEAD_ID,
                "gcs_address": self.address,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                **{
                    name: {
                        "resources": {"object_store_memory": STORE_BYTES, **kind["resources"]},
                        "node_config": {},
                        "min_workers": kind.get("min", 0),
                        "max_workers": kind["max"],
                    }
                    for name, kind in node_types.items()
                },
            },
            "head_node_type": "ray.head.default",
            **{key: {} for key in ("auth", "docker", "file_mounts")},
            **{key: [] for key in LISTS},
        }

    def __enter__(self) -> "FakeCluster":
        place = self.folder / "autoscaling.json"
        place.write_text(json.dumps(self.config))
        # Ray's wheel lacks the file that its autoscaler takes defaults from for this provider.
        example = Path(fake_provider.__path__[0]) / "example.yaml"
        if not example.exists():
            example.write_text(place.read_text())
        host, port = self.address.split(":")
        command = [BIN / "ray", "start", "--head", "--block", f"--node-ip-address={host}", f"--port={port}"]
        command += ["--num-cpus=0", "--include-dashboard=false", "--disable-usage-stats"]
        command += [f"--object-store-memory={STORE_BYTES}", f"--autoscaling-config={place}"]
        self.log = (self.folder / "head.log").open("wb")
        self.head = subprocess.Popen(command, env=self.environment, stdout=self.log, stderr=subprocess.STDOUT)
        self.wait_until(lambda: "Ray runtime started" in self.said(), 60)
        return self

    def __exit__(self, *_: object) -> None:
        end_with_children(self.head)
        self.log.close()

    def said(self) -> str:
        return (self.folder / "head.log").read_text()

    def wait_until(self, happened: Any, patience_s: float) -> float:
        """Waits for something; returns how long it took."""
        began = time.monotonic()
        while not happened():
            assert self.head.poll() is None, self.said()
            assert time.monotonic() - began < patience_s, self.said()
            time.sleep(0.2)
        return time.monotonic() - began

    def raylets(self) -> list[psutil.Process]:
        """The processes that are the nodes, without the head's, which is not started by the autoscaler."""
        head = psutil.Process(self.head.pid)
        found = [process for process in head.children(recursive=True) if process.name() == "raylet"]
        return [raylet for raylet in found if is_running(raylet.pid) and raylet.ppid() != head.pid]

    def start(self, *arguments: object, **options: Any) -> subprocess.Popen:
        """Starts this Python as a driver on the cluster."""
        environment = {**self.environment, "RAY_ADDRESS": self.address}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, **(pipes | options))
