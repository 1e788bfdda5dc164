"""The connections of the page: how many, and how long one may be without a whole request.

    accept ──> idle ──request──> busy ──answered──> idle ──...──> closed by the browser, by its time, or for a newer one

A client that sends half a request, or nothing, needs no token, so it must cost little. Its time is bounded. If there
are too many connections, the one that has been idle longest is closed, so a browser's new one always gets in.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

from aiohttp import web

MOST = 128  # at once; a browser opens six
HEADER_S = 10.0  # from the start of a connection to the end of the headers of its first request
IDLE_S = 60.0  # the same from the end of a request; a browser opens another connection without telling anybody
PAUSE_S = 0.1  # after a failure to accept, such as one for lack of file descriptors


class Connections:
    """The open connections of a server, the one that has been idle longest first."""

    def __init__(self, server: web.Server) -> None:
        self._server, self._most = server, min(MOST, _descriptors() // 2)
        self._idle: dict[asyncio.Transport, asyncio.TimerHandle] = {}
        self._busy: set[asyncio.Transport] = set()

    async def accept(self, listening: socket.socket) -> None:
        """Accept connections until it is cancelled."""
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError:  # no descriptor is left, or the client has gone
                self._close_oldest()
                await asyncio.sleep(PAUSE_S)
                continue
            while self._n_open() >= self._most and self._close_oldest():
                pass
            if self._n_open() >= self._most:
                client.close()
                continue
            try:
                transport, _ = await loop.connect_accepted_socket(self._server, client)
            except OSError:
                client.close()
                continue
            if transport not in self._busy and transport not in self._idle:
                self._wait(transport, HEADER_S)

    @contextlib.contextmanager
    def at_work(self, request: web.Request) -> Iterator[None]:
        """The connection is busy in this block: it has sent the headers of a request, and is not answered."""
        transport = request.transport
        if transport is None:  # the client has gone
            yield
            return
        if (timer := self._idle.pop(transport, None)) is not None:
            timer.cancel()
        self._busy.add(transport)
        try:
            yield
        finally:
            self._busy.discard(transport)
            self._wait(transport, IDLE_S)

    def _n_open(self) -> int:
        for transport in [one for one in self._idle if one.is_closing()]:
            self._idle.pop(transport).cancel()
        return len(self._idle) + len(self._busy)

    def _wait(self, transport: asyncio.Transport, seconds: float) -> None:
        if not transport.is_closing():
            self._idle[transport] = asyncio.get_running_loop().call_later(seconds, self._expire, transport)

    def _expire(self, transport: asyncio.Transport) -> None:
        self._idle.pop(transport, None)
        if transport.get_write_buffer_size():  # a slow line still receives the answer
            self._wait(transport, IDLE_S)
        else:
            transport.abort()

    def _close_oldest(self) -> bool:
        """Close the connection that has been idle longest; False if all are busy."""
        for transport, timer in self._idle.items():
            timer.cancel()
            del self._idle[transport]
            transport.abort()
            return True
        return False


def _descriptors() -> int:
    """How many files and connections this process may have open."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return 2 * MOST
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 2 * MOST if limit == resource.RLIM_INFINITY else limit
