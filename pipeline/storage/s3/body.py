"""The body of one S3 object: whole and proved, or an error; never less than what was asked for.

botocore retries requests and not bodies. A body that is cut, reset, silent or a trickle is gone on with from where it
ended, by a ranged GET with `If-Match`; where nothing would prove the sum of the pieces, and after a digest that did not
match, it is fetched again from the start. Tries are counted, pauses are random.
"""

from __future__ import annotations

import hashlib
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from botocore.exceptions import FlexibleChecksumError, HTTPClientError, IncompleteReadError

from p3d.pipeline.errors import StoreChanged, StoreCorrupt, StoreError, StoreUnknown

BODY_TRIES = 4
PAUSE_S = 0.2  # before the second try, doubled for the next
PIECE_BYTES = 1 << 14  # small, because a piece is waited for until it is whole, and a trickle must be noticed
TRICKLE_S = 15.0  # in which at least TRICKLE_BYTES must arrive; silence is for botocore's read time-out
TRICKLE_BYTES = 1 << 17
MD5_ETAG = re.compile(r'"?([0-9a-f]{32})"?')  # multipart uploads have a "-" and are no MD5


class _Trickle(Exception):
    """Too few bytes for too long."""


@dataclass(slots=True)
class Body:
    """Bytes [start, end) of an object, end None for all of it, on their way into `sink`, a file opened at its start.

    `etag` pins the object; None takes it as it is now. `check` is off for servers whose ETags are not what AWS's are.
    """

    get: Callable[..., dict[str, Any]]  # get_object of this key; its errors are mapped already
    sink: BinaryIO
    place: str
    etag: str | None
    check: bool
    start: int = 0
    end: int | None = None
    at: int = 0  # bytes that are in the sink
    provable: bool = False  # can what comes in pieces be proved? else a cut body is fetched again from the start
    expected_md5: str | None = None
    md5: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))

    def fetch(self) -> None:
        """All of it. StoreChanged, StoreMissing; StoreCorrupt if the stored bytes are wrong, else StoreUnknown."""
        planned, wrong, failure = self.etag, "", StoreError()
        for attempt in range(BODY_TRIES):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            try:
                self._fetch_rest()
                matches = self.expected_md5 in (None, self.md5.hexdigest())
            except FlexibleChecksumError:  # botocore's check of the checksum that is stored with the object
                matches = False
            except StoreChanged as error:
                if planned is not None or self.etag is None:
                    raise
                failure, self.etag = error, None  # a control object was replaced between two pieces: take the new one
                self._again()
                continue
            except (HTTPClientError, IncompleteReadError, _Trickle) as error:
                failure = StoreUnknown(f"{self.place}: its content breaks off ({type(error).__name__.strip('_')})")
                if not self.provable:
                    self._again()
                continue
            if matches:
                return
            if self.md5.hexdigest() == wrong:  # the same wrong bytes twice: that is what the store holds
                raise StoreCorrupt(
                    f"{self.place}: the bytes that arrive are not those of the object's checksum or ETag; if the ETags "
                    "of this server are no MD5, use --checksums when_required"
                )
            failure = StoreUnknown(
                f"{self.place}: the bytes that arrive are wrong, and others every time; is the network, or the memory "
                "of a machine, damaged?"
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
            raise StoreChanged(f"{self.place}: no longer the same object; the server did not heed If-Match")
        if first and not str(reply.get("ContentRange", "")).startswith(f"bytes {first}-"):
            self._again()  # the server does not know ranges: this is the whole
        if not self.at:
            self._learn(reply)
        body, since, level = reply["Body"], time.monotonic(), self.at
        try:
            while piece := body.read(PIECE_BYTES):
                self.sink.write(piece)
                self.md5.update(piece)
                self.at += len(piece)
                if (now := time.monotonic()) - since > TRICKLE_S:
                    if self.at - level < TRICKLE_BYTES:
                        raise _Trickle
                    since, level = now, self.at
        finally:
            body.close()

    def _learn(self, reply: dict[str, Any]) -> None:
        """What the first reply says: which object this is, and how to prove that all of it came."""
        self.etag = self.etag or reply.get("ETag")
        md5 = MD5_ETAG.fullmatch(self.etag or "")
        encrypted = str(reply.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in reply
        whole = self.check and self.end is None and not self.start
        self.expected_md5 = md5[1] if whole and md5 and not encrypted else None
        checksums = [value for name, value in reply.items() if name.startswith("Checksum") and name != "ChecksumType"]
        promised = whole and any("-" not in value for value in checksums)  # "-": of the parts, which nobody can check
        self.provable = self.etag is not None and (self.expected_md5 is not None or not promised)

    def _again(self) -> None:
        """From the start."""
        self.sink.seek(0)
        self.sink.truncate()
        self.at = 0
        self.md5 = hashlib.md5(usedforsecurity=False)
