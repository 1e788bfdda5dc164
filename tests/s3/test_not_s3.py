"""What answers is not an S3 server, but the login page of a network or a redirect. Each call ends in an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from p3d.pipeline.errors import StoreDenied, StoreError
from p3d.pipeline.storage.s3.store import S3Store
from p3d.pipeline.storage.store import StoreOptions

PAGE = b"<html><body>Please log in</body></html>"
ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code></Error>"
ENTRY = b"<ListBucketResult><IsTruncated>false</IsTruncated><Contents><Key>a</Key></Contents></ListBucketResult>"


@pytest.fixture(params=[(200, PAGE), (200, ERROR), (200, b""), (200, ENTRY), (302, b""), (307, b"")])
def elsewhere(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, short: None) -> Iterator[S3Store]:
    """A store behind a server that gives the same reply to every request."""
    status, body = request.param

    class Same(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            if status > 300:
                self.send_header("Location", "http://127.0.0.1:9/login")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "y")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Same) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield S3Store("s3://bucket/out", StoreOptions(endpoint_url=f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()


def test_what_is_not_an_s3_server_is_an_error(elsewhere: S3Store) -> None:
    """An object is neither there nor absent, and no listing is empty; a redirect is not followed without end."""
    with pytest.raises(StoreError) as caught:
        elsewhere.head("job.json")
    assert isinstance(caught.value, StoreDenied) or "is this an S3 server" in str(caught.value)
    with pytest.raises(StoreError):
        list(elsewhere.list())
