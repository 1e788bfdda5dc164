"""Download the body of one S3 object: complete and verified, or an error.

botocore retries requests but not bodies. A body that is cut off, reset, silent or too slow is continued from where it
ended, by a ranged GET with `If-Match`. It is fetched again from the start if no digest could verify the joined pieces,
or after a digest mismatch. The number of attempts is limited, and pauses are random.

Many small bodies in a row may be slow, too, each too short to be noticed: a reader of them is stopped after SLOW_S.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

from p3d.pipeline.errors import StoreChanged, StoreCorrupt, StoreError, StoreUnknown

BODY_TRIES = 4
PAUSE_S = 0.2  # before the second try, doubled for the next
PIECE_BYTES = 1 << 14  # small, because `read` blocks until a piece is complete, and a slow body must be noticed
TRICKLE_S = 15.0  # in which at least TRICKLE_BYTES must arrive; botocore's read time-out detects silence
TRICKLE_BYTES = 1 << 17
SLOW_S = 60.0  # in bodies slower than that rate, one after the other, after which a reader is stopped
SHORT_S = 1.0  # a small body that takes less says nothing about the rate
SLOW_SHARE = 4  # slow bodies take at least one SLOW_SHARE-th of the time since the first of them
MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')  # ETags of multipart uploads contain a "-" and are not MD5 digests


class _Trickle(Exception):
    """Fewer than TRICKLE_BYTES arrived in TRICKLE_S."""


class _SlowBodies:
    """The time that this process spends in slow bodies, until one comes at a good rate. Thread-safe."""

    def __init__(self) -> None:
        self._slow_s, self._since, self._lock = 0.0, 0.0, threading.Lock()

    def add(self, size_bytes: int, took_s: float, place: str) -> None:
        """Count a complete body. StoreUnknown after SLOW_S in slow ones, without much else in between."""
        if took_s < SHORT_S and size_bytes < PIECE_BYTES:
            return
        fast, now = size_bytes * TRICKLE_S >= TRICKLE_BYTES * took_s, time.monotonic()
        with self._lock:
            if fast or self._slow_s * SLOW_SHARE < now - took_s - self._since:
                self._slow_s, self._since = 0.0, now - took_s
            self._slow_s += 0.0 if fast else took_s
            stop = self._slow_s >= SLOW_S
            self._slow_s = 0.0 if stop else self._slow_s
        if stop:
            raise StoreUnknown(f"{place}: the server sends only {size_bytes / took_s:.0f} bytes/s; try again later")


_slow_bodies = _SlowBodies()


@dataclass(slots=True)
class Body:
    """A download of bytes [start, end) of an object (end None: to its end) into `sink`, an empty file.

    `etag` requires that version of the object; None takes the current one. `check` is False for servers whose ETags do
    not have the meaning that AWS gives them. `received` is called with the size of each piece that arrives.
    A `patient` download is not stopped because it and others before it are slow.
    """

    get: Callable[..., dict[str, Any]]  # get_object of this key; raises store errors
    sink: BinaryIO
    place: str
    etag: str | None
    check: bool
    start: int = 0
    end: int | None = None
    received: Callable[[int], object] | None = None
    patient: bool = False
    read_s: float = 0.0  # spent in reading bodies
    at: int = 0  # bytes that were written to the sink
    provable: bool = False  # whether joined pieces can be verified; if not, a cut body is fetched again from the start
    expected_md5: str | None = None
    md5: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    def fetch(self) -> None:
        """Fetch all bytes. StoreChanged, StoreMissing, StoreCorrupt for wrong stored bytes, otherwise StoreUnknown."""
        planned, wrong, failure = self.etag, "", StoreError()
        for attempt in range(BODY_TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                self._fetch_rest()
                matches = self.expected_md5 in (None, self.md5.hexdigest())
            except FlexibleChecksumError:  # botocore verifies the checksum that is stored with the object
                matches = False
            except StoreChanged as error:
                if planned is not None or self.etag is None:
                    raise
                failure, self.etag = error, None  # a control object was replaced between two pieces: fetch the new one
                self._again()
                continue
            except (HTTPClientError, IncompleteReadError, _Trickle) as error:
                failure = StoreUnknown(f"{self.place}: the download was cut off ({type(error).__name__.strip('_')})")
                if not self.provable:
                    self._again()
                continue
            if matches:
                if not self.patient:
                    _slow_bodies.add(self.at, self.read_s, self.place)
                return
            if self.md5.hexdigest() == wrong:  # the same wrong bytes twice: that is what the store holds
                raise StoreCorrupt(
                    f"{self.place}: the bytes received do not match the object's checksum or ETag; if the ETags of "
                    "this server are not MD5 digests, use --checksums when_required"
                )
            failure = StoreUnknown(
                f"{self.place}: the bytes received are wrong, and different every time; is the network or the memory "
                "of a machine faulty?"
            )
            wrong = self.md5.hexdigest()
            self._again()
        raise failure

    def _fetch_rest(self) -> None:
        first = self.start + self.at
        asked = {} if self.etag is None else {"IfMatch": self.etag}
        if first or self.end is not None:
            asked["Range"] = f"bytes={first}-{'' if self.end is None else self.end - 1}"
        reply = self.get(**asked)
        if self.etag is not None and str(reply.get("ETag")).strip('"') != self.etag.strip('"'):
            raise StoreChanged(f"{self.place}: no longer the same object; the server ignored If-Match")
        if first and not str(reply.get("ContentRange", "")).startswith(f"bytes {first}-"):
            self._again()  # the server does not support ranges: this reply holds the whole object
        if not self.at:
            self._learn(reply)
        body, since, level = reply["Body"], time.monotonic(), self.at
        began = since
        try:
            while piece := body.read(PIECE_BYTES):
                self.sink.write(piece)
                self.md5.update(piece)
                self.at += len(piece)
                if self.received is not None:
                    self.received(len(piece))
                if (now := time.monotonic()) - since > TRICKLE_S:
                    if self.at - level < TRICKLE_BYTES:
                        raise _Trickle
                    since, level = now, self.at
        finally:
            self.read_s += time.monotonic() - began
            body.close()

    def _learn(self, reply: dict[str, Any]) -> None:
        """Take from the first reply which object this is, and how to verify that all of it arrived."""
        self.etag = self.etag or reply.get("ETag")
        md5 = MD5_ETAG.fullmatch(self.etag or "")
        encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
        whole = self.check and self.end is None and not self.start
        self.expected_md5 = md5[1] if whole and md5 and not encrypted else None
        checksums = [value for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"]
        promised = whole and any("-" not in value for value in checksums)  # "-": checksum of parts, not verifiable
        self.provable = self.etag is not None and (self.expected_md5 is not None or not promised)

    def _again(self) -> None:
        """Discard what was received, and start again at the first byte."""
        self.sink.seek(0)
        self.sink.truncate()
        self.at = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
