"""What stands in several files is the same in all of them."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import ray
import yaml
from manifests import CLUSTER, KUBERNETES, LAUNCHER, ROOT, cluster_specs, written
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from goal_ray import __version__
from goal_ray.config import load_config
from goal_ray.lism.config import LismConfig
from goal_ray.train.config import TrainConfig

FILES = [
    path
    for path in sorted(CLUSTER.rglob("*"))
    if path.is_file() and (path.suffix in (".yaml", ".md", ".json") or path.name == "Dockerfile")
]
IMAGE = "registry.example.com/goal-ray"
CONFIGS = {"goal_ray.lism": LismConfig, "goal_ray.train": TrainConfig}
HADOLINT = Path(sys.executable).with_name("hadolint")


def locked(package: str) -> str:
    lock = (ROOT / "requirements.lock").read_text()
    return re.search(rf"^{package}==(\S+)$", lock, re.MULTILINE)[1]


def test_kuberay_runs_the_ray_of_the_lock():
    versions = {spec["rayVersion"] for thing in written() for spec in cluster_specs(thing)}
    assert versions == {locked("ray")}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CLUSTER)) for path in FILES])
def test_every_file_names_the_same_image_and_the_package_s_version(path):
    text = path.read_text()
    assert {tag.removesuffix("-cpu") for tag in re.findall(rf"{IMAGE}:([\w.-]+)", text)} <= {__version__}
    assert {tag.removesuffix("-cpu") for tag in re.findall(r"newTag: (\S+)", text)} <= {__version__}
    assert set(re.findall(r"newName: (\S+)", text)) <= {IMAGE}
    assert set(re.findall(r'image\.version="(.*)"', text)) <= {__version__}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CLUSTER)) for path in FILES])
def test_the_ports_are_the_same_everywhere(path):
    text = path.read_text()
    assert set(re.findall(r"metrics-export-port[=: \"]+(\d+)", text)) <= {"8080"}
    assert set(re.findall(r"prometheus.io/port: \"(\d+)\"", text)) <= {"8080"}
    assert set(re.findall(r"containerPort: (\d+), name: metrics", text)) <= {"8080"}
    assert set(re.findall(r"--port=(\d+)|RAY_HEAD_IP:(\d+)", text)) <= {("6379", ""), ("", "6379")}


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(CLUSTER)) for path in FILES])
def test_no_file_holds_a_secret(path):
    text = path.read_text()
    assert re.findall(r"\b[0-9a-f]{32,}\b|\bAKIA[0-9A-Z]{16}\b|BEGIN [A-Z ]*PRIVATE KEY", text) == []
    assert re.findall(r"RAY_AUTH_TOKEN[=:]\s*[\"']?\w{8,}", text) == []


@pytest.mark.parametrize("thing", [t for t in written() if t["kind"] == "RayJob"], ids=lambda t: t["metadata"]["name"])
def test_the_commands_of_jobs_are_ones_that_the_stages_take(thing):
    python, minus_m, module, *arguments = shlex.split(thing["spec"]["entrypoint"])
    assert (python, minus_m) == ("python", "-m")
    configs = [argument for argument in arguments if argument.startswith("configs/")]
    settings = [argument for argument in arguments if re.match(r"[\w.]+=", argument)]
    load_config(CONFIGS[module], ROOT / configs[0], settings)
    yaml.safe_load(thing["spec"]["runtimeEnvYAML"])


@pytest.mark.parametrize("path", LAUNCHER, ids=[path.stem for path in LAUNCHER])
def test_groups_have_the_resources_that_jobs_ask_for(path):
    kinds = yaml.safe_load(path.read_text()).get("available_node_types", {})
    offered = {name for kind in kinds.values() for name in kind["resources"]}
    assert not kinds or {"lism", "train"} <= offered


def test_kubernetes_offers_the_resources_that_jobs_ask_for():
    text = (KUBERNETES / "base" / "raycluster.yaml").read_text()
    asked = {
        name
        for job in written()
        if job["kind"] == "RayJob"
        for name in re.findall(r"\{(\w+): 1\}", job["spec"]["entrypoint"])
    }
    assert asked == {"lism", "train"} == set(re.findall(r'\{\\"(\w+)\\": \d+\}', text))


def test_the_dockerfile_is_clean():
    found = subprocess.run([HADOLINT, CLUSTER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_a_dockerfile_with_a_mistake_is_not_clean(tmp_path):
    text = (CLUSTER / "Dockerfile").read_text().replace("# hadolint ignore", "# ignored no more")
    (tmp_path / "Dockerfile").write_text(text)
    found = subprocess.run([HADOLINT, tmp_path / "Dockerfile"], capture_output=True, text=True, check=False)
    assert "DL3008" in found.stdout


def test_login_shells_in_the_image_find_its_commands_too():
    """Ray's launcher runs its commands in them, and they forget the image's PATH."""
    text = (CLUSTER / "Dockerfile").read_text()
    (folder,) = re.findall(r"^ENV PATH=(\S+):\$\{PATH\}", text, re.MULTILINE)
    assert f'"PATH={folder}:\\${{PATH}}" > /etc/profile.d/goal_ray.sh' in text


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_the_image_and_the_cloud_s_extra_hold_what_ray_s_autoscaler_imports(cloud):
    extras = re.search(r'"\.\[([\w,]+)\]"', (CLUSTER / "Dockerfile").read_text())[1].split(",")
    names = packages_distributions()
    for module in imported(Path(ray.__path__[0]) / "autoscaler" / "_private" / cloud):
        makers = {canonicalize_name(name) for name in names[module]}
        for chosen in (extras, [cloud]):
            assert makers & installed_with(chosen), (module, chosen)


def imported(folder: Path) -> set[str]:
    """The top modules that the files of a folder import, but Ray's and Python's own."""
    nodes = [node for path in folder.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    found = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in found} - {"ray", *sys.stdlib_module_names}


def installed_with(extras: list[str]) -> set[str]:
    """The distributions that pip installs for goal_ray with these extras, by the metadata of those that are here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for name in extras for each in project["optional-dependencies"][name])]
    waiting, found = [Requirement(each) for each in wanted], set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(key)
        for extra in ("", *requirement.extras):
            for each in map(Requirement, requires(requirement.name) or []):
                if each.marker is None or each.marker.evaluate({"extra": extra}):
                    each.marker = None
                    waiting.append(each)
    return {name for name, _ in found}


def test_the_image_holds_what_the_dockerfile_copies():
    copied = re.findall(r"^COPY (?!--from)(?:--\S+ )*(.+) \S+$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    kept = (ROOT / ".dockerignore").read_text().splitlines()
    for name in " ".join(copied).split():
        assert (ROOT / name).exists(), name
        assert f"!{name.split('/')[0]}" in kept, name
