"""What Prometheus would see of a run."""

import time
import urllib.request
from collections.abc import Callable

from prometheus_client.parser import text_string_to_metric_families


def scraped(
    tag: str, value: str, others: tuple[str, ...], until: Callable[[dict], bool]
) -> dict[tuple[str, ...], float]:
    """(metric, its other tags) -> value of the metrics with this tag at the node's agent, which learns of them late.

    Asks until a condition holds, for half a minute.
    """
    import ray

    node = ray.nodes()[0]
    assert node["NodeManagerAddress"] == "127.0.0.1"
    end = time.monotonic() + 30
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics", timeout=10) as page:
            families = list(text_string_to_metric_families(page.read().decode()))
        found = {
            (sample.name, *(sample.labels[other] for other in others if other in sample.labels)): sample.value
            for family in families
            for sample in family.samples
            if sample.labels.get(tag) == value and not sample.name.endswith("_created")
        }
        if until(found) or time.monotonic() > end:
            return found
        time.sleep(0.5)
