"""Single requests: a server that is busy, failing, slow, silent or loses its reply costs time, never an object."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p3d.pipeline.errors import StoreUnknown, StoreUnsafe
from p3d.pipeline.storage.s3 import client as s3_client
from p3d.pipeline.storage.s3 import errors as s3_errors
from p3d.pipeline.storage.s3 import retry as s3
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import CREATED, EXISTS, StoreOptions
from tests.conftest import p3d
from tests.s3.conftest import new_store
from tests.s3.proxy import Fault, Proxy

THREADS = 8
PAUSE_S, BUSY_PATIENCE_S = s3.PAUSE_S, s3_errors.BUSY_PATIENCE_S  # the real values; the fixtures shorten them
BUSY = ((503, "SlowDown"), (500, "InternalError"), (429, "TooManyRequests"))
OPERATIONS: dict[str, Callable[[S3Store], Any]] = {
    "create": lambda store: store.create("new", b"content"),
    "replace": lambda store: store.replace("_job/x", b"content"),
    "read": lambda store: store.read("there"),
    "head": lambda store: store.head("there"),
    "list": lambda store: list(store.list()),
    "delete": lambda store: store.delete("_job/x"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)


@pytest.fixture
def store(any_front: Proxy) -> S3Store:
    """A store with one object, on each server in turn."""
    return with_one(any_front)


def with_one(front: Proxy) -> S3Store:
    made = new_store(front)
    made.create("there", b"content")
    front.requests.clear()
    return made


def burst(share: float, seed: int) -> list[Fault]:
    """Faults that answer this share of all requests with 503, 500 or 429."""
    rng, each = random.Random(seed), 1 - (1 - share) ** (1 / len(BUSY))
    return [Fault("status", status=status, code=code, only=lambda _: rng.random() < each) for status, code in BUSY]


def work(store: S3Store, number: int) -> None:
    """The requests of a shard to its store, with little data."""
    key, content = f"n/{number}", bytes([number]) * 100
    assert store.create(key, content) in (CREATED, EXISTS)
    assert store.read(key) == content
    assert store.head(key).size_bytes == 100  # type: ignore[union-attr] # it exists
    store.replace(f"_job/{number}", content)


@pytest.mark.fault(27)
def test_a_burst_of_busy_answers_slows_us_down_and_breaks_nothing(
    any_front: Proxy, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 30 % of 503, 500 and 429, all operations complete. Each refused request pauses once and is retried once."""
    monkeypatch.setattr(s3, "PAUSE_S", PAUSE_S)
    monkeypatch.setattr(s3_errors, "BUSY_PATIENCE_S", BUSY_PATIENCE_S)
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        time.sleep(seconds)

    monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=sleep, monotonic=time.monotonic))
    any_front.requests.clear()
    any_front.faults = burst(0.3, seed=1)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda number: work(store, number), range(40)))
    hurt = sum(bool(request.fault) for request in any_front.requests)
    print(f"{hurt} of {len(any_front.requests)} turned away, {sum(pauses):.2f} s of pauses")
    assert hurt > 30 and len(any_front.requests) == 4 * 40 + hurt
    assert len(pauses) == hurt and min(pauses) > 0
    any_front.faults = []
    assert len(list(store.list("n/"))) == 40


