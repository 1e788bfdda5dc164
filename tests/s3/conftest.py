"""Fixtures of the S3 tests: a fault proxy in front of each of two real servers, and short waits."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from p3d.pipeline.storage.s3 import body as s3_body
from p3d.pipeline.storage.s3 import client as s3_client
from p3d.pipeline.storage.s3 import errors as s3_errors
from p3d.pipeline.storage.s3 import pace as s3_pace
from p3d.pipeline.storage.s3 import retry as s3_retry
from p3d.pipeline.storage.s3.client import client_for
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from tests.s3.proxy import Proxy, proxy
from tests.servers import Weed


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits and limits for tests; the rules stay the same."""
    for module, name, value in (
        (s3_client, "READ_TIMEOUT_S", 1.0),
        (s3_errors, "BUSY_PATIENCE_S", 1.0),
        (s3_errors, "GONE_PATIENCE_S", 0.5),
        (s3_body, "TRICKLE_S", 0.3),
        (s3_pace, "WAIT_S", 0.5),
        (s3_pace, "LEAST_BYTES", 256),
        (s3_body, "PIECE_BYTES", 1024),
        (s3_body, "PAUSE_S", 0.02),
        (s3_retry, "PAUSE_S", 0.02),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture(scope="session")
def weed_proxy(real_s3: Weed) -> Iterator[Proxy]:
    with proxy(real_s3.env) as made:
        yield made


@pytest.fixture(scope="session")
def moto_proxy(s3_server: dict[str, str]) -> Iterator[Proxy]:
    with proxy(s3_server) as made:
        yield made


@pytest.fixture
def front(weed_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, short: None) -> Proxy:
    """A proxy in front of SeaweedFS, which this process uses."""
    return _front(weed_proxy, monkeypatch)


@pytest.fixture
def moto_front(moto_proxy: Proxy, monkeypatch: pytest.MonkeyPatch, short: None) -> Proxy:
    """A proxy in front of moto, which accepts any signature and supports more of S3."""
    return _front(moto_proxy, monkeypatch)


@pytest.fixture(params=["weed_proxy", "moto_proxy"])
def any_front(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, short: None) -> Proxy:
    """Each server in turn."""
    return _front(request.getfixturevalue(request.param), monkeypatch)


def _front(made: Proxy, monkeypatch: pytest.MonkeyPatch) -> Proxy:
    made.faults, made.latency_s, made.gates = [], 0.0, iter(())
    made.requests.clear()
    for name, value in made.env.items():
        monkeypatch.setenv(name, value)
    return made


_buckets: dict[str, str] = {}  # proxy -> bucket; SeaweedFS takes a second to make one


def new_store(front: Proxy, options: StoreOptions = DEFAULTS) -> S3Store:
    """A new prefix in a bucket behind the proxy, whose recorded requests are cleared."""
    if front.url not in _buckets:
        _buckets[front.url] = f"test-{uuid.uuid4().hex[:12]}"
        client_for(DEFAULTS).create_bucket(Bucket=_buckets[front.url])
        front.requests.clear()
    return S3Store(f"s3://{_buckets[front.url]}/{uuid.uuid4().hex[:12]}", options)
