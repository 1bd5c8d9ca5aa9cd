"""The dashboard and the alerts speak of metrics that there are, in expressions that Prometheus understands."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import promql_parser
import pytest
import ray.dashboard.modules.metrics.dashboards as ray_dashboards
import yaml

from goal_ray.lism import metrics as lism
from goal_ray.train import metrics as train

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [
    *(target["expr"] for panel in PANELS for target in panel["targets"]),
    *(rule["expr"] for rule in RULES),
]
NAME = re.compile(r"\b(?:ray|autoscaler)_[a-z_]+\b")


def documented(module) -> set[str]:
    """The metrics that a module's docstring lists, as Prometheus shows them."""
    found = re.findall(r"^    (goal_ray_\w+) +(.*)$", module.__doc__, re.MULTILINE)
    return {f"ray_{name}" if "gauge" in text else f"ray_{name}_total" for name, text in found}


OURS = documented(lism) | documented(train) | {f"ray_{train.PREFIX}loss_{term}" for term in train.TERMS}


def of_ray() -> str:
    """What Ray's own dashboards are made of."""
    folder = Path(ray_dashboards.__path__[0])
    return "".join(path.read_text() for path in folder.glob("*.py"))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_prometheus_understands_every_expression(expression):
    promql_parser.parse(expression)


def test_an_expression_with_a_mistake_is_not_understood():
    with pytest.raises(ValueError, match=r"unclosed|expected|unexpected"):
        promql_parser.parse("sum by (output) rate(x[5m]")


@pytest.mark.parametrize("name", sorted({name for text in EXPRESSIONS for name in NAME.findall(text)}))
def test_every_metric_is_one_of_ours_or_of_ray_s(name):
    assert name in OURS if name.startswith("ray_goal_ray_") else name in of_ray()


def test_every_metric_of_a_training_is_documented():
    made = {f"ray_{train.PREFIX}{name}" for name in train.GAUGES}
    made |= {f"ray_{train.PREFIX}{name}_total" for name in train.COUNTERS}
    assert made == {name for name in OURS if "_train_" in name}


def test_every_metric_of_ours_is_on_the_dashboard():
    drawn = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    alone = {"ray_goal_ray_lism_images_per_second"}  # drawn as a rate of the counter, which outlives pauses
    alone |= {f"ray_{train.PREFIX}{name}" for name in ("images_total", "quarantined_total", "nonfinite_losses_total")}
    assert {name for name in OURS - alone if not re.search(rf"\b{name}\b", drawn)} == set()


def test_panels_have_ids_and_places_of_their_own():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in PANELS]
    assert len(set(places)) == len(places)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in PANELS)


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_every_alert_says_what_is_wrong_and_what_to_do(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+[mh]", rule.get("for", "1m"))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Prometheus's promtool")
def test_the_alerts_fire_when_they_should_and_not_when_they_should_not():
    command = ["promtool", "test", "rules", "alerts_test.yaml"]
    tested = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True)
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_every_alert_is_tried_firing_and_silent():
    tried = [
        (each["alertname"], bool(each.get("exp_alerts")))
        for test in yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
        for each in test["alert_rule_test"]
    ]
    assert set(tried) == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


def test_on_kubernetes_prometheus_finds_the_ports_of_all_metrics_and_gets_through():
    from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT

    monitor = yaml.safe_load((FOLDER / "pod-monitor.yaml").read_text())["spec"]
    kubernetes = FOLDER.parent / "kubernetes"
    assert monitor["namespaceSelector"]["matchNames"] == [
        yaml.safe_load((kubernetes / "setup/namespace.yaml").read_text())["metadata"]["name"]
    ]
    head = yaml.safe_load((kubernetes / "base/raycluster.yaml").read_text())["spec"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    scraped = {ports[endpoint["port"]] for endpoint in monitor["podMetricsEndpoints"]}
    assert scraped == {8080, AUTOSCALER_METRIC_PORT}
    _, policy = yaml.safe_load_all((kubernetes / "setup/network.yaml").read_text())
    (rule,) = policy["spec"]["ingress"]
    assert {port["port"] for port in rule["ports"]} == scraped


def test_gpu_memory_is_drawn_in_the_mebibytes_that_ray_counts():
    (panel,) = [panel for panel in PANELS if panel["targets"][0]["expr"] == "ray_node_gram_used"]
    assert panel["fieldConfig"]["defaults"]["unit"] == "mbytes"


def test_prometheus_reads_the_alerts():
    config = yaml.safe_load((FOLDER / "prometheus.yaml").read_text())
    assert [(FOLDER / name).exists() for name in config["rule_files"]] == [True]
