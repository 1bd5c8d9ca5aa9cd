"""Ray's cluster launcher takes our files."""

import copy
import re

import jsonschema
import pytest
import yaml
from manifests import LAUNCHER
from ray.autoscaler._private.util import prepare_config, validate_config

from goal_ray.spot.notice import CLOUDS, GCP_NOTICE_S

FILES = pytest.mark.parametrize("path", LAUNCHER, ids=[path.stem for path in LAUNCHER])
ON_CLOUDS = pytest.mark.parametrize(
    "path",
    [path for path in LAUNCHER if path.stem != "on-premise"],
    ids=lambda path: path.stem,
)


@FILES
def test_ray_takes_the_file(path):
    validate_config(prepare_config(yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("spoil", ["unknown key", "no head", "text for a number"])
def test_ray_refuses_a_file_with_a_mistake(spoil):
    config = copy.deepcopy(yaml.safe_load(LAUNCHER[0].read_text()))
    if spoil == "unknown key":
        config["max_worker"] = 3
    elif spoil == "no head":
        config["head_node_type"] = "none"
    else:
        config["idle_timeout_minutes"] = "ten"
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(prepare_config(config))


@FILES
def test_the_dashboard_listens_on_the_head_alone_and_the_cluster_wants_a_token(path):
    config = yaml.safe_load(path.read_text())
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    assert "--disable-usage-stats" in start
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


@FILES
def test_the_network_is_left_to_ray(path):
    """It puts every container on the host's, and Docker refuses a network named twice."""
    options = yaml.safe_load(path.read_text())["docker"]["run_options"]
    assert not [option for option in options if option.startswith("--net")]


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_spot_differs_from_its_model_in_what_is_spot_alone_and_never_in_the_head(cloud):
    plain, spot = (
        yaml.safe_load(next(path for path in LAUNCHER if path.stem == name).read_text())
        for name in (cloud, f"{cloud}-spot")
    )
    assert spot["available_node_types"]["head"] == plain["available_node_types"]["head"]
    for types in (plain, spot):
        for node in types["available_node_types"].values():
            node["node_config"].pop("InstanceMarketOptions", None)
            node["node_config"].pop("scheduling", None)
    watch = spot["worker_start_ray_commands"].pop()
    assert f"python -m goal_ray.spot {cloud}" in watch
    assert cloud in CLOUDS
    assert spot == plain


@ON_CLOUDS
def test_ray_adds_no_commands_of_its_own_to_ours(path):
    """Its defaults for a cloud install packages, which the image's user may not."""
    ours = yaml.safe_load(path.read_text())
    taken = prepare_config(copy.deepcopy(ours))
    for name in [name for name in taken if name.endswith("_commands")]:
        assert taken[name] == ours[name], name
    assert taken["setup_commands"] == taken["head_setup_commands"] == taken["worker_setup_commands"] == []


@ON_CLOUDS
def test_the_lines_for_a_private_registry_are_commands_once_the_sign_is_taken_away(path):
    text = path.read_text()
    before = yaml.safe_load(text)["initialization_commands"]
    after = yaml.safe_load(re.sub(r"^  #(- |  )", r"  \1", text, flags=re.MULTILINE))
    validate_config(prepare_config(after))
    *same, login = after["initialization_commands"]
    assert same == before
    assert re.search(r"docker login|configure-docker", login)


def on(cloud: str) -> list[dict]:
    """The node types of a cloud's files."""
    files = [yaml.safe_load(path.read_text()) for path in LAUNCHER if path.stem.startswith(cloud)]
    assert len(files) == 2
    return [{**kind["node_config"], "provider": file["provider"]} for file in files for kind in types(file).values()]


def types(file: dict) -> dict[str, dict]:
    return file["available_node_types"]


def test_google_s_disks_are_of_a_kind_that_all_its_machines_take_in_the_nodes_zone():
    for node in on("gcp"):
        zone = node["provider"]["availability_zone"]
        assert zone.startswith(node["provider"]["region"])
        kinds = {disk["initializeParams"]["diskType"] for disk in node["disks"]}
        assert kinds == {f"zones/{zone}/diskTypes/pd-balanced"}


def test_google_s_shutdown_leaves_the_container_its_half_minute():
    for name in ("gcp", "gcp-spot"):
        file = yaml.safe_load(next(path for path in LAUNCHER if path.stem == name).read_text())
        assert f"--stop-timeout {GCP_NOTICE_S:.0f}" in file["docker"]["run_options"]


def test_all_of_amazon_s_nodes_are_in_one_security_group_that_the_file_system_can_name():
    groups = [node["SecurityGroupIds"] for node in on("aws")]
    assert all(group == groups[0] and len(group) == 1 for group in groups)


@ON_CLOUDS
def test_the_shared_folder_s_client_is_installed_before_it_is_mounted(path):
    client, folder, mount = yaml.safe_load(path.read_text())["initialization_commands"]
    assert "install --yes nfs-common" in client
    assert "mkdir" in folder
    assert " -t nfs" in mount


@ON_CLOUDS
def test_nodes_start_from_nothing(path):
    config = yaml.safe_load(path.read_text())
    workers = [kind for key, kind in config["available_node_types"].items() if key != "head"]
    assert {kind["min_workers"] for kind in workers} == {0}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers)
