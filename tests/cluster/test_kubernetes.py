"""The Kubernetes manifests are valid, and safe where it is easy to be not."""

import copy
import os
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kuberay import CLUSTER_SPEC, SPECS
from manifests import APPLIED, KUBECTL, cluster_specs, pods, rendered, written

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
    assert [thing for thing in things if thing["kind"] == "RayCluster"] == []
    (job,) = [thing for thing in things if thing["kind"] == "RayJob"]
    (base,) = [thing for thing in rendered("base") if thing["kind"] == "RayCluster"]
    assert job["spec"]["rayClusterSpec"] == base["spec"]


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
            for group in spec["workerGroupSpecs"]:
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
