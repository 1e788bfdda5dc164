"""Download a file of weights into torch's cache: completely and with the right SHA-256, or not at all.

The bytes go to NAME.partial, which one process at a time has locked. A record follows them: a hash of the URL, and the
server's ETag or date. Each piece overwrites the record and brings it again. So a cut at any moment, even by SIGKILL,
leaves one file that says how to go on. Only a file with the right hash gets its final name.

Whatever a server sends is untrusted: lengths, redirects, a login page instead of the file, silence.
Source: RFC 9110, sections 13.1.5 (If-Range) and 14 (ranges).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urljoin

import torch
import urllib3
from urllib3.exceptions import HTTPError, ProxyError, SSLError

from p3d.weights.published import Wanted, checked, shown
from p3d.weights.record import WeightsError, sha256_of

RECORD_BYTES: Final = 512
_MARK: Final = b"p3d partial "
_PIECE_BYTES: Final = 1 << 20
_REDIRECTS: Final = 5
_OTHERWISE: Final = "or download the file in another way and run `p3d weights import FILE`"

Progress = Callable[[int, int | None], None]


class DownloadError(WeightsError):
    """A download that stopped for now. The same call continues it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait (seconds), how slow a server may be (bytes/s over `rate_s`), how large a file (bytes)."""

    connect_s: float = 15.0
    answer_s: float = 60.0  # for everything up to the headers: names, proxies, certificates
    read_s: float = 30.0  # without a single byte
    rate_s: float = 60.0
    least_bytes_per_s: float = 10_000.0
    largest_bytes: int = 1 << 30
    lock_s: float = 3600.0  # while another process downloads the same file


LIMITS: Final = Limits()


def fetch(
    wanted: Wanted,
    *,
    folder: Path | None = None,
    limits: Limits = LIMITS,
    progress: Progress = lambda received, total: None,
) -> Path:
    """The path of the file in `folder` (default: torch's cache), downloaded unless it is there already.

    `progress` gets the bytes that are there and their total, or None if the server does not say. Raises DownloadError
    where the same call may succeed later, and continues then; WeightsError for everything else.
    """
    folder = folder or Path(torch.hub.get_dir(), "checkpoints")
    path = folder / wanted.file
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with _alone(path.with_name(f"{path.name}.partial"), limits.lock_s) as part:
                if not path.exists():  # another process had the lock
                    _download(wanted, part, limits, progress)
                    part.path.replace(path)
                    return path
        if not sha256_of(path).startswith(wanted.sha256):
            raise WeightsError(f"{path} has another sha256 than {wanted.sha256}; remove it and run the command again")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"{folder}: the disk is full; free some space and run the command again") from error
        raise WeightsError(f"{folder} cannot be used ({error}); set TORCH_HOME to another folder") from error
    return path


class _Partial:
    """The locked file NAME.partial: `size` bytes of content, and the record behind them."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self.descriptor = path, descriptor
        self.size, self.source, self.validator = 0, "", ""
        size = os.fstat(descriptor).st_size - RECORD_BYTES
        record = os.pread(descriptor, RECORD_BYTES, size) if size > 0 else b""
        if record.startswith(_MARK):
            with contextlib.suppress(ValueError, TypeError):  # anybody may have put the file there
                source, validator = json.loads(record.removeprefix(_MARK))
                if f"{source}{validator}".isascii() and f"{source}{validator}".isprintable():
                    self.size, self.source, self.validator = size, str(source), str(validator)

    def restart(self, source: str = "", validator: str = "") -> None:
        os.ftruncate(self.descriptor, 0)
        self.size, self.source, self.validator = 0, source, validator

    def append(self, piece: bytes) -> None:
        """Write a piece and the record. If that fails, the record returns to its place before the piece."""
        record = _MARK + json.dumps([self.source, self.validator]).encode().ljust(RECORD_BYTES - len(_MARK))
        try:
            _write(self.descriptor, piece + record, self.size)
        except OSError:
            if self.size:
                _write(self.descriptor, record, self.size)
                os.ftruncate(self.descriptor, self.size + RECORD_BYTES)
            raise
        self.size += len(piece)


def _write(descriptor: int, content: bytes, at: int) -> None:
    while content:
        written = os.pwrite(descriptor, content, at)
        content, at = content[written:], at + written


@contextlib.contextmanager
def _alone(path: Path, patience_s: float) -> Iterator[_Partial]:
    """Open and lock the partial file. If nothing is in it in the end, it is removed."""
    try:
        import fcntl
    except ImportError:
        raise WeightsError(f"Windows cannot lock files as this needs; {_OTHERWISE.removeprefix('or ')}") from None
    until = time.monotonic() + patience_s
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(path, descriptor):  # the process that had the lock has renamed or removed it
                continue
            part = _Partial(path, descriptor)
            try:
                yield part
            finally:
                if not part.size and _is_at(path, descriptor):
                    path.unlink()
            return
        except BlockingIOError:
            if time.monotonic() > until:
                raise DownloadError(f"another process downloads {path}; run the command again when it ends") from None
            time.sleep(0.1)
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    return False


def _download(wanted: Wanted, part: _Partial, limits: Limits, progress: Progress) -> None:
    """Complete the partial file. Raises DownloadError, WeightsError and OSError."""
    name = shown(wanted.url)
    with contextlib.closing(_answer(wanted.url, part, limits)) as answer:
        total = None if answer.length_remaining is None else part.size + answer.length_remaining
        since, before = time.monotonic(), part.size
        why, piece = "", b""
        try:
            while max(part.size, total or 0) <= limits.largest_bytes and not why:
                progress(part.size, total)
                if not (piece := answer.read1(_PIECE_BYTES, decode_content=False)):
                    break
                part.append(piece)
                if (now := time.monotonic()) > since + limits.rate_s:
                    if part.size - before < limits.least_bytes_per_s * (now - since):
                        why = f"less than {limits.least_bytes_per_s / 1000:g} kB/s arrived"
                    since, before = now, part.size
        except HTTPError as error:
            why = _reason(error)
    if max(part.size, total or 0) > limits.largest_bytes:
        part.restart()
        raise WeightsError(f"{name} has more than {limits.largest_bytes} bytes, and no file of weights has")
    if why or part.size < (total or 0):
        received = f"{part.size / 1e6:.1f} MB" if total is None else f"{part.size / 1e6:.1f} of {total / 1e6:.1f} MB"
        raise DownloadError(
            f"{name}: the download stopped after {received} ({why or 'the connection was closed'}); "
            + (f"{part.path} has them, and " if part.size else "")
            + "the same command continues"
        )
    os.ftruncate(part.descriptor, part.size)
    if not sha256_of(part.path).startswith(wanted.sha256):
        part.restart()
        raise WeightsError(
            f"{name} has another sha256 than {wanted.sha256}, and nothing of it was kept; check the URL and the hash, "
            "or try another network or a mirror (--url)"
        )
    os.fsync(part.descriptor)


def _answer(url: str, part: _Partial, limits: Limits) -> urllib3.BaseHTTPResponse:
    """An answer whose body continues the partial file, which is emptied where the body is the whole file."""
    source = hashlib.sha256(shown(url).encode()).hexdigest()
    headers = {"User-Agent": "p3d", "Accept-Encoding": "identity"}
    if part.size and part.validator and part.source == source:
        ranges = {"Range": f"bytes={part.size}-", "If-Range": part.validator}
        answer = _request(url, headers | ranges, limits)
        if answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {part.size}-"):
            return answer
        if answer.status in (206, 416):
            answer.close()
            answer = _request(url, headers, limits)
    else:
        answer = _request(url, headers, limits)
    status = answer.status
    if status != 200:
        answer.close()
        phrase = HTTPStatus(status).phrase if status in list(HTTPStatus) else ""
        said = f"{shown(url)}: the answer was {status} {phrase}".rstrip()
        if status in (408, 425, 429) or status >= 500:
            raise DownloadError(f"{said}; run the same command again later, {_OTHERWISE}")
        what = "the login for the proxy in HTTPS_PROXY" if status == 407 else "the URL, try a mirror (--url)"
        raise WeightsError(f"{said}; check {what}, {_OTHERWISE}")
    if answer.headers.get("Content-Type", "").startswith("text/html"):
        answer.close()
        raise WeightsError(
            f"{shown(url)}: a web page came instead of the file; if this network asks for a login, log in first; check "
            f"the URL, {_OTHERWISE}"
        )
    etag, date = answer.headers.get("ETag", ""), answer.headers.get("Last-Modified", "")
    strong = re.fullmatch(r'"[!#-~]{1,200}"', etag)
    part.restart(source, etag if strong else date if re.fullmatch(r"[A-Za-z0-9:, ]{1,40}", date) else "")
    return answer


def _request(url: str, headers: dict[str, str], limits: Limits) -> urllib3.BaseHTTPResponse:
    """GET with redirects, none of which may leave https. Raises DownloadError and WeightsError."""
    here = url
    for _ in range(_REDIRECTS + 1):
        try:
            answer = _within(limits, here, headers)
        except (HTTPError, TimeoutError) as error:
            advice = "if this machine needs a proxy, set HTTPS_PROXY; run the command again later"
            if isinstance(error, ProxyError):
                advice = "check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY"
            elif isinstance(error, SSLError):
                advice = "if a proxy replaces certificates, set SSL_CERT_FILE to a file with its own"
            said = f"{shown(here)} cannot be reached ({_reason(error)})"
            raise DownloadError(f"{said}; {advice}, {_OTHERWISE}") from error
        location = answer.get_redirect_location()
        if not location:
            return answer
        answer.close()
        try:
            there = urljoin(here, location)
            scheme = checked(there).scheme
        except ValueError:
            raise WeightsError(f"{shown(here)} leads to what is not a plain http(s) URL; give another URL") from None
        if scheme == "http" and checked(here).scheme == "https":
            raise WeightsError(f"{shown(here)} leads from https to {shown(there)}, which is not safe; give another URL")
        here = there
    raise WeightsError(f"{shown(url)} leads to other addresses more than {_REDIRECTS} times; give another URL")


def _within(limits: Limits, url: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
    """One GET, or TimeoutError after `answer_s`: no library limits the time for names, or for headers byte by byte."""
    manager, result = _manager(url), Future[urllib3.BaseHTTPResponse]()

    def run() -> None:
        patience = urllib3.Timeout(connect=limits.connect_s, read=limits.read_s)
        try:
            answer = manager.request(
                "GET", url, headers=headers, timeout=patience, retries=False, redirect=False, preload_content=False
            )
            result.set_result(answer)
        except BaseException as error:  # noqa: BLE001 - raised by the caller
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(limits.answer_s)


def _manager(url: str) -> urllib3.PoolManager:
    """Connections as HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY say. Raises WeightsError for a proxy of SOCKS."""
    parts, proxies = checked(url), urllib.request.getproxies()
    proxy = proxies.get(parts.scheme or "") or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(parts.netloc or ""):
        return urllib3.PoolManager()
    try:
        there = urllib3.util.parse_url(proxy if "://" in proxy else f"http://{proxy}")
        login = urllib3.make_headers(proxy_basic_auth=unquote(there.auth)) if there.auth else None
        return urllib3.ProxyManager(there._replace(auth=None).url, proxy_headers=login)
    except HTTPError:
        raise WeightsError("HTTPS_PROXY or HTTP_PROXY is not an http proxy, such as http://proxy:3128") from None


def _reason(error: BaseException) -> str:
    """The system's words for what is behind an error, whose own text may hold a whole URL."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    if isinstance(error, OSError):
        return (error.strerror or str(error) or "no answer in time")[:120]
    return "the answer was cut, or is not HTTP"