@pytest.mark.fault(27)
def test_pauses_grow_and_are_random(front: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that were refused at the same time do not retry at the same time, retry ever less often, and give up."""
    monkeypatch.setattr(s3, "PAUSE_S", PAUSE_S)
    monkeypatch.setattr(s3_errors, "BUSY_PATIENCE_S", BUSY_PATIENCE_S)
    store, slept = S3Store(new_store(front).url, StoreOptions(region="us-east-1")), [0.0]
    monkeypatch.setattr(s3, "time", SimpleNamespace(sleep=slept.append, monotonic=lambda: sum(slept)))
    front.faults = [Fault("status")]
    times = []
    for _ in range(2):
        slept[:] = [0.0]
        with pytest.raises(StoreUnknown, match="overloaded"):
            store.head("x")
        times.append(slept[1:])
    assert times[0] != times[1]
    for pauses in times:
        assert 20 < sum(pauses) <= 30 and len(pauses) < 20
        assert all(PAUSE_S * 2**at / 2 <= pause <= PAUSE_S * 2**at for at, pause in enumerate(pauses[:5]))
        assert max(pauses) <= s3.LONGEST_PAUSE_S


@pytest.mark.fault(28)
@each_operation
def test_an_outage_ends_in_unknown_after_a_bounded_time(
    any_front: Proxy, store: S3Store, operation: Callable[[S3Store], Any]
) -> None:
    """If every request fails or is not answered, each operation is soon StoreUnknown."""
    for fault in (Fault("status", status=500, code="InternalError"), Fault("reset"), Fault("status", code="SlowDown")):
        any_front.faults, began = [fault], time.monotonic()
        any_front.requests.clear()
        with pytest.raises(StoreUnknown, match=r"overloaded or failing|no reply"):
            operation(store)
        assert time.monotonic() - began < 8 and 2 <= len(any_front.requests) < 60


@pytest.mark.fault(28)
def test_a_server_that_is_not_there_is_named_soon(monkeypatch: pytest.MonkeyPatch, front: Proxy) -> None:
    """A refused connection is StoreUnknown, and asks whether the server is running."""
    with pytest.raises(StoreUnknown, match="is the S3 server running"):
        S3Store("s3://bucket", StoreOptions(endpoint_url="http://127.0.0.1:9")).head("x")


@pytest.mark.fault(29)
@each_operation
def test_silence_is_ended_by_a_time_out(front: Proxy, operation: Callable[[S3Store], Any]) -> None:
    """A request that is not answered is retried on another connection; if none is answered, it is StoreUnknown."""
    store = with_one(front)
    front.faults = [Fault("silent", times=1)]
    operation(store)
    front.faults, began = [Fault("silent")], time.monotonic()
    with pytest.raises(StoreUnknown, match="ReadTimeoutError"):
        operation(store)
    assert 2 * s3_client.READ_TIMEOUT_S <= time.monotonic() - began < 8


@pytest.mark.fault(29)
def test_a_slow_server_is_waited_for_and_others_proceed(any_front: Proxy, store: S3Store) -> None:
    """Requests of half a second each succeed without a retry, and eight in parallel take little longer than one."""
    any_front.latency_s, began = 0.5, time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        assert list(pool.map(lambda _: store.read("there"), range(THREADS))) == [b"content"] * THREADS
    assert 0.5 <= time.monotonic() - began < 3.5 and len(any_front.requests) == THREADS


@pytest.mark.fault(32)
@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_to_a_create_is_exactly_one_object(any_front: Proxy, store: S3Store, times: int) -> None:
    """The server created it and the reply was lost: the retry finds it complete, and it was created once."""
    any_front.faults = [Fault("drop_reply", method="PUT", times=times)]
    assert store.create("new", b"first") == EXISTS
    assert any_front.counts()["PUT"] == times + 1
    assert store.create("new", b"second") == EXISTS
    assert store.read("new") == b"first" and len(list(store.list("new"))) == 1


@pytest.mark.fault(32)
def test_answers_that_are_always_lost_are_unknown_and_the_object_is_there(any_front: Proxy, store: S3Store) -> None:
    """It is StoreUnknown, and a check finds the object. A later writer gets EXISTS."""
    any_front.faults = [Fault("drop_reply", method="PUT")]
    with pytest.raises(StoreUnknown):
        store.create("new", b"first")
    assert store.head("new") is not None
    any_front.faults = []
    assert store.create("new", b"second") == EXISTS and store.read("new") == b"first"


@pytest.mark.fault(33)
def test_a_conflict_is_tried_again(any_front: Proxy, store: S3Store) -> None:
    """409 means that others write at this moment: retried within a limit, then StoreUnknown, with nothing created."""
    conflict = {"method": "PUT", "status": 409, "code": "ConditionalRequestConflict"}
    any_front.faults = [Fault("status", times=3, **conflict)]  # type: ignore[arg-type]
    assert store.create("new", b"content") == CREATED
    assert any_front.counts()["PUT"] == 4
    any_front.faults, began = [Fault("status", **conflict)], time.monotonic()  # type: ignore[arg-type]
    with pytest.raises(StoreUnknown, match="other writers use this object"):
        store.create("other", b"content")
    assert time.monotonic() - began < 10
    any_front.faults = []
    assert store.head("other") is None


@pytest.mark.fault(34)
def test_a_server_that_ignores_if_none_match_is_refused(
    moto_front: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """The probe sees the second create succeed; a launch there exits 2 with a message and creates no job."""
    store = new_store(moto_front)
    moto_front.faults = [Fault("strip", method="PUT")]  # moto accepts any signature
    with pytest.raises(StoreUnsafe, match="honours If-None-Match"):
        store.prove_create_once()
    ran = p3d("launch", archive, store.url, "--weights", small_weights)
    assert ran.code == 2 and "lets a second writer replace an object" in ran.err and "Traceback" not in ran.err
    assert list(store.list()) == []
    moto_front.faults = []
    store.prove_create_once()


@pytest.fixture
def many(front: Proxy) -> S3Store:
    """2 001 objects: 1 000 that begin with 0, 1 000 with 1, one with 2."""
    store = new_store(front)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda number: store.replace(f"_job/{number:04d}", b""), range(2001)))
    front.requests.clear()
    return store


@pytest.mark.fault(35)
def test_a_listing_takes_a_page_for_a_thousand(front: Proxy, many: S3Store) -> None:
    """requests = ceil(n / 1000), also at the boundaries; a page that fails is retried, and each key is listed once."""
    for prefix, count, pages in (("", 2001, 3), ("0", 1000, 1), ("2", 1, 1), ("3", 0, 1)):
        front.requests.clear()
        assert len(list(many.list(f"_job/{prefix}"))) == count
        assert front.counts() == {"GET": pages}
    faults = (
        Fault("status", key="continuation-token", times=3),
        Fault("reset", key="continuation-token", times=2),
        Fault("cut", key="continuation-token", at=5000, times=1),
        Fault("cut", key="list-type", at=0, times=1),
        Fault("reset", key="list-type", at=5000, times=1),
    )
    for fault in faults:
        front.requests.clear()
        times, front.faults = fault.times or 0, [fault]
        assert [info.key for info in many.list("_job/")] == [f"_job/{number:04d}" for number in range(2001)], fault
        assert len(front.requests) == 3 + times, fault


@pytest.mark.fault(35)
def test_a_listing_that_cannot_continue_is_an_error(front: Proxy, many: S3Store) -> None:
    """A partial listing is never treated as complete."""
    for fault in (Fault("status", key="continuation-token"), Fault("cut", key="continuation-token", at=5000)):
        front.faults, seen = [fault], 0
        with pytest.raises(StoreUnknown):
            for _ in many.list("_job/"):
                seen += 1
        assert seen == 1000
