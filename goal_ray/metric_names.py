"""The names of the retrieval metrics. No torch: settings and reports name metrics too."""

from typing import Any

RECALL_AT = (1, 5, 25, 50)
METRICS = (*(f"R@{k}" for k in RECALL_AT), "mAP", "median_rank")
DIRECTIONS = ("text_to_image", "image_to_text")
# Captions and pictures; sentences and regions; all of them together.
RANKINGS = ("", "local", "joint")


def is_rank(metric: str) -> bool:
    """Whether a metric, dotted or not, is a rank, of which the lowest is the best; the others are percent."""
    return metric.endswith("rank")


def dotted(ranking: str, direction: str, metric: str) -> str:
    """A metric's name in settings and curves, such as text_to_image.R@1 or joint.image_to_text.mAP."""
    return ".".join(filter(None, (ranking, direction, metric)))


def by_dotted_name(result: dict[str, Any]) -> dict[str, float]:
    """The metrics of a result of `goal_ray.evaluate`, those that it has."""
    parts = {ranking: result.get(ranking) if ranking else result for ranking in RANKINGS}
    return {
        dotted(ranking, direction, metric): value
        for ranking, part in parts.items()
        if part
        for direction in DIRECTIONS
        for metric, value in part[direction].items()
    }
