"""The body of an object is complete and verified, even if it was cut, reset, silent, slow, flipped or replaced."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import random
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from p3d.pipeline.errors import StoreChanged, StoreCorrupt, StoreFull, StoreMissing, StoreUnknown
from p3d.pipeline.storage.s3 import body as s3_body
from p3d.pipeline.storage.s3 import pace as s3_pace
from p3d.pipeline.storage.s3.client import client_for
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import DEFAULTS, StoreOptions
from p3d.pipeline.storage.urls import open_store
from tests.s3.conftest import new_store
from tests.s3.proxy import Fault, Proxy

CONTENT = random.Random(7).randbytes(300_000)
MULTIPART = '"0123456789abcdef0123456789abcdef-2"'


@pytest.fixture
def store(front: Proxy) -> S3Store:
    store = new_store(front)
    store.create("v.mp4", CONTENT)
    front.requests.clear()
    return store


def gets(front: Proxy) -> list[tuple[str, str]]:
    """(Range, fault) of the GET requests so far."""
    return [(r.headers.get("range", ""), r.fault) for r in front.requests if r.method == "GET"]


def test_a_download_is_one_request(front: Proxy, store: S3Store, tmp_path: Path) -> None:
    """A download without faults is one request, with the planned ETag, that asks for the stored checksum."""
    etag = f'"{hashlib.md5(CONTENT).hexdigest()}"'
    store.download("v.mp4", tmp_path / "v", etag=etag)
    assert (tmp_path / "v").read_bytes() == CONTENT
    assert [(r.method, r.headers["if-match"], r.headers["x-amz-checksum-mode"]) for r in front.requests] == [
        ("GET", etag, "ENABLED")
    ]


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    ("kind", "at"),
    [("cut", 0), ("cut", 1), ("cut", 100_000), ("cut", len(CONTENT) - 1), ("reset", 100_000), ("silent", 100_000)],
)
def test_a_body_that_is_cut_off_is_continued(
    front: Proxy, store: S3Store, tmp_path: Path, kind: Literal["cut", "reset", "silent"], at: int
) -> None:
    """Cut, reset or silent at any byte: the rest is fetched by range with If-Match, and the whole is correct."""
    front.faults = [Fault(kind, method="GET", at=at, times=1)]
    store.download("v.mp4", tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == CONTENT
    assert [fault for _, fault in gets(front)] == [kind, ""]
    begin = int(gets(front)[1][0].removeprefix("bytes=").rstrip("-") or 0)
    assert begin <= at and (at < s3_body.PIECE_BYTES or begin > 0 or kind == "reset")  # a reset may lose all bytes
    assert front.requests[1].headers["if-match"] == f'"{hashlib.md5(CONTENT).hexdigest()}"'


@pytest.mark.fault(30)
def test_a_body_that_is_always_cut_off_is_unknown_and_bounded(front: Proxy, store: S3Store, tmp_path: Path) -> None:
    """Four attempts, then StoreUnknown: a store error, and a partial file is never accepted."""
    front.faults = [Fault("cut", method="GET", at=100)]
    with pytest.raises(StoreUnknown, match="was cut off"):
        store.download("v.mp4", tmp_path / "v")
    assert len(gets(front)) == s3_body.BODY_TRIES


def put_in_parts(store: S3Store, key: str) -> None:
    """CONTENT as an object of a multipart upload, whose ETag is not an MD5 digest."""
    client, where = client_for(DEFAULTS), {"Bucket": store.bucket, "Key": store.prefix + key}
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = client.upload_part(**where, UploadId=upload, PartNumber=1, Body=CONTENT)
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload=parts)


def sha256_header(content: bytes) -> dict[str, str]:
    """The checksum header that S3 sends for a whole object."""
    return {"x-amz-checksum-sha256": base64.b64encode(hashlib.sha256(content).digest()).decode()}


@pytest.mark.fault(30)
def test_pieces_are_joined_only_if_they_can_be_verified(front: Proxy, store: S3Store) -> None:
    """A multipart object with a checksum of the whole is fetched again from the start; without one it is continued."""
    put_in_parts(store, "parts")
    for headers, rest in (({}, "bytes=200000-"), (sha256_header(CONTENT), "")):
        front.faults = [Fault("cut", method="GET", at=200_000, times=1, headers=headers)]
        front.requests.clear()
        assert store.read("parts") == CONTENT
        assert gets(front) == [("", "cut"), (rest, "")]


@pytest.mark.fault(30)
def test_a_part_that_is_cut_off_is_read_again(front: Proxy, store: S3Store) -> None:
    """A footer that is read by range survives a cut, with If-Match for the rest."""
    front.faults = [Fault("cut", method="GET", at=10, times=2)]
    with store.open("v.mp4") as file:
        file.seek(-1000, os.SEEK_END)
        assert file.read() == CONTENT[-1000:]
    assert all(r.headers.get("if-match") for r in front.requests if r.method == "GET")


@pytest.mark.fault(31)
def test_flipped_bytes_are_never_taken(front: Proxy, store: S3Store, tmp_path: Path) -> None:
    """A flipped byte at the right length is fetched again. If it differs every time, it is a network error."""
    front.faults = [Fault("flip", method="GET", times=1)]
    store.download("v.mp4", tmp_path / "v")
    assert (tmp_path / "v").read_bytes() == CONTENT and gets(front) == [("", "flip"), ("", "")]
    front.requests.clear()
    front.faults = [Fault("flip", method="GET")]
    with pytest.raises(StoreUnknown, match="different every time"):
        store.read("v.mp4")
    assert len(gets(front)) == s3_body.BODY_TRIES
    front.requests.clear()
    front.faults = [Fault("flip", method="GET", at=5)]
    with pytest.raises(StoreCorrupt, match="--checksums when_required"):
        store.read("v.mp4")
    assert len(gets(front)) == 2  # the same wrong bytes twice: the store has them


@pytest.mark.fault(31)
def test_a_flip_after_a_cut_is_seen(front: Proxy, store: S3Store) -> None:
    """The digest covers the joined pieces."""
    front.faults = [Fault("cut", method="GET", at=150_000, times=1), Fault("flip", method="GET", times=1)]
    assert store.read("v.mp4") == CONTENT
    assert [fault for _, fault in gets(front)] == ["cut", "flip", ""] and gets(front)[2][0] == ""


@pytest.mark.fault(31)
def test_the_checksum_that_is_stored_counts_where_the_etag_does_not(front: Proxy, store: S3Store) -> None:
    """A multipart object has no MD5. Its full-object checksum is verified; a checksum of its parts cannot be."""
    put_in_parts(store, "parts")
    front.faults = [Fault("rewrite", method="GET", headers=sha256_header(b"something else"))]
    with pytest.raises(StoreCorrupt):
        store.read("parts")
    front.faults = [Fault("rewrite", method="GET", headers={"x-amz-checksum-sha256": "AAAA-2"})]
    assert store.read("parts") == CONTENT


@pytest.mark.parametrize("encryption", ["aws:kms", "aws:kms:dsse"])
def test_etags_that_are_not_md5_are_not_used_as_md5(front: Proxy, store: S3Store, encryption: str) -> None:
    """KMS-encrypted objects have other ETags; servers with their own kind of ETags are read with when_required."""
    odd = {"etag": f'"{"0" * 32}"'}
    front.faults = [Fault("rewrite", method="GET", headers=odd | {"x-amz-server-side-encryption": encryption})]
    assert store.read("v.mp4") == CONTENT
    front.faults = [Fault("rewrite", method="GET", headers=odd)]
    with pytest.raises(StoreCorrupt):
        store.read("v.mp4")
    assert open_store(store.url, StoreOptions(checksums="when_required")).read("v.mp4") == CONTENT


@pytest.mark.fault(29)
def test_a_slow_body_is_aborted(front: Proxy, store: S3Store) -> None:
    """1 KiB/s is too slow: after a while it continues on a new connection, from where it ended; others proceed."""
    store.create("other", b"other")
    front.faults = [Fault("trickle", method="GET", key="v.mp4", times=1)]
    read: list[bytes] = []  # in the order in which they end

    slow = threading.Thread(target=lambda: read.append(store.read("v.mp4")))
    slow.start()
    read.append(store.read("other"))
    slow.join()
    assert read == [b"other", CONTENT]
    asked = gets(front)
    assert ("", "trickle") in asked and asked[-1][0].startswith("bytes=")
    front.faults = [Fault("trickle", method="GET")]
    began = time.monotonic()
    with pytest.raises(StoreUnknown, match="Trickle"):
        store.read("v.mp4")
    assert time.monotonic() - began < 15


@pytest.mark.fault(25)
def test_an_object_that_is_replaced_between_two_pieces(
    front: Proxy, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of two versions are never joined: with a planned ETag it fails, without one the new version is fetched."""
    etag = store.head("v.mp4").etag  # type: ignore[union-attr] # it exists
    new = CONTENT[::-1]

    def replace(seconds: float, content: bytes = new) -> None:
        client_for(DEFAULTS).put_object(Bucket=store.bucket, Key=f"{store.prefix}v.mp4", Body=content)

    monkeypatch.setattr(s3_body, "time", SimpleNamespace(sleep=replace, monotonic=time.monotonic))
    front.faults = [Fault("cut", method="GET", at=150_000, times=1)]
    with pytest.raises(StoreChanged):
        store.download("v.mp4", tmp_path / "v", etag=etag)
    replace(0, CONTENT)
    front.faults = [Fault("cut", method="GET", at=150_000, times=1)]
    assert store.read("v.mp4") == new


