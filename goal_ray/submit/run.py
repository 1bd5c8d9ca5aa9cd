"""`ray job submit` for a stage of goal_ray: sends the working folder, follows the log, ends as the job ends."""

import asyncio
import logging
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from goal_ray.config import read_yaml
from goal_ray.errors import StageError

TOKEN_REMEDY = (
    "set RAY_AUTH_MODE=token, and put the cluster's token into ~/.ray/auth_token or RAY_AUTH_TOKEN "
    "(cluster/README.md says how)"
)
POLL_S = 1.0
RECONNECT_S = 600.0
STARTING_S = 120.0


class JobFollower:
    """A job on a cluster whose dashboard is at `address`. Raises StageError where the cluster refuses or is away."""

    def __init__(self, address: str):
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.ERROR)
        self.address = address
        with explained(address):
            self.client = JobSubmissionClient(address)

    def submit(self, command: Sequence[str], runtime_env: dict[str, Any], name: str | None, gpus: float = 0) -> str:
        """Starts a command as a job, in a copy of the runtime environment's working folder. Returns the job's id.

        gpus  what the command's own process holds: it then runs on a node that has them, not on the head
        """
        until = time.monotonic() + STARTING_S
        while True:
            try:
                with explained(self.address):
                    return self.client.submit_job(
                        entrypoint=shlex.join(command),
                        runtime_env=runtime_env,
                        submission_id=name,
                        entrypoint_num_gpus=gpus or None,
                    )
            except StageError as error:
                # A head answers some seconds before its node can start jobs.
                if "No available agent" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(POLL_S)

    def status(self, job: str) -> Any:
        """The job's status; asked again for RECONNECT_S seconds where the cluster does not answer."""
        until = time.monotonic() + RECONNECT_S
        while True:
            try:
                return self.client.get_job_status(job)
            except (OSError, RuntimeError) as error:
                if time.monotonic() > until:
                    raise StageError(f"{self.address} no longer answers ({error}); job {job} may go on") from None
                time.sleep(POLL_S)

    def follow(self, job: str, write: Callable[[str], object]) -> Any:
        """Hands on the job's log until the job ends, and returns its status then. A lost connection is made again."""
        passed = 0
        while True:
            passed = asyncio.run(self._follow_once(job, write, passed))
            status = self.status(job)
            if status.is_terminal():
                return status
            time.sleep(POLL_S)

    async def _follow_once(self, job: str, write: Callable[[str], object], passed: int) -> int:
        """Hands on what comes behind the first `passed` characters. Returns how many came in all."""
        import aiohttp

        seen = 0
        try:
            async for text in self.client.tail_job_logs(job):
                if seen + len(text) > passed:
                    write(text[max(0, passed - seen) :])
                seen += len(text)
        except (aiohttp.ClientError, RuntimeError, OSError):
            pass  # the status tells whether the job or the connection has ended
        return max(seen, passed)


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into a StageError that names the remedy."""
    from ray.exceptions import AuthenticationError

    try:
        yield
    except AuthenticationError as error:
        raise StageError(f"{address} refuses the token: {str(error).splitlines()[0]}; {TOKEN_REMEDY}") from None
    except (ConnectionError, OSError) as error:
        raise StageError(
            f"no Ray cluster answers at {address} ({str(error).splitlines()[0]}); give its dashboard with --address, "
            "through an SSH tunnel or `kubectl port-forward` where it listens on the head only"
        ) from None
    except RuntimeError as error:
        raise StageError(f"{address} does not take the job: {error}") from None


def runtime_environment(working_dir: Path, file: Path | None) -> dict[str, Any]:
    """The job's runtime environment: the working folder, and what a YAML file adds to it."""
    if not working_dir.is_dir():
        raise StageError(f"{working_dir}: no such folder; name the one that holds the configs with --working-dir")
    return {"working_dir": str(working_dir), **(read_yaml(file) if file else {})}
