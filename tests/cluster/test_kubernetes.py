"""The Kubernetes manifests are valid, and safe where it is easy to be not."""

import copy
import math
import os
import re
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay import CLUSTER_SPEC, SPECS
from manifests import APPLIED, KUBECTL, KUBERNETES, cluster_specs, pods, rendered, written

from goal_ray.train.attempts import LOOK_AROUND_S, POLL_S

VERSION = "1.34"
with_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl is not installed")


def validate(thing: dict) -> None:
    """Raises for an object that Kubernetes or KubeRay would not take."""
    if thing["kind"] not in SPECS:
        kubernetes_validate.validate(thing, VERSION, strict=True)
        return
    assert thing["apiVersion"] == "ray.io/v1"
    jsonschema.validate(thing["spec"], SPECS[thing["kind"]])
    for pod in pods(thing):
        whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **pod.get("metadata", {})}, **pod}
        kubernetes_validate.validate(whole, VERSION, strict=True)


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_everything_that_is_applied_is_valid(name):
    for thing in rendered(name):
        validate(thing)


@pytest.mark.parametrize("thing", [thing for thing in written() if thing["kind"] != "RayJob"], ids=lambda t: t["kind"])
def test_every_file_is_valid_as_it_stands(thing):
    validate(thing)


@pytest.mark.parametrize("spoil", ["field of KubeRay", "field of the pod", "value of the pod"])
def test_a_mistake_is_found(spoil):
    (cluster,) = [copy.deepcopy(thing) for thing in written() if thing["kind"] == "RayCluster"]
    pod = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    if spoil == "field of KubeRay":
        cluster["spec"]["enableAutoscaling"] = True
    elif spoil == "field of the pod":
        pod["containers"][0]["imagePullpolicy"] = "Always"
    else:
        pod["terminationGracePeriodSeconds"] = "long"
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(cluster)


@with_kubectl
@pytest.mark.skipif("GOAL_RAY_KUBERAY_CRDS" not in os.environ, reason="GOAL_RAY_KUBERAY_CRDS names no folder")
@pytest.mark.parametrize("name", APPLIED)
def test_everything_is_valid_by_the_schemas_that_kuberay_publishes(name):
    for path in Path(os.environ["GOAL_RAY_KUBERAY_CRDS"]).glob("*.yaml"):
        definition = yaml.safe_load(path.read_text())["spec"]
        (schema,) = [v["schema"]["openAPIV3Schema"] for v in definition["versions"] if v["name"] == "v1"]
        for thing in rendered(name):
            if thing["kind"] == definition["names"]["kind"]:
                jsonschema.validate(thing, schema)


@with_kubectl
@pytest.mark.parametrize(("name", "kind"), [("lism", "lism"), ("train", "train")])
def test_a_job_comes_with_a_cluster_of_its_own_and_no_other(name, kind):
    things = rendered(name)
    assert [thing["metadata"]["name"] for thing in things if thing["kind"] == "RayJob"] == [kind]
    assert [thing["kind"] for thing in things] == ["RayJob"]
    (job,) = [thing for thing in things if thing["kind"] == "RayJob"]
    (base,) = [thing for thing in rendered("base") if thing["kind"] == "RayCluster"]
    assert job["spec"]["rayClusterSpec"] == base["spec"]


@with_kubectl
@pytest.mark.parametrize("name", [name for name in APPLIED if "setup" not in name])
def test_deleting_what_may_be_deleted_leaves_the_volume_and_its_namespace(name):
    assert {thing["kind"] for thing in rendered(name)} <= {"RayCluster", "RayJob", "Pod"}


