"""What clouds tell a machine that they are about to take away, a spot instance, by its metadata server.

AWS says it two minutes ahead. Google Cloud says it as it begins to shut the machine down, which takes half a minute at
most and is not promised; Docker, which stops then, kills containers after their `--stop-timeout`.
"""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http.client import HTTPException

from goal_ray.errors import StageError

POLL_S = 2.0
ANSWER_S = 5.0
GCP_NOTICE_S = 30.0


def aws_notice(server: str) -> float | None:
    """Seconds until AWS takes the machine; None without a notice. Raises OSError where no sensible answer comes.

    Source: EC2 user guide, "Spot Instance interruption notices" and "Instance Metadata Service Version 2".
    """
    lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = ask(f"{server}/latest/api/token", lifetime, "PUT")
    try:
        said = ask(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    try:
        left_s = (datetime.fromisoformat(json.loads(said)["time"]) - datetime.now(UTC)).total_seconds()
    except (ValueError, KeyError, TypeError):
        raise OSError(f"{said[:100]!r} is no notice") from None
    return max(0.0, left_s)


def gcp_notice(server: str) -> float | None:
    """Seconds until Google Cloud takes the machine, at most; None without a notice. Raises OSError where none answers.

    Source: Compute Engine documentation, "Detect if a VM was preempted": metadata key `preempted`.
    """
    said = ask(f"{server}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return GCP_NOTICE_S if said.strip() == "TRUE" else None


CLOUDS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "aws": (aws_notice, "http://169.254.169.254"),
    "gcp": (gcp_notice, "http://metadata.google.internal"),
}


def ask(url: str, headers: Mapping[str, str], method: str = "GET") -> str:
    """What a machine's own metadata server answers. Raises OSError."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on the machine itself
    try:
        with direct.open(request, timeout=ANSWER_S) as answer:
            return str(answer.read().decode(errors="replace"))
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def wait_for_notice(cloud: str, server: str) -> float:
    """Waits until the cloud says that it takes the machine. Returns the seconds until then.

    Raises StageError where this is no machine of that cloud. Later a server that does not answer is asked again.
    """
    notice = CLOUDS[cloud][0]
    answered = False
    while True:
        try:
            left_s = notice(server)
        except OSError as error:
            if not answered:
                raise StageError(f"{server}, the metadata server of {cloud}, does not answer: {error}") from None
            left_s = None
        answered = True
        if left_s is not None:
            return left_s
        time.sleep(POLL_S)