@pytest.mark.fault(25)
def test_a_server_that_ignores_if_match_is_detected(front: Proxy, store: S3Store, tmp_path: Path) -> None:
    """The reply's own ETag must be the planned one."""
    etag = store.head("v.mp4").etag  # type: ignore[union-attr] # it exists
    front.faults = [Fault("rewrite", method="GET", headers={"etag": MULTIPART})]
    with pytest.raises(StoreChanged, match="If-Match"):
        store.download("v.mp4", tmp_path / "v", etag=etag)


def test_a_server_without_ranges_is_read_from_the_start(moto_front: Proxy) -> None:
    """If a range request returns the whole object, it is not treated as the rest."""
    store = new_store(moto_front)
    store.create("v.mp4", CONTENT)
    moto_front.faults = [
        Fault("cut", method="GET", at=100_000, times=1),
        Fault("strip", method="GET", header="range"),  # moto accepts any signature
    ]
    assert store.read("v.mp4") == CONTENT
    assert gets(moto_front) == [("", "cut"), ("bytes=100000-", "strip")]


def test_an_empty_object_and_a_missing_one(store: S3Store, tmp_path: Path) -> None:
    """An empty object is read as such; a missing one is StoreMissing."""
    store.create("empty", b"")
    assert store.read("empty") == b""
    store.download("empty", tmp_path / "e", etag=store.head("empty").etag)  # type: ignore[union-attr]
    assert (tmp_path / "e").read_bytes() == b""
    with pytest.raises(StoreMissing):
        store.download("none", tmp_path / "n")