@with_kubectl
@pytest.mark.parametrize("name", ["setup", "overlays/cpu-setup"])
def test_everything_lies_in_the_namespace_of_the_setup_and_mounts_its_volume(name):
    made = {thing["kind"]: thing["metadata"]["name"] for thing in rendered(name)}
    for thing in (each for applied in APPLIED for each in rendered(applied) if each["kind"] != "Namespace"):
        assert thing["metadata"]["namespace"] == made["Namespace"]
        for pod in pods(thing):
            volumes = [volume for volume in pod["spec"].get("volumes", []) if volume["name"] == "runs"]
            claims = [volume["persistentVolumeClaim"]["claimName"] for volume in volumes]
            assert set(claims) <= {made["PersistentVolumeClaim"]}


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_every_pod_may_pull_from_a_private_registry(name):
    for thing in rendered(name):
        for pod in pods(thing):
            assert pod["spec"]["imagePullSecrets"] == [{"name": "registry"}]


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_no_autoscaler_moves_the_head(name):
    for thing in rendered(name):
        for spec in cluster_specs(thing):
            assert spec["headGroupSpec"]["template"]["metadata"]["annotations"] == {
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "karpenter.sh/do-not-disrupt": "true",
            }


MACHINES = {  # virtual CPUs, GiB
    "n2-standard-8": (8, 32),
    "n2-standard-16": (16, 64),
    "g2-standard-8": (8, 32),
    "a2-highgpu-8g": (96, 680),
    "m6i.2xlarge": (8, 32),
    "m6i.4xlarge": (16, 64),
    "g5.2xlarge": (8, 32),
    "p4d.24xlarge": (96, 1152),
}


def allocatable(cpus: float, memory_gib: float) -> tuple[float, float]:
    """What GKE leaves to pods, EKS leaves more: by its documented shares, less half a CPU and 2 % for its own pods."""
    kept_cpus = 0.06 + 0.01 + 0.005 * 2 + 0.0025 * (cpus - 4)
    steps = [(4, 0.25), (4, 0.2), (8, 0.1), (112, 0.06), (math.inf, 0.02)]
    kept_gib, left = 0.1, memory_gib
    for step, share in steps:
        kept_gib += share * min(step, left)
        left -= min(step, left)
    return cpus - kept_cpus - 0.5, 0.98 * (memory_gib - kept_gib)


def test_pods_fit_the_machines_that_the_readme_names():
    (cluster,) = [thing["spec"] for thing in written() if thing["kind"] == "RayCluster"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]} | {"head": cluster["headGroupSpec"]}
    table = re.findall(r"^ +\| (\w+) \| (\S+) \| (\S+) \|$", (KUBERNETES / "README.md").read_text(), re.MULTILINE)
    named = {name: machines for name, *machines in table if "---" not in machines}
    assert set(named) == set(groups)
    for name, group in groups.items():
        asked = [group["template"]["spec"]["containers"][0]["resources"]["requests"]]
        if name == "head":
            asked.append(cluster["autoscalerOptions"]["resources"]["requests"])
        cpus = sum(
            0.001 * float(each["cpu"][:-1]) if each["cpu"].endswith("m") else float(each["cpu"]) for each in asked
        )
        memory_gib = sum(gibibytes(each["memory"]) for each in asked) / 2**30
        for machine in named[name]:
            there_cpus, there_gib = allocatable(*MACHINES[machine])
            assert (cpus <= there_cpus, memory_gib <= there_gib) == (True, True), (name, machine)


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_clusters_want_a_token_grow_from_nothing_and_run_no_task_on_the_head(name):
    for thing in rendered(name):
        for spec in cluster_specs(thing):
            assert spec["authOptions"] == {"mode": "token"}
            assert spec["enableInTreeAutoscaling"] is True
            assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
            assert {group["minReplicas"] for group in spec["workerGroupSpecs"]} == {0}


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_pods_have_no_rights_that_they_do_not_need(name):
    for thing in rendered(name):
        for pod in pods(thing):
            spec = pod["spec"]
            is_head = spec["containers"][0]["name"] == "ray-head"
            assert spec["securityContext"]["runAsUser"] == 1000
            assert spec["automountServiceAccountToken"] is is_head
            assert spec["securityContext"]["runAsNonRoot"] is True
            for container in spec["containers"]:
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert container["resources"]["requests"] == container["resources"]["limits"]


