"""`p3d weights fetch` against a local server: the file is complete and right, or one message says why it is not."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import ipaddress
import json
import os
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import p3d.weights
from p3d.weights import WeightsError, fetch, published
from p3d.weights.fetch import RECORD_BYTES, DownloadError, Limits
from p3d.weights.published import PUBLISHED, Wanted, wanted
from tests.conftest import p3d as run_p3d
from tests.jobs.test_cli import in_process
from tests.p3d.test_resnet import ResNet

CONTENT = bytes(range(256)) * 4000
QUICK = Limits(connect_s=5, answer_s=5, read_s=5, rate_s=5, lock_s=30)


class Server(ThreadingHTTPServer):
    """Serves `content` at every path; the attributes make it misbehave. `asked` has the headers of each request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.headers = CONTENT, {"ETag": '"one"'}
        self.ranges, self.status, self.cut_at = True, 200, len(CONTENT)
        self.asked: list[dict[str, str]] = []
        self.hook: Callable[[Handler], bool] = lambda handler: False  # True: it has answered
        self.over = threading.Event()

    def url(self, path: str = "/a.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def wanted(self, path: str = "/a.pth") -> Wanted:
        return wanted(url=self.url(path), sha256=hashlib.sha256(self.content).hexdigest())


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        server = self.server
        server.asked.append({"path": self.path, **self.headers})
        with contextlib.suppress(OSError):
            if server.hook(self):
                return
            if server.status != 200:
                self.answer(server.status, {"Content-Type": "text/html"}, b"<html>sorry</html>")
                return
            start, validators = 0, (server.headers.get("ETag"), server.headers.get("Last-Modified"))
            if server.ranges and "Range" in self.headers and self.headers.get("If-Range") in validators:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            span = {"Content-Range": f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"} if start else {}
            body = server.content[start : server.cut_at]
            self.answer(206 if start else 200, span | server.headers, body, len(server.content) - start)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own proxy is not used."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@contextlib.contextmanager
def serving(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server()) as started:
        yield started


def names(folder: Path) -> list[str]:
    return sorted(one.name for one in folder.iterdir())


def get(server: Server, folder: Path, limits: Limits = QUICK, path: str = "/a.pth") -> Path:
    return fetch.fetch(server.wanted(path), folder=folder, limits=limits)


def cut(server: Server, folder: Path, at: int = 300_000) -> Path:
    """The partial file of a download that the server has cut."""
    server.cut_at = at
    with pytest.raises(DownloadError, match=r"stopped after .* of 1\.0 MB .*the same command continues") as error:
        get(server, folder)
    server.cut_at = len(CONTENT)
    (left,) = folder.iterdir()
    assert str(left) in str(error.value) and left.name.endswith(".partial")
    server.asked.clear()
    return left


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    """The file has the digits of its hash in its name; progress ends at its size; a second call needs no server."""
    seen: list[tuple[int, int | None]] = []
    path = fetch.fetch(server.wanted(), folder=tmp_path, progress=lambda *now: seen.append(now))
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == [f"a-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"]
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert get(server, tmp_path) == path and len(server.asked) == 1


@pytest.mark.parametrize("headers", [{"ETag": '"one"'}, {"Last-Modified": "Sat, 28 Nov 2026 21:00:00 GMT"}])
def test_a_cut_download_continues(server: Server, tmp_path: Path, headers: dict[str, str]) -> None:
    """Three cuts leave one partial file each; every next call asks for the rest of the same version only."""
    server.headers, validator = headers, next(iter(headers.values()))
    for at in (1, 300_000, len(CONTENT) - 1):
        left = cut(server, tmp_path, at)
        assert left.stat().st_size == at + RECORD_BYTES
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [(one["Range"], one["If-Range"]) for one in server.asked] == [(f"bytes={len(CONTENT) - 1}-", validator)]
    assert len(names(tmp_path)) == 1


def _no_ranges(server: Server) -> None:
    server.ranges = False


def _no_validator(server: Server) -> None:
    server.headers = {"ETag": 'W/"weak"'}


def _changed(server: Server) -> None:
    server.headers, server.content = {"ETag": '"two"'}, CONTENT[::-1]


def _unsatisfiable(server: Server) -> None:
    server.hook = lambda handler: "Range" in handler.headers and not handler.answer(416, {})


def _another_range(server: Server) -> None:
    span = {"Content-Range": f"bytes 5-{len(CONTENT) - 1}/{len(CONTENT)}"}
    server.hook = lambda handler: "Range" in handler.headers and not handler.answer(206, span, CONTENT[5:])


@pytest.mark.parametrize("happens", [_no_ranges, _no_validator, _changed, _unsatisfiable, _another_range])
def test_a_download_starts_again_where_the_rest_does_not_fit(
    server: Server, tmp_path: Path, happens: Callable[[Server], None]
) -> None:
    """Without ranges, without a strong validator, after a change, after 416 and after a wrong range."""
    if happens is _no_validator:
        happens(server)
    left = cut(server, tmp_path)
    happens(server)
    asked = replace(server.wanted(), file=left.name.removesuffix(".partial"))
    assert fetch.fetch(asked, folder=tmp_path, limits=QUICK).read_bytes() == server.content
    assert len(names(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["torn", "garbage", "empty", "forged", "other"])
def test_a_partial_file_without_a_valid_record_is_not_continued(server: Server, tmp_path: Path, damage: str) -> None:
    """Torn, foreign, empty and forged ones, and that of another URL, are replaced from the first byte."""
    left = cut(server, tmp_path)
    path = "/mirror/a.pth" if damage == "other" else "/a.pth"
    if damage == "torn":
        os.truncate(left, left.stat().st_size - 100)
    elif damage == "forged":
        record = left.read_bytes()[-RECORD_BYTES:].rstrip().replace(b'\\"one\\"', b"a\\r\\nb").ljust(RECORD_BYTES)
        assert record.startswith(b"p3d partial [") and b"a\\r" in record
        left.write_bytes(CONTENT[:5000] + record)
    elif damage != "other":
        left.write_bytes(b"" if damage == "empty" else b"x" * 3000)
    assert get(server, tmp_path, path=path).read_bytes() == CONTENT
    assert ["Range" in one for one in server.asked] == [False]


def test_wrong_bytes_are_not_kept(server: Server, tmp_path: Path) -> None:
    """Another content than the hash says leaves nothing, in one download and in one that was continued."""
    right = server.wanted()
    server.content = CONTENT[::-1]
    with pytest.raises(WeightsError, match=r"another sha256 than .* nothing of it was kept") as error:
        fetch.fetch(right, folder=tmp_path)
    assert not isinstance(error.value, DownloadError) and names(tmp_path) == []
    server.content = CONTENT
    cut(server, tmp_path)
    server.content = CONTENT[::-1]
    with pytest.raises(WeightsError, match="another sha256"):
        fetch.fetch(right, folder=tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_file_in_the_cache_is_named(server: Server, tmp_path: Path) -> None:
    """It is not used, not changed, and nothing is downloaded."""
    path = get(server, tmp_path)
    path.write_bytes(b"other")
    with pytest.raises(WeightsError, match=re.escape(f"{path} has another sha256")):
        get(server, tmp_path)
    assert path.read_bytes() == b"other" and len(server.asked) == 1


@pytest.mark.parametrize(("status", "later"), [(404, False), (403, False), (407, False), (429, True), (503, True)])
def test_an_error_of_the_server_keeps_what_has_arrived(
    server: Server, tmp_path: Path, status: int, later: bool
) -> None:
    """The message has the status; nothing new is left, and a partial file of before is kept."""
    server.status = status
    with pytest.raises(WeightsError, match=f"the answer was {status} .*`p3d weights import FILE`") as error:
        get(server, tmp_path)
    assert isinstance(error.value, DownloadError) is later and names(tmp_path) == []
    server.status = 200
    left = cut(server, tmp_path)
    before, server.status = left.read_bytes(), status
    with pytest.raises(WeightsError, match=str(status)):
        get(server, tmp_path)
    assert left.read_bytes() == before


def test_a_web_page_is_not_a_file(server: Server, tmp_path: Path) -> None:
    """The page of a login that comes with status 200 is recognised and not kept."""
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(WeightsError, match="a web page came instead"):
        get(server, tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("stated", [True, False])
def test_a_file_that_is_too_large_is_refused(server: Server, tmp_path: Path, stated: bool) -> None:
    """With a stated length before anything is read, without one as soon as the limit is passed."""
    server.hook = lambda handler: not stated and not endless(handler)
    with pytest.raises(WeightsError, match="more than 500000 bytes"):
        get(server, tmp_path, replace(QUICK, largest_bytes=500_000))
    assert names(tmp_path) == []


def endless(handler: Handler) -> None:
    """A body without a length that does not end."""
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.over.is_set():
        handler.wfile.write(CONTENT[:65536])


def drip(handler: Handler, headers: bool) -> bool:
    """A byte every 10 ms: of headers that never end, or of the body."""
    start = b"HTTP/1.1 200 OK\r\nX: " if headers else b"HTTP/1.1 200 OK\r\nContent-Length: 1024000\r\n\r\n"
    handler.wfile.write(start)
    while not handler.server.over.wait(0.01):
        handler.wfile.write(b"x")
    return True


def silence(handler: Handler) -> bool:
    """Half of the file, and then nothing, with an open connection."""
    handler.answer(200, handler.server.headers, CONTENT[: len(CONTENT) // 2], len(CONTENT))
    return handler.server.over.wait(60)


@pytest.mark.parametrize(
    ("hook", "says"),
    [
        (lambda handler: drip(handler, headers=True), "cannot be reached .no answer in time"),
        (lambda handler: drip(handler, headers=False), "stopped after 0.0 of 1.0 MB .less than 10 kB/s"),
        (silence, "stopped after 0.5 of 1.0 MB .timed out"),
    ],
    ids=["headers", "body", "silence"],
)
def test_a_slow_server_has_a_limit(server: Server, tmp_path: Path, hook: Callable[[Handler], bool], says: str) -> None:
    """Slow headers, a slow body and silence each end with a message, within the time of the limits."""
    server.hook = hook
    begin = time.monotonic()
    with pytest.raises(DownloadError, match=says):
        get(server, tmp_path, replace(QUICK, answer_s=0.3, read_s=0.3, rate_s=0.2))
    assert time.monotonic() - begin < 5
    server.hook = lambda handler: False
    assert get(server, tmp_path).read_bytes() == CONTENT


def redirect(to: str, hops: int = 1) -> Callable[[Handler], bool]:
    """The first requests are sent elsewhere."""
    return lambda handler: len(handler.server.asked) <= hops and not handler.answer(302, {"Location": to})


def test_redirects_are_followed_and_limited(server: Server, tmp_path: Path) -> None:
    """Five may follow, six may not; a cut download continues through one."""
    server.hook = redirect("/b", hops=6)
    with pytest.raises(WeightsError, match="more than 5 times"):
        get(server, tmp_path)
    server.asked.clear()
    server.hook = redirect("/b", hops=5)
    cut(server, tmp_path)
    server.hook = redirect("/b?signature=secret")
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert [one["Range"] for one in server.asked] == ["bytes=300000-"] * 2


@pytest.mark.parametrize(
    "to", ["file:///etc/passwd", "ftp://127.0.0.1/a.pth", "http://u:p@127.0.0.1/a.pth", "http://["]
)
def test_a_redirect_leads_to_http_without_a_login(server: Server, tmp_path: Path, to: str) -> None:
    """Another scheme, a login and nonsense are refused, and a password is not repeated."""
    server.hook = redirect(to)
    with pytest.raises(WeightsError, match="leads to what is not") as error:
        get(server, tmp_path)
    assert "u:p" not in str(error.value) and names(tmp_path) == []


@pytest.fixture
def secure(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server with a certificate of its own, which SSL_CERT_FILE trusts."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = tmp_path_factory.mktemp("tls") / "both.pem"
    plain = serialization.NoEncryption()
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    pem.write_bytes(certificate.public_bytes(serialization.Encoding.PEM) + private)
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    made = Server()
    made.socket = context.wrap_socket(made.socket, server_side=True)
    with serving(made) as started:
        yield started


def test_a_name_is_fetched_over_https(secure: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published digits suffice, torch's name stays, http in a redirect is refused, an unknown certificate too."""
    digits = hashlib.sha256(CONTENT).hexdigest()[:8]
    known = replace(PUBLISHED["resnet50-v1"], file=f"resnet50-{digits}.pth")
    monkeypatch.setitem(published.PUBLISHED, "resnet50-v1", known)
    monkeypatch.setattr(published, "FOLDER", f"https://127.0.0.1:{secure.server_port}/models")
    asked = wanted("resnet50-v1")
    secure.hook = redirect(secure.url())
    with pytest.raises(WeightsError, match="leads from https to http"):
        fetch.fetch(asked, folder=tmp_path, limits=QUICK)
    assert fetch.fetch(asked, folder=tmp_path, limits=QUICK).name == f"resnet50-{digits}.pth"
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(DownloadError, match=r"certificate verify failed.*SSL_CERT_FILE"):
        fetch.fetch(asked, folder=tmp_path / "other", limits=QUICK)


def test_proxies_come_from_the_environment(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request goes to the proxy with its login; NO_PROXY goes around; a dead proxy is a message without the login."""
    login = f"http://me:secret@127.0.0.1:{server.server_port}"
    monkeypatch.setenv("http_proxy", login)
    asked = replace(server.wanted(), url="http://weights.invalid/a.pth")
    assert fetch.fetch(asked, folder=tmp_path / "a", limits=QUICK).read_bytes() == CONTENT
    assert server.asked[0]["path"] == "http://weights.invalid/a.pth"
    assert server.asked[0]["proxy-authorization"].startswith("Basic ")
    monkeypatch.setenv("http_proxy", "http://me:secret@127.0.0.1:1")
    with pytest.raises(DownloadError, match=r"Connection refused.*HTTP_PROXY.*NO_PROXY") as error:
        get(server, tmp_path / "b")
    assert "secret" not in str(error.value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert get(server, tmp_path / "b").read_bytes() == CONTENT
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(WeightsError, match="not an http proxy"):
        fetch.fetch(asked, folder=tmp_path / "c")


def test_a_full_disk_loses_nothing(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written before stays usable, and the next call continues behind it."""
    left, write = cut(server, tmp_path), os.pwrite

    def full(descriptor: int, content: bytes, at: int) -> int:
        if len(content) > RECORD_BYTES:
            write(descriptor, content[:100], at)
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content, at)

    monkeypatch.setattr(os, "pwrite", full)
    before = left.read_bytes()
    with pytest.raises(DownloadError, match="the disk is full"):
        get(server, tmp_path)
    assert left.read_bytes() == before
    monkeypatch.undo()
    server.asked.clear()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.asked[0]["Range"] == "bytes=300000-"


def test_a_partial_file_that_is_a_link_is_refused(server: Server, tmp_path: Path) -> None:
    """In a folder that others may write to, nothing is written through a link."""
    left, precious = cut(server, tmp_path), tmp_path / "precious"
    precious.write_text("mine")
    left.unlink()
    left.symlink_to(precious)
    with pytest.raises(WeightsError, match="TORCH_HOME"):
        get(server, tmp_path)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize(("first", "ranges"), [("cut", [False, True]), ("404", [False, False])])
def test_several_downloads_of_one_file_take_turns(
    server: Server, tmp_path: Path, first: str, ranges: list[bool]
) -> None:
    """Of four at once one downloads, and the others wait for it. If it fails, the next goes on, for all others."""
    begun, go = threading.Event(), threading.Event()

    def hold(handler: Handler) -> bool:
        begun.set()
        go.wait(30)
        return False

    server.hook = hold
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(get, server, tmp_path) for _ in range(4)]
        assert begun.wait(30)
        with pytest.raises(DownloadError, match="another process"):
            get(server, tmp_path, replace(QUICK, lock_s=0))
        server.cut_at = 300_000 if first == "cut" else server.cut_at
        server.status = 404 if first == "404" else 200

        def recover(handler: Handler) -> bool:
            server.status, server.cut_at = 200, len(CONTENT)
            return False

        server.hook = recover  # from the second request on
        go.set()
        errors = [call.exception() for call in calls]
    assert [type(one) for one in errors if one] == [DownloadError if first == "cut" else WeightsError]
    assert [call.result().read_bytes() for call in calls if not call.exception()] == [CONTENT] * 3
    assert ["Range" in one for one in server.asked] == ranges
    assert len(names(tmp_path)) == 1


def test_a_partial_file_that_goes_away_before_it_is_locked_is_not_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, the process that had the lock may have removed or renamed the file."""
    left, lock = cut(server, tmp_path), fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        left.unlink()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert len(names(tmp_path)) == 1


DIGITS = "ab" * 32


@pytest.mark.parametrize(
    ("asked", "file", "digits"),
    [
        ({"name": "resnet50-v1"}, "resnet50-0676ba61.pth", "0676ba61"),
        ({"name": "resnet152-v2", "url": "https://mirror/x/other"}, "resnet152-f82ba261.pth", "f82ba261"),
        ({"url": "https://h/resnet50-0676ba61.pth"}, "resnet50-0676ba61.pth", "0676ba61"),
        ({"url": "http://h/a.pth", "sha256": DIGITS.upper()}, "a-abababab.pth", DIGITS),
        ({"url": "https://h/a-20260101.pth.tar?k=secret", "sha256": DIGITS}, "a-20260101-abababab.pth.tar", DIGITS),
    ],
)
def test_the_hash_comes_from_the_name_or_the_option(asked: dict[str, str], file: str, digits: str) -> None:
    """A name, a mirror, a URL with a hash, and URLs with --sha256; the origin has no part that may be secret."""
    found = wanted(**asked)
    assert (found.file, found.sha256) == (file, digits)
    assert "secret" not in found.origin and found.origin.startswith("downloaded from http")
    assert ("not on video" in found.origin) is ("name" in asked)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "no weights were named"),
        ({"name": "resnet18-v1"}, "resnet50-v1, resnet50-v2, resnet101-v1"),
        ({"name": "resnet50-v1", "sha256": DIGITS}, "begins with 0676ba61"),
        ({"name": "resnet50-v1", "url": "http://h/a.pth"}, "anybody on the way"),
        ({"url": "https://h/a.pth"}, "needs --sha256 .* has no hash"),
        ({"url": "http://h/resnet50-0676ba61.pth"}, "needs --sha256 .* anybody on the way"),
        ({"url": "https://h/a.pth", "sha256": "abc"}, "64 hex digits"),
        ({"url": "https://h/", "sha256": DIGITS}, "does not end in the name"),
        ({"url": "https://h/a.exe", "sha256": DIGITS}, "does not end in the name"),
        ({"url": "https://h/..%2f..%2f.pth", "sha256": DIGITS}, "does not end in the name"),
        ({"url": "https://me:secret@h/a.pth", "sha256": DIGITS}, "user name or password"),
        ({"url": "file:///a.pth", "sha256": DIGITS}, "http:// or https://"),
        ({"url": "a.pth", "sha256": DIGITS}, "http:// or https://"),
        ({"url": "https://h/a\n.pth", "sha256": DIGITS}, "http:// or https://"),
        ({"url": f"https://h/{'a' * 2000}.pth", "sha256": DIGITS}, "at most 2000"),
    ],
)
def test_what_cannot_be_fetched_is_said_before_any_request(asked: dict[str, str], says: str) -> None:
    """Unknown names, contradicting or missing hashes, and URLs that are not plain http(s) to a file of weights."""
    with pytest.raises(WeightsError, match=says) as error:
        wanted(**asked)
    assert "secret" not in str(error.value)


def test_the_list_has_names_sizes_hashes_and_licences() -> None:
    """Every entry has the P3D it becomes, and its digits are those in its URL."""
    code, shown, _ = in_process("weights", "list")
    *table, licence = shown.splitlines()
    assert code == 0 and [line.split()[0] for line in table[1:]] == list(PUBLISHED) and max(map(len, table)) <= 80
    assert licence == "licence: BSD-3-Clause; ImageNet's terms"
    records = json.loads(in_process("weights", "list", "--json")[1])["weights"]
    for one in records:
        assert one["url"].endswith(f"-{one['sha256']}.pth") and re.fullmatch("[0-9a-f]{8}", one["sha256"])
    assert {one["network"] for one in records} == {"p3d63", "p3d131", "p3d199"}
    assert [one["size_mb"] for one in records] == [102.5, 102.5, 178.8, 178.8, 241.6, 241.7]


def test_a_fetched_file_is_imported_with_its_origin(tmp_path: Path) -> None:
    """The whole command in a process: OUT is what an import makes, and says where it is from and what it is not."""
    checkpoint = tmp_path / "resnet50.pth"
    torch.save(ResNet((3, 4, 6, 3), classes=3).state_dict(), checkpoint)
    with serving(Server()) as server:
        server.content = checkpoint.read_bytes()
        server.cut_at = len(server.content)
        url, digest = server.url("/resnet50.pth?token=secret"), hashlib.sha256(server.content).hexdigest()
        out, options = tmp_path / "w.safetensors", "--graph caffe --stride-on 1x1 --channel-order bgr --range 255"
        env = {**os.environ, "TORCH_HOME": str(tmp_path / "torch")}
        done = run_p3d(
            *("weights", "fetch", "--url", url, "--sha256", digest, "-o", str(out), *options.split(), "--json"), env=env
        )
    assert done.code == 0, done.err
    assert "frames, not motion" in done.err and "secret" not in done.err + done.out
    kept = tmp_path / "torch" / "hub" / "checkpoints" / f"resnet50-{digest[:8]}.pth"
    assert names(kept.parent) == [kept.name]
    plain = tmp_path / "plain.safetensors"
    assert in_process("weights", "import", str(kept), "-o", str(plain), *options.split())[0] == 0
    fetched, imported = p3d.weights.load(out), p3d.weights.load(plain)
    assert fetched.origin == f"{imported.origin}; downloaded from {server.url('/resnet50.pth')}?..."
    assert digest in fetched.origin and "sees frames, not motion" in fetched.origin
    assert p3d.weights.to_bytes(replace(fetched, origin=imported.origin)) == plain.read_bytes()
    assert json.loads(done.out)["origin"] == fetched.origin
    assert fetched.origin in in_process("weights", "show", str(out))[1]


def test_the_command_line_says_one_thing_and_exits_as_documented(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2 where another try does not help, 6 where it may; one line each, and no OUT."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    words = ["weights", "fetch", "--url", server.url(), "--sha256", server.wanted().sha256, "-o"]

    def said(out: str = str(tmp_path / "w.safetensors")) -> tuple[int, str]:
        code, shown, message = in_process(*words, out)
        lines = [line for line in message.splitlines() if line.startswith("error: ")]
        assert shown == "" and len(lines) == 1, message
        return code, lines[0]

    assert said("w.pth")[0] == 2 and server.asked == []
    server.status = 404
    code, message = said()
    assert code == 2 and "404 Not Found" in message
    server.status, server.cut_at = 200, 1000
    code, message = said()
    assert code == 6 and ".partial has them" in message
    server.cut_at = len(CONTENT)
    code, message = said()
    assert code == 2 and "not a whole torch checkpoint" in message  # complete, but no weights
    words[3] = "http://127.0.0.1:1/b.pth"
    code, message = said()
    assert code == 6 and "Connection refused" in message and "p3d weights import FILE" in message
    assert not list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("verb", ["plan", "launch"])
def test_missing_weights_name_both_ways_to_get_some(verb: str, tmp_path: Path) -> None:
    """No --weights: exit code 2, and the message has `p3d weights fetch` and random:SEED."""
    code, _, said = in_process(verb, str(tmp_path), str(tmp_path / "out"))
    assert code == 2 and "p3d weights fetch" in said and "random:SEED" in said