@pytest.mark.fault(36)
def test_a_full_scratch_disk_is_named(store: S3Store) -> None:
    """A download without enough disk space is StoreFull, an error of the job and not of the video."""
    with pytest.raises(StoreFull, match="full"):
        store.download("v.mp4", Path("/dev/full"))


@pytest.mark.fault(29)
def test_many_small_slow_bodies_stop_a_reader(
    front: Proxy, store: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each comes at 1 kB/s, and alone is read. A reader of many is told how slow the server is; a download is not."""
    monkeypatch.setattr(s3_body, "SHORT_S", 0.1)
    monkeypatch.setattr(s3_body, "SLOW_S", 1.0)
    store.create("small", bytes(250))
    front.faults = [Fault("trickle", method="GET", key="/small", rate=1024.0)]
    assert store.read("small") == bytes(250)
    began = time.monotonic()
    with pytest.raises(StoreUnknown, match=r"small: the server sends only \d+ bytes/s"):
        for _ in range(50):
            store.read("small")
            store.download("small", tmp_path / "copy")
    assert time.monotonic() - began < 10
    front.faults = []
    for _ in range(3):
        assert store.read("v.mp4") == CONTENT


def test_slow_bodies_among_others_stop_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body at a good rate starts the count again, and so does a pause."""
    bodies = s3_body._SlowBodies()
    for _ in range(10):
        bodies.add(1000, 50.0, "s3://b/small")
        bodies.add(1 << 20, 0.5, "s3://b/large")
    bodies.add(1000, 50.0, "s3://b/small")
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 300)
    bodies.add(1000, 50.0, "s3://b/small")
    with pytest.raises(StoreUnknown, match="sends only 20 bytes/s"):
        bodies.add(1000, 50.0, "s3://b/small")


@pytest.mark.fault(29)
@pytest.mark.parametrize("what", ["a page of a listing", "a large body", "an error"])
def test_a_reply_of_a_byte_now_and_then_is_ended(
    front: Proxy, store: S3Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """No reply lasts for as long as its bytes keep coming, whichever it is: after a few tries it is an error."""
    monkeypatch.setattr(s3_body, "PIECE_BYTES", 1 << 14)  # as outside of tests: the first piece never becomes complete
    front.faults = [Fault("trickle", key="list-type" if "page" in what else "mp4", rate=100.0)]
    began = time.monotonic()
    with pytest.raises(StoreUnknown, match=r"cut off \(ReadTimeoutError\)" if "body" in what else "a very slow one"):
        if what == "a page of a listing":
            list(store.list())
        elif what == "an error":
            store.read("missing.mp4")
        else:
            store.read("v.mp4")
    assert time.monotonic() - began < 8
    front.faults = []
    assert [info.key for info in store.list()] == ["v.mp4"] and store.read("v.mp4") == CONTENT


def test_the_pace_counts_only_waiting_for_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a slow first byte nor a slow reader ends a reply; too few bytes in too much waiting do."""
    clock, waits = [0.0], iter([100.0, 0.1, 0.1, 14.0, 14.0])

    class Socket(io.RawIOBase):
        def readinto(self, buffer: Any) -> int:
            clock[0] += next(waits)
            return 100

    monkeypatch.setattr(s3_pace, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    paced = s3_pace._Paced(Socket())
    for _ in range(4):
        assert paced.readinto(bytearray(100)) == 100
        clock[0] += 1000
    monkeypatch.setattr(s3_pace, "LEAST_BYTES", 501)
    with pytest.raises(TimeoutError, match="only 500 bytes arrived in 28 s"):
        paced.readinto(bytearray(100))