def test_pods_without_a_claim_to_a_gpu_see_none_and_count_none():
    """The image asks for all GPUs, which a node with some gives to any pod."""
    (cluster,) = [thing for thing in written() if thing["kind"] == "RayCluster"]
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    claims = []
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        claims.append("nvidia.com/gpu" in container["resources"]["limits"])
        environment = {each["name"]: each["value"] for each in container["env"]}
        assert (environment.get("NVIDIA_VISIBLE_DEVICES") == "void") is not claims[-1]
        assert (group["rayStartParams"].get("num-gpus") == "0") is not claims[-1]
    assert claims == [False, False, True, True]


@with_kubectl
@pytest.mark.parametrize("name", APPLIED)
def test_a_node_that_is_told_to_end_drains_as_long_as_its_pod_may_live(name):
    for thing in rendered(name):
        for spec in cluster_specs(thing):
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                pod = group["template"]["spec"]
                set_to = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
                drain_s = float(set_to["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
                assert pod["terminationGracePeriodSeconds"] - 20 <= drain_s < pod["terminationGracePeriodSeconds"]


def test_object_stores_have_room_in_shared_memory(monkeypatch):
    """By Ray's own arithmetic; where there is too little room, Ray puts them on the container's disk."""
    from ray._private import utils

    for thing in [*written(), *(each for name in APPLIED if KUBECTL for each in rendered(name))]:
        for spec in cluster_specs(thing):
            for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
                pod = group["template"]["spec"]
                (shared,) = [each["emptyDir"] for each in pod["volumes"] if each["name"] == "shared-memory"]
                shared_bytes = gibibytes(shared["sizeLimit"])
                monkeypatch.setattr(utils, "get_shared_memory_bytes", lambda room=shared_bytes: room)
                memory_bytes = gibibytes(pod["containers"][0]["resources"]["limits"]["memory"])
                assert utils.resolve_object_store_memory(memory_bytes) <= 0.95 * shared_bytes


def gibibytes(quantity: str) -> int:
    return int(quantity.removesuffix("Gi")) * 2**30


def test_a_stopped_job_has_time_to_save_a_checkpoint():
    (cluster,) = [thing for thing in written() if thing["kind"] == "RayCluster"]
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "300"} in head["env"]


@with_kubectl
def test_on_spot_nodes_a_drain_and_its_save_end_in_the_15_seconds_of_gke_standard():
    (cluster,) = [thing for thing in rendered("overlays/spot") if thing["kind"] == "RayCluster"]
    for group in cluster["spec"]["workerGroupSpecs"][1:]:
        pod = group["template"]["spec"]
        set_to = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
        assert pod["terminationGracePeriodSeconds"] == 15
        # ViT-B/16: the driver looks around, the worker asks it, 1.8 GB are written at 500 MB/s and read at 1.6 GB/s
        needed_s = LOOK_AROUND_S + 2 * POLL_S + 1.8 / 0.5 + 1.8 / 1.6
        assert needed_s < float(set_to["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])


@with_kubectl
def test_spot_nodes_carry_the_gpu_groups_alone():
    (cluster,) = [thing for thing in rendered("overlays/spot") if thing["kind"] == "RayCluster"]
    pinned = {g["groupName"]: "affinity" in g["template"]["spec"] for g in cluster["spec"]["workerGroupSpecs"]}
    assert pinned == {"decode": False, "lism": True, "train": True}
    assert "affinity" not in cluster["spec"]["headGroupSpec"]["template"]["spec"]


@with_kubectl
def test_the_small_cluster_asks_for_no_gpu():
    (cluster,) = [thing for thing in rendered("overlays/cpu") if thing["kind"] == "RayCluster"]
    assert "nvidia.com/gpu" not in yaml.safe_dump(cluster)
    jsonschema.validate(cluster["spec"], CLUSTER_SPEC)
