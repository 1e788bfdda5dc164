"""The server of the page: access checks, limits on requests, start and end.

It listens on loopback only. Every URL begins with a random token, so neither another user of the machine nor a web page
open in the same browser can make requests. A `Host` that is not loopback (DNS rebinding) and a POST from another page
are refused, and no CORS header is ever sent. Every response has a Content Security Policy without inline scripts or
styles, so any file name is shown as text only.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import re
import secrets
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.log import server_logger
from aiohttp.typedefs import Middleware

from p3d.pipeline.errors import InputError
from p3d.pipeline.results.page.answers import Answers
from p3d.pipeline.results.page.archive import Archive
from p3d.pipeline.results.page.connections import Connections
from p3d.pipeline.results.page.opening import Opening
from p3d.pipeline.results.page.similar import Embed
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.store import StoreOptions

LOOPBACK = "127.0.0.1"
HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?")  # any port: one forwarded by ssh has another
MOST_REQUESTS = 64  # at once; a browser opens six connections
SHUTDOWN_S = 0.3  # for responses in progress when the server ends; aiohttp waits at most twice as long
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """No traceback for bytes that are not HTTP: any client can send them, without a token, and fill the terminal."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


server_logger.addFilter(_is_worth_a_line)


@dataclass(slots=True)
class Guard:
    """The checks before every request."""

    token: str
    connections: Connections | None = None
    _in_flight: int = field(default=0)

    async def check(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """The response, or a refusal that reveals nothing about the dataset."""
        if not HOST.fullmatch(request.headers.get("Host", "")):
            raise web.HTTPForbidden(text="this page answers on loopback only\n")
        if not hmac.compare_digest(request.path[1:].partition("/")[0].encode(), self.token.encode()):
            raise web.HTTPNotFound(text="not found: the address has a token, which `p3d results serve` printed\n")
        if request.method == "POST" and request.headers.get("Origin") != f"http://{request.headers['Host']}":
            raise web.HTTPForbidden(text="only the page itself may send files\n")
        if self._in_flight >= MOST_REQUESTS:
            raise web.HTTPServiceUnavailable(text="too many requests at once\n", headers={"Retry-After": "1"})
        self._in_flight += 1
        try:
            return await handler(request)
        finally:
            self._in_flight -= 1


@contextlib.asynccontextmanager
async def running(
    opened: Archive | Opening,
    *,
    embed: Embed | None,
    options: StoreOptions,
    port: int,
    dropped_bytes: int,
    rule: SourceRule = EVERY_SOURCE,
) -> AsyncIterator[str]:
    """A context with a running server. Yields its URL, token included. InputError if the port is in use.

    A source video that `rule` does not allow is neither played nor shown.
    """
    guard = Guard(secrets.token_urlsafe(24))
    with tempfile.TemporaryDirectory(prefix="p3d-page-", ignore_cleanup_errors=True) as scratch:
        opening = Opening.of(opened) if isinstance(opened, Archive) else opened
        answers = Answers(opening, Path(scratch), options, embed, dropped_bytes, rule)
        app = web.Application(middlewares=[_before_all(guard)])
        app.on_response_prepare.append(_secured)
        app.add_routes(answers.routes(f"/{guard.token}"))
        app.add_routes([web.get(f"/{guard.token}/{name}", _file(name)) for name in _static()])
        app.add_routes([web.get(f"/{guard.token}/", _file("index.html"))])
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        assert runner.server is not None, "setup makes it"
        guard.connections = Connections(runner.server)
        with contextlib.closing(_listening(port)) as listening:
            accepting = asyncio.create_task(guard.connections.accept(listening))
            try:
                yield f"http://{LOOPBACK}:{listening.getsockname()[1]}/{guard.token}/"
            finally:
                accepting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await accepting
                await runner.cleanup()
                answers.close()


async def serve_until_stopped(
    opening: Opening,
    *,
    embed: Embed | None,
    options: StoreOptions,
    port: int,
    dropped_bytes: int,
    rule: SourceRule,
    on_ready: Callable[[str], None],
) -> None:
    """Read and serve until SIGINT, SIGTERM or an error of the reading, which is raised; a second one ends at once."""
    stopped, loop = asyncio.Event(), asyncio.get_running_loop()

    def stop() -> None:
        stopped.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)

    def failed() -> None:
        with contextlib.suppress(RuntimeError):  # the page has ended, and its loop is closed
            loop.call_soon_threadsafe(stopped.set)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    async with running(opening, embed=embed, options=options, port=port, dropped_bytes=dropped_bytes, rule=rule) as url:
        opening.on_error = failed
        opening.start()
        on_ready(url)
        await stopped.wait()
    if opening.error is not None:
        raise opening.error


def _listening(port: int) -> socket.socket:
    try:
        return socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise InputError(f"--port {port}: {error.strerror}; choose another, or none for any that is free") from None


def _static() -> list[str]:
    """The names of the static files of the page."""
    folder = resources.files("p3d.pipeline.results.page") / "static"
    return sorted(one.name for one in folder.iterdir() if Path(one.name).suffix in TYPES)


def _file(name: str) -> Handler:
    content = (resources.files("p3d.pipeline.results.page") / "static" / name).read_bytes()

    async def send(_: web.Request) -> web.StreamResponse:
        headers = {"Cache-Control": "no-cache"}
        return web.Response(body=content, content_type=TYPES[Path(name).suffix], charset="utf-8", headers=headers)

    return send


def _before_all(guard: Guard) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        assert guard.connections is not None, "requests come by way of it"
        with guard.connections.at_work(request):
            return await guard.check(request, handler)

    return check


async def _secured(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
