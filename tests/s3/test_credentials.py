"""Credentials that expire, are replaced or stay missing are read again by botocore's chain, and no video fails."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest

from p3d.pipeline.errors import StoreDenied
from p3d.pipeline.storage.s3.client import client_for
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import DEFAULTS, EXISTS, ObjectInfo
from tests.conftest import LONG, P3D, p3d
from tests.jobs.test_outage import wait_for
from tests.s3.conftest import new_store
from tests.s3.proxy import Fault, Proxy
from tests.servers import ACCESS_KEY, SECRET_KEY

OLD, NEW = "AKOLDOLDOLD", "AKNEWNEWNEW"
REFUSALS = ((400, "ExpiredToken"), (403, "ExpiredToken"), (400, "InvalidToken"), (403, "InvalidAccessKeyId"))
OPERATIONS: dict[str, Callable[[S3Store, Path], Any]] = {
    "create": lambda store, _: store.create("there", b"again"),
    "read": lambda store, _: store.read("there"),
    "open": lambda store, _: store.open("there").read(),
    "head": lambda store, _: store.head("there"),
    "list": lambda store, _: list(store.list()),
    "download": lambda store, folder: store.download("there", folder / "copy"),
    "replace": lambda store, _: store.replace("_job/x", b"content"),
    "delete": lambda store, _: store.delete("_job/x"),
}
each_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
Renew = Callable[..., None]


@pytest.fixture
def renew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Renew:
    """Writes the credentials file, the only one that botocore can find."""
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def write(key: str, secret: str = SECRET_KEY) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name, raising=False)
        text = f"[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
        (tmp_path / "credentials").write_text(text)

    return write


def refuse(key: str, status: int, code: str) -> Fault:
    """From now on, requests with this access key are refused."""
    return Fault("status", status=status, code=code, only=lambda headers: key in headers["authorization"])


@pytest.fixture
def store(moto_front: Proxy, renew: Renew) -> S3Store:
    """A store on moto, which accepts any key, with one object, reached with the OLD key."""
    made = new_store(moto_front)
    renew(OLD)
    made.create("there", b"content")
    moto_front.requests.clear()
    return made


@pytest.mark.fault(46)
@pytest.mark.parametrize(("status", "code"), REFUSALS)
@each_operation
def test_credentials_that_were_renewed_are_read_again(
    moto_front: Proxy,
    store: S3Store,
    renew: Renew,
    tmp_path: Path,
    operation: Callable[[S3Store, Path], Any],
    status: int,
    code: str,
) -> None:
    """They expire and the file is rewritten: each operation succeeds, also HEAD, whose refusal has no message."""
    moto_front.faults = [refuse(OLD, status, code)]
    renew(NEW)
    answer = operation(store, tmp_path)
    assert (
        answer in (None, EXISTS, b"content") or isinstance(answer, ObjectInfo) or [o.key for o in answer] == ["there"]
    )
    refused = [request for request in moto_front.requests if request.fault]
    assert 1 <= len(refused) <= 2 and len(moto_front.requests) <= len(refused) + 3
    assert all(NEW in request.headers["authorization"] for request in moto_front.requests[len(refused) :])


@pytest.mark.fault(46)
@each_operation
def test_credentials_that_were_not_renewed_are_denied_at_once(
    moto_front: Proxy, store: S3Store, renew: Renew, tmp_path: Path, operation: Callable[[S3Store, Path], Any]
) -> None:
    """Without new ones, StoreDenied says so after few requests. As soon as there are new ones, it works."""
    for status, code in REFUSALS:
        moto_front.requests.clear()
        moto_front.faults = [refuse(OLD, status, code)]
        with pytest.raises(StoreDenied, match="have expired or are not valid"):
            operation(store, tmp_path)
        assert len(moto_front.requests) <= 6  # botocore asks for the bucket's region when a HEAD is answered with 400
    renew(NEW)
    operation(store, tmp_path)


@pytest.mark.fault(46)
@pytest.mark.parametrize(("key", "secret"), [(OLD, SECRET_KEY), (ACCESS_KEY, "wrong")])
def test_a_real_server_that_does_not_know_the_key(front: Proxy, renew: Renew, key: str, secret: str) -> None:
    """SeaweedFS checks signatures: a wrong key or secret is a credentials error, and the right ones are then read."""
    store = new_store(front)
    store.create("there", b"content")
    renew(key, secret)
    for ask in (store.head, store.read):
        with pytest.raises(StoreDenied, match="have expired or are not valid"):
            ask("there")
    renew(ACCESS_KEY, SECRET_KEY)
    assert store.head("there") is not None and store.read("there") == b"content"


@pytest.mark.fault(26, 46)
def test_a_refused_head_says_why(moto_front: Proxy, store: S3Store) -> None:
    """A permanent refusal is reported as such and not as expired credentials, also for an empty object."""
    moto_front.faults = [Fault("status", status=403, code="AccessDenied")]
    with pytest.raises(StoreDenied, match=r"access denied.*made by a test"):
        store.head("there")
    assert moto_front.counts() == {"HEAD": 1, "GET": 1}
    moto_front.faults = []
    store.create("empty", b"")
    moto_front.faults = [Fault("status", method="HEAD", status=403, times=1)]
    assert store.head("empty") is not None
    moto_front.faults = [Fault("status", method="HEAD", status=403, times=1)]
    assert store.head("none") is None


@pytest.mark.fault(46)
def test_a_renewal_in_one_thread_serves_all(moto_front: Proxy, store: S3Store, renew: Renew) -> None:
    """Many threads that are refused at the same time share one new client."""
    moto_front.faults = [refuse(OLD, 400, "ExpiredToken")]
    before = client_for(DEFAULTS)
    renew(NEW)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: store.read("there"), range(32))) == [b"content"] * 32
    assert client_for(DEFAULTS) is not before
    assert sum(bool(request.fault) for request in moto_front.requests) <= 8 * 2


@pytest.mark.skipif(not LONG, reason="makes suites long: make chaos")
@pytest.mark.fault(46)
def test_a_job_whose_credentials_expire(
    moto_front: Proxy, renew: Renew, tmp_path: Path, archive: Path, small_weights: Path
) -> None:
    """If renewed in time, the job only pauses. If not, it stops with exit code 6 and resumes. No video fails."""
    store = new_store(moto_front)
    renew(OLD)
    for path in archive.rglob("*.mp4"):
        store.create(f"in/{path.relative_to(archive)}", path)

    own = boto3.session.Session(ACCESS_KEY, SECRET_KEY).client("s3")

    def launched(*words: object) -> subprocess.Popen[str]:
        said = (tmp_path / "said").open("w")
        return subprocess.Popen([*P3D, *map(str, words)], stdout=subprocess.DEVNULL, stderr=said, text=True)

    def commits() -> int:
        return int(own.list_objects_v2(Bucket=store.bucket, Prefix=f"{store.prefix}out/clips/")["KeyCount"])

    out = f"{store.url}/out"
    words = ["launch", f"{store.url}/in", out, "--weights", small_weights, "--shard-videos", 1]
    driver = launched(*words, "--store-patience", 60)
    wait_for(lambda: commits() >= 1, driver)
    moto_front.faults = [refuse(OLD, 400, "ExpiredToken")]
    wait_for(lambda: "paused" in (tmp_path / "said").read_text(), driver)
    assert "have expired" in (tmp_path / "said").read_text()
    renew(NEW)
    wait_for(lambda: "going on" in (tmp_path / "said").read_text(), driver)
    moto_front.faults = [refuse(OLD, 400, "ExpiredToken"), refuse(NEW, 400, "ExpiredToken")]
    driver.terminate()
    driver.wait(60)
    moto_front.faults = []
    driver = launched("resume", out, "--store-patience", 1)
    seen = commits()
    wait_for(lambda: commits() > seen, driver)
    moto_front.faults = [refuse(NEW, 403, "ExpiredToken")]
    assert driver.wait(90) == 6, (tmp_path / "said").read_text()
    assert "no video failed because of it" in (tmp_path / "said").read_text()
    moto_front.faults = []
    ran = p3d("resume", out, "--json")
    assert ran.code == 0 and ran.json["videos_failed"] == 0 and ran.json["videos_done"] == 12, ran.err
