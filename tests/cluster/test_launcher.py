"""Ray's cluster launcher takes our files."""

import copy

import jsonschema
import pytest
import yaml
from manifests import LAUNCHER
from ray.autoscaler._private.util import prepare_config, validate_config

from goal_ray.spot.notice import CLOUDS

FILES = pytest.mark.parametrize("path", LAUNCHER, ids=[path.stem for path in LAUNCHER])


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


@pytest.mark.parametrize("name", ["aws", "gcp", "aws-spot", "gcp-spot"])
def test_nodes_start_from_nothing(name):
    config = yaml.safe_load(next(path for path in LAUNCHER if path.stem == name).read_text())
    workers = [kind for key, kind in config["available_node_types"].items() if key != "head"]
    assert {kind["min_workers"] for kind in workers} == {0}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers)
