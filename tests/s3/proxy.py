"""A fault proxy: an HTTP server in front of a real S3 server that injects faults into requests and replies.

    with proxy(real_s3.env) as p:           # or any dict with AWS_ENDPOINT_URL; p.env reaches the proxy instead
        p.latency_s = 0.05
        p.faults = [Fault("status", share=0.3), Fault("cut", method="GET", at=1000, times=1)]

The first fault that matches a request is applied; `faults` and `latency_s` may change at any time. Requests are
forwarded with their Host header, so signatures stay valid. Random numbers come from `seed`.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["status", "cut", "reset", "silent", "trickle", "drop_reply", "flip", "strip", "rewrite"]
PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Request:
    """A received request: when (monotonic seconds), and the kind of the fault that was applied, or ''."""

    method: str
    path: str
    headers: dict[str, str]
    at_s: float
    fault: str


@dataclass(slots=True)
class Fault:
    """A fault for a `share` of the requests that match, at most `times` times.

    status       answer `status` with S3's error `code` and `headers`; the server is not asked
    cut, reset   end the reply's body after `at` bytes, by closing or by a TCP reset; reset at -1: before any answer
    silent       send nothing after `at` bytes of the body; at -1: no answer at all
    trickle      send the body at `rate` bytes/s
    drop_reply   let the server handle the request, then close without an answer
    flip         change the body's byte at `at`; -1: one at random
    strip        remove the request header `header`
    rewrite      only set `headers` (lower case) in a successful reply, as all other kinds do too
    """

    kind: Kind
    method: str = ""
    key: str = ""
    share: float = 1.0
    times: int | None = None
    status: int = 503
    code: str = "SlowDown"
    at: int = -1
    rate: float = 1024.0
    header: str = "if-none-match"
    headers: dict[str, str] = field(default_factory=dict)
    only: Callable[[dict[str, str]], bool] | None = None

    def fits(self, method: str, path: str, headers: dict[str, str]) -> bool:
        return (
            self.times != 0
            and method.startswith(self.method)
            and self.key in path
            and (self.only is None or self.only(headers))
        )


class Proxy:
    """A running proxy: its faults, the requests it has received, and how to reach it."""

    def __init__(self, env: Mapping[str, str], seed: int) -> None:
        target = urlsplit(env["AWS_ENDPOINT_URL"])
        self.target = (str(target.hostname), target.port or 80)
        self.faults: list[Fault] = []
        self.latency_s = 0.0
        self.gates: Iterator[threading.Barrier] = iter(())  # one for each of the next GET requests, which waits there
        self.requests: list[Request] = []
        self.closing = threading.Event()
        self._random, self._lock = random.Random(seed), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads, self._server.block_on_close = True, False
        self._server.request_queue_size = 128
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.env = {**env, "AWS_ENDPOINT_URL": self.url}

    def counts(self) -> Counter[str]:
        """Requests by method."""
        return Counter(request.method for request in self.requests)

    def meet(self, method: str, path: str, headers: dict[str, str]) -> tuple[Fault | None, float]:
        """The fault for a request, and a random number for it."""
        with self._lock:
            chance = self._random.random()
            fault = next((one for one in self.faults if one.fits(method, path, headers)), None)
            if fault is not None and self._random.random() >= fault.share:
                fault = None
            if fault is not None and fault.times is not None:
                fault.times -= 1
            self.requests.append(Request(method, path, dict(headers), time.monotonic(), fault.kind if fault else ""))
            return fault, chance


@contextlib.contextmanager
def proxy(env: Mapping[str, str], seed: int = 0) -> Iterator[Proxy]:
    """A proxy in front of the server of `env`, for the duration of a test."""
    made = Proxy(env, seed)
    thread = threading.Thread(target=made._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        made.closing.set()
        made._server.shutdown()
        made._server.server_close()


def _handler(owner: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and small bodies in one packet
        disable_nagle_algorithm = True

        def setup(self) -> None:
            super().setup()
            self.upstream = http.client.HTTPConnection(*owner.target, timeout=120)

        def finish(self) -> None:
            self.upstream.close()
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def log_message(self, *args: object) -> None:
            pass

        def handle_expect_100(self) -> bool:
            super().handle_expect_100()
            self.wfile.flush()
            return True

        def do(self) -> None:
            try:
                self._serve()
            except (OSError, http.client.HTTPException):
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do

        def _serve(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            sent = self.rfile.read(int(headers.get("content-length", 0)))
            fault, chance = owner.meet(self.command, self.path, headers)
            time.sleep(owner.latency_s)
            if self.command == "GET" and (gate := next(owner.gates, None)) is not None:
                gate.wait()
            kind = fault.kind if fault else ""
            if fault and kind == "status":
                return self._error(fault)
            if fault and kind in ("reset", "silent") and fault.at < 0:
                return self._end(kind)
            if fault and kind == "strip":
                headers.pop(fault.header, None)
            status, reply_headers, body = self._pass_on(headers, sent)
            if kind == "drop_reply":
                return self._end("cut")
            if fault and status < 300:
                reply_headers |= fault.headers
            if fault and kind == "flip" and body:
                at = fault.at if fault.at >= 0 else int(chance * len(body))
                body = body[:at] + bytes([body[at] ^ 0x10]) + body[at + 1 :]
            self.send_response_only(status)
            for name, value in reply_headers.items():
                self.send_header(name, value)
            self.end_headers()
            if fault and kind in ("cut", "reset", "silent") and fault.at < len(body):
                self.wfile.write(body[: fault.at])
                self.wfile.flush()
                return self._end(kind)
            if fault and kind == "trickle":
                return self._trickle(body, fault.rate)
            for at in range(0, len(body), PIECE_BYTES):
                self.wfile.write(body[at : at + PIECE_BYTES])
            self.wfile.flush()
            return None

        def _pass_on(self, headers: dict[str, str], sent: bytes) -> tuple[int, dict[str, str], bytes]:
            self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                if name != "expect":
                    self.upstream.putheader(name, value)
            self.upstream.endheaders(sent)
            reply = self.upstream.getresponse()
            body = reply.read()
            kept = {name.lower(): value for name, value in reply.getheaders()}
            if kept.pop("transfer-encoding", None) or self.command != "HEAD":
                kept["content-length"] = str(len(body))
            return reply.status, kept, body

        def _error(self, fault: Fault) -> None:
            body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>made by a test</Message></Error>"
            content = b"" if self.command == "HEAD" else body.encode()
            self.send_response_only(fault.status)
            for name, value in {"Content-Length": str(len(content)), **fault.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def _trickle(self, body: bytes, rate: float) -> None:
            step = max(1, int(rate / 20))
            for at in range(0, len(body), step):
                self.wfile.write(body[at : at + step])
                self.wfile.flush()
                if owner.closing.wait(step / rate):
                    return

        def _end(self, kind: str) -> None:
            self.close_connection = True
            if kind == "silent":
                owner.closing.wait()
            elif kind == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()

    return Handler
