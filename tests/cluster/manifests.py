"""The files of cluster/, read."""

import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
LAUNCHER = sorted((CLUSTER / "launcher").glob("*.yaml"))
APPLIED = ("setup", "shell", "base", "jobs", "lism", "train", "overlays/spot", "overlays/cpu", "overlays/cpu-setup")
KUBECTL = shutil.which("kubectl")


@cache
def rendered(name: str) -> list[dict[str, Any]]:
    """The objects that `kubectl apply -k` would send."""
    made = subprocess.run([KUBECTL, "kustomize", KUBERNETES / name], capture_output=True, text=True, check=True)
    return list(yaml.safe_load_all(made.stdout))


def written() -> list[dict[str, Any]]:
    """The objects as they stand in the files."""
    paths = [path for path in sorted(KUBERNETES.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    return [thing for path in paths for thing in yaml.safe_load_all(path.read_text())]


def cluster_specs(thing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The specification of a Ray cluster in an object, where there is one."""
    if thing["kind"] == "RayCluster":
        yield thing["spec"]
    if thing["kind"] == "RayJob" and thing["spec"]["rayClusterSpec"]:
        yield thing["spec"]["rayClusterSpec"]


def pods(thing: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod templates of a RayCluster or RayJob, and a pod that stands alone."""
    if thing["kind"] == "Pod":
        yield thing
    for spec in cluster_specs(thing):
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            yield group["template"]
    if thing["kind"] == "RayJob":
        yield thing["spec"]["submitterPodTemplate"]
