"""A least rate for every reply of an S3 server to a GET: its headers, a page of a listing, an error, a body.

botocore's read time-out is for silence. A server that sends one byte per second is never silent, and could hold a
listing for days. So the socket is read through `_Paced`, which counts the time spent in waiting for bytes. Waiting for
the first byte does not count, nor does the time in which nobody reads. `body.py` has a stricter limit for large bodies.
"""

from __future__ import annotations

import io
import time
from http.client import HTTPResponse
from typing import Any

from botocore import awsrequest

WAIT_S = 15.0  # of waiting, in which at least LEAST_BYTES must arrive
LEAST_BYTES = 1 << 14


class _Paced(io.RawIOBase):
    """The bytes of a socket. TimeoutError, as for silence, if they arrive too slowly."""

    def __init__(self, raw: Any) -> None:
        self._raw, self._begun = raw, False
        self._waited_s, self._n_bytes = 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        began = time.monotonic()
        n_read: int | None = self._raw.readinto(buffer)
        if self._begun:
            self._waited_s += time.monotonic() - began
        self._begun = True
        self._n_bytes += n_read or 0
        if self._waited_s > WAIT_S and n_read:
            if self._n_bytes < LEAST_BYTES:
                raise TimeoutError(f"only {self._n_bytes} bytes arrived in {self._waited_s:.0f} s")
            self._waited_s, self._n_bytes = 0.0, 0
        return n_read

    def close(self) -> None:
        self._raw.close()
        super().close()


class PacedResponse(HTTPResponse):
    """A reply that is read at a least rate. Replies to PUT are not: S3 sends blanks while it copies an object."""

    def __init__(self, sock: Any, debuglevel: int = 0, method: str | None = None, url: str | None = None) -> None:
        super().__init__(sock, debuglevel, method, url)
        if method != "PUT":
            self.fp = io.BufferedReader(_Paced(self.fp.detach()))


def pace_replies() -> None:
    """Let botocore's connections read their replies so. They are its own classes, which nothing else uses."""
    for kind in (awsrequest.AWSHTTPConnection, awsrequest.AWSHTTPSConnection):
        kind.response_class = PacedResponse
