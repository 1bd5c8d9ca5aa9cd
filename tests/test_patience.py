"""What a storage is asked again for, how long, and what is raised at once."""

import errno
from threading import Event

import aiohttp
import gcsfs.retry
import pytest

from goal_ray import patience
from goal_ray.atomic import write_bytes
from goal_ray.patience import may_pass
from goal_ray.shard_urls import expand_shards
from goal_ray.storage import (
    exists,
    list_names,
    read_bytes,
    read_range,
    sizes_bytes,
)


@pytest.fixture(autouse=True)
def no_other_patience(monkeypatch):
    """s3fs itself would bridge the first ten seconds."""
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)


def answer(status: int) -> aiohttp.ClientResponseError:
    return aiohttp.ClientResponseError(None, (), status=status)


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        *((answer(status), False) for status in (400, 401, 403, 404, 410, 451)),
        *((answer(status), True) for status in (408, 425, 429, 500, 502, 503)),
        (gcsfs.retry.HttpError({"code": 401, "message": "Invalid Credentials"}), False),
        (gcsfs.retry.HttpError({"code": 503, "message": "later"}), True),
        (aiohttp.InvalidURL("http://"), False),
        (aiohttp.ServerDisconnectedError(), True),
    ],
)
def test_what_a_server_refuses_does_not_pass(error, passes):
    assert may_pass(error) == passes


def test_patience_ends(s3, s3_server, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.5)
    s3_server.stop()
    try:
        with pytest.raises(Exception, match="connect"):
            read_bytes(f"{s3}/a")
    finally:
        s3_server.start()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("a"),
        PermissionError("a"),
        OSError(errno.ENOSPC, "full"),
        OSError(errno.ELOOP, "a link to itself"),
        OSError(errno.EFBIG, "too large for a file"),
        TypeError(),
    ],
)
def test_what_lasts_is_raised_at_once(error):
    calls = []

    def request():
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        patience.patiently(request, "s3://bucket/a")
    assert len(calls) == 1


def test_threads_that_wait_for_a_failing_storage_give_up_where_their_block_ends():
    failed = Event()

    def request():
        failed.set()
        raise ConnectionError("away")

    with patience.threads(1) as pool:
        waiting = pool.submit(patience.patiently, request, "s3://bucket/a")
        assert failed.wait(60)
    with pytest.raises(ConnectionError, match="away"):
        waiting.result(0)


def hub_error(status: int) -> Exception:
    httpx = pytest.importorskip("httpx2")
    answer = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))
    return pytest.importorskip("huggingface_hub.errors").HfHubHTTPError("no", response=answer)


def test_what_the_hub_refuses_lasts_and_what_it_fails_at_passes():
    assert [may_pass(hub_error(status)) for status in (401, 404, 429, 503)] == [False, False, True, True]
    assert may_pass(pytest.importorskip("httpx2").ConnectError("away"))


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (lambda s3: read_range(f"{s3}/a", 1, 2), b"bc"),
        (lambda s3: write_bytes(f"{s3}/b", b"new") or read_bytes(f"{s3}/b"), b"new"),
        (lambda s3: exists(f"{s3}/a"), True),
        (lambda s3: exists(f"{s3}/none"), False),
        (lambda s3: list_names(s3), ["a"]),
        (lambda s3: [*sizes_bytes([f"{s3}/a"]).values()], [4]),
        (lambda s3: [url.rpartition("/")[2] for url in expand_shards(f"{s3}/a")], ["a"]),
    ],
)
def test_a_storage_that_is_away_is_waited_for(s3, s3_server, request_, answer):
    write_bytes(f"{s3}/a", b"abcd")
    back = s3_server.fail_for(seconds=1)
    assert request_(s3) == answer
    back.join()
