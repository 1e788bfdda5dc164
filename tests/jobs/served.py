"""A running page of `p3d results serve`, and requests to it that a browser would not send."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit

from p3d.jobs.cli.serve import _embed_of
from p3d.jobs.job import rows_of
from p3d.pipeline.results.page import server
from p3d.pipeline.results.page.archive import Archive, read_archive
from p3d.pipeline.results.page.opening import Opening
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.store import DEFAULTS, Store
from p3d.pipeline.types import VideoRef


@dataclass(frozen=True)
class Reply:
    """An HTTP response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Served:
    """A running page."""

    url: str
    archive: Archive

    def ask(
        self,
        name: str,
        /,
        *,
        method: str = "GET",
        headers: Mapping[str, str | None] | None = None,
        body: bytes | None = None,
        token: str | None = None,
        **params: Any,
    ) -> Reply:
        """Send one request; headers of value None are left out, and `token` replaces the right one."""
        parts = urlsplit(self.url)
        path = (parts.path if token is None else f"/{token}/") + name
        sent = {"Host": parts.netloc, "Origin": f"http://{parts.netloc}" if method == "POST" else None}
        connection = http.client.HTTPConnection(parts.netloc, timeout=60)
        connection.putrequest(method, path + (f"?{urlencode(params, doseq=True)}" if params else ""), skip_host=True)
        for header, value in {**sent, **(headers or {})}.items():
            if value is not None:
                connection.putheader(header, value)
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        reply = connection.getresponse()
        content = reply.read()
        connection.close()
        return Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, content)

    def id_of(self, path: str) -> str:
        rows = self.archive.rows
        return rows["video_id"].to_pylist()[rows["path"].to_pylist().index(path)]

    def ref(self, path: str) -> VideoRef:
        """The VideoRef of a row, as the page makes it."""
        row = self.archive.row(self.id_of(path))
        assert row is not None
        return VideoRef(str(row["video_id"]), path, str(row["uri"]), str(row["version"]), size_bytes=0)


@contextmanager
def serving(
    store: Store,
    *,
    dropped_bytes: int = 10_000_000,
    layout: str = "pca",
    rule: SourceRule = EVERY_SOURCE,
    opening: Opening | None = None,
) -> Iterator[Served]:
    """Serve the page of an output in a thread of this process."""
    source = rows_of(store)
    archive, embed = read_archive(source, layout=layout), _embed_of(source, "auto")
    ready, ends, url = threading.Event(), [], []

    async def run() -> None:
        end = asyncio.Event()
        ends.append((asyncio.get_running_loop(), end))
        async with server.running(
            opening or archive, embed=embed, options=DEFAULTS, port=0, dropped_bytes=dropped_bytes, rule=rule
        ) as at:
            url.append(at)
            ready.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield Served(url[0], archive)
    finally:
        loop, end = ends[0]
        loop.call_soon_threadsafe(end.set)
        thread.join(20)
        assert not thread.is_alive()
