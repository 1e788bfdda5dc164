"""The page's server under clients that send half a request, and with rows that JSON cannot hold."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pytest

from p3d.pipeline.dataset.commit import commit_shard
from p3d.pipeline.dataset.plans import Manifest, write_plan
from p3d.pipeline.dataset.sharding import with_shards
from p3d.pipeline.recipe import JobRecord, ShardSizing
from p3d.pipeline.results.page import connections
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import P3D, REPO
from tests.jobs.served import Served, serving
from tests.pipeline.rows import recipe, shard_rows, videos

HALF = b"GET /x HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    """Four videos with columns of the user that hold NaN and infinity at every depth."""
    store = LocalStore(str(tmp_path_factory.mktemp("page") / "out"))
    store.create("job.json", JobRecord(recipe(), "random:0", {}).to_json())
    table, bad = videos("abcd"), [math.nan, math.inf, -math.inf, 1.5]
    table = table.append_column("one", pa.array(bad))
    table = table.append_column("many", pa.array([bad] * 4))
    table = table.append_column("deep", pa.array([[bad, [math.nan]]] * 4))
    table = table.append_column("struct", pa.array([{"x": math.nan, "y": [math.inf]}] * 4))
    manifest = Manifest(store, write_plan(store, 1, recipe(), with_shards(table, ShardSizing(4)), 0, ShardSizing()))
    commit_shard(store, shard_rows(manifest, 0, frames=(40, 16)), recipe(), manifest.user_columns(0))
    return store


@pytest.fixture
def half_open() -> Iterator[Any]:
    """Connections that have sent half of the headers of a request."""
    with contextlib.ExitStack() as stack:

        def open_(page: Served, number: int) -> list[socket.socket]:
            parts, made = urlsplit(page.url), []
            for _ in range(number):
                raw = stack.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=30))
                with contextlib.suppress(OSError):
                    raw.sendall(HALF)
                made.append(raw)
            return made

        yield open_


def is_closed(raw: socket.socket) -> bool:
    """Wait until the server closes a connection."""
    try:
        return raw.recv(1) == b""
    except ConnectionResetError:
        return True


def test_half_open_connections_do_not_stall_the_page(out: LocalStore, half_open: Any) -> None:
    """With 300 of them, the page answers at once, and only so many stay open, the newest."""
    with serving(out) as page:
        began, made = time.monotonic(), half_open(page, 300)
        for _ in range(5):
            assert page.ask("api/videos").json["total"] == 4
        assert time.monotonic() - began < connections.HEADER_S  # so it is not the time-out that helps
        assert all(is_closed(raw) for raw in made[: 300 - connections.MOST])
        made[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            made[-1].recv(1)


def test_a_request_has_to_be_whole_in_time(out: LocalStore, half_open: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence, half of the headers, a slow trickle, and a kept connection: each is closed by its time."""
    monkeypatch.setattr(connections, "HEADER_S", 0.3)
    monkeypatch.setattr(connections, "IDLE_S", 0.3)
    with serving(out) as page:
        silent, half, trickle, kept = half_open(page, 4)
        with contextlib.suppress(OSError):  # until the server has had enough
            for _ in range(600):
                trickle.sendall(b"a")
                time.sleep(0.01)  # the pace of the client
            pytest.fail("the server takes a header without an end")
        assert is_closed(silent) and is_closed(half)
        kept = half_open(page, 1)[0]
        kept.sendall(b"1\r\n\r\n")
        assert b"404" in kept.recv(20)
        while kept.recv(4096):
            pass
        assert page.ask("api/about").status == 200


def test_a_request_that_takes_long_is_not_closed(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a connection runs only while it has no request; nor does a newer connection displace a busy one."""
    monkeypatch.setattr(connections, "HEADER_S", 0.05)
    monkeypatch.setattr(connections, "IDLE_S", 0.05)
    monkeypatch.setattr(connections, "MOST", 1)
    with serving(out) as page:
        slow = page.archive.__class__.find

        def find(self: Any, *given: Any) -> Any:
            with contextlib.suppress(OSError):
                other = socket.create_connection((urlsplit(page.url).hostname, urlsplit(page.url).port), timeout=30)
                with other:
                    assert is_closed(other)  # the only place is taken
            time.sleep(0.3)  # longer than both times
            return slow(self, *given)

        monkeypatch.setattr(page.archive.__class__, "find", find)
        assert page.ask("api/videos").json["total"] == 4


def test_few_descriptors_are_enough(out: LocalStore, half_open: Any) -> None:
    """With 128 descriptors and 300 half-open connections the command answers, is idle, and stderr stays short."""
    command = ["sh", "-c", 'ulimit -n 128; exec "$@"', "sh", *P3D, "results", "serve", out.url, "--no-open"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            page = Served(child.stdout.readline().strip(), None)  # type: ignore[arg-type] # not needed
            half_open(page, 300)
            assert page.ask("api/about").json["videos"] == 4
            assert page.ask("api/videos").json["total"] == 4
            child.terminate()
            assert child.wait(20) == 0
            assert len(child.stderr.read()) < 1000
        finally:
            child.kill()


def test_a_failure_to_accept_is_throttled(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """If no descriptor is left, the server pauses between attempts, closes an idle connection, and then goes on."""
    import asyncio

    accept, failed = asyncio.SelectorEventLoop.sock_accept, []

    async def fails(self: Any, listening: socket.socket) -> Any:
        if len(failed) < 3:
            failed.append(time.monotonic())
            raise OSError(24, "Too many open files")
        return await accept(self, listening)

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_accept", fails)
    with serving(out) as page:
        assert page.ask("api/about").status == 200
    assert len(failed) == 3 and failed[-1] - failed[0] >= 2 * connections.PAUSE_S


def test_nan_and_infinity_are_text_at_any_depth(out: LocalStore) -> None:
    """Every answer is valid JSON, whatever numbers the columns of the user hold, also in lists and structs."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    with serving(out) as page:
        for name in ("a", "b", "c", "d"):
            reply = page.ask("api/video", id=name)
            assert reply.status == 200
            row = json.loads(reply.body, parse_constant=refuse)["video"]
            assert row["many"] == ["nan", "inf", "-inf", 1.5] and row["deep"][0] == row["many"]
            assert row["struct"] == {"x": "nan", "y": ["inf"]}
            for ask in ("api/videos", "api/about", "api/map", "api/similar"):
                reply = page.ask(ask, id=name)
                assert reply.status == 200 and json.loads(reply.body, parse_constant=refuse)
        assert page.ask("api/video", id="a").json["video"]["one"] == "nan"
