"""The page of `p3d results serve` over HTTP: access checks, served files, and the same answers as `p3d search`."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import av
import boto3
import psutil
import pytest

import p3d
from p3d.jobs.job import rows_of
from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.dataset.snapshot import snapshot
from p3d.pipeline.errors import DamagedJob, InputError, Reason, VideoError
from p3d.pipeline.results.page import archive, pictures, server, similar
from p3d.pipeline.results.page.archive import Archive, read_archive, read_rows, with_map
from p3d.pipeline.results.page.content import open_content
from p3d.pipeline.results.page.opening import OnStep, Opening
from p3d.pipeline.results.page.pictures import Pictures
from p3d.pipeline.sources.below import EVERY_SOURCE
from p3d.pipeline.storage.local import LocalStore
from p3d.pipeline.storage.store import DEFAULTS
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import Failure, VideoRef
from tests.conftest import P3D, REPO
from tests.jobs.embedded import embed_all
from tests.jobs.served import Served, serving
from tests.zoo import moving

HOSTILE = (
    b"<img src=x onerror=alert(1)>.mp4",
    b"\"'><script>alert(1)</script>.mp4".replace(b"/", b"\\"),
    b"new\nline.mp4",
    b"caf\xe9.mp4",
    b"..%2f..%2fetc%2fpasswd.mp4",
)


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos under hostile names, a file that is not a video, and a secret file next to them."""
    root = tmp_path_factory.mktemp("page") / "films"
    root.mkdir()
    for at, n_frames in enumerate((40, 20, 16)):
        moving.video(root / f"{at}.mp4", at, n_frames)
    for at, name in enumerate(HOSTILE):
        os.link(root / f"{at % 3}.mp4", os.path.join(os.fsencode(root), name))  # noqa: PTH118 - bytes
    (root / "broken.mp4").write_bytes(b"no video at all, but a sentence <b>in bold</b>")
    (root.parent / "secret.mp4").write_bytes(b"secret")
    return root


@pytest.fixture(scope="module", params=["every vector in memory", "a sample of them"])
def any_page(out: LocalStore, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A small dataset, and one with more videos than its map shows."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if request.param.startswith("a sample"):
            patch.setattr(archive, "MAP_ROWS", 5)
        yield stack.enter_context(serving(out))


@pytest.fixture(scope="module")
def page(out: LocalStore) -> Iterator[Served]:
    with serving(out) as served:
        yield served


def test_requests_need_the_token(page: Served) -> None:
    """With a wrong, missing or partial token every URL is not found, and the response reveals nothing."""
    token = urlsplit(page.url).path.strip("/")
    assert len(token) >= 32
    for name in ("", "api/about", "api/videos", "content", "main.js", "api/map"):
        assert page.ask(name, id=page.id_of("0.mp4")).status in (200, 206)
        for wrong in ("", token[:-1], token + "x", "x" * len(token), quote("é"), "//" + token):
            reply = page.ask(name, token=wrong, id=page.id_of("0.mp4"))
            assert (reply.status, b"mp4" in reply.body) == (404, False), wrong
            assert b"the address has a token" in reply.body  # by the guard, before routing
    assert page.ask("api/drop", method="POST", token="x" * 32, body=b"x").status == 404
    parts = urlsplit(page.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as raw:
        raw.sendall(f"OPTIONS * HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
        assert raw.makefile("rb").readline().split()[1] == b"404"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example:80", "localhost@evil", "", "0.0.0.0:1", None])
def test_another_host_is_refused(page: Served, host: str | None) -> None:
    """A host name that DNS rebinding points to loopback is refused, even with the right token."""
    reply = page.ask("api/about", headers={"Host": host})
    assert reply.status in (400, 403) and b"p3d-demo" not in reply.body


def test_a_forwarded_port_is_accepted(page: Served) -> None:
    """`ssh -L` gives the page another port, and localhost is loopback too."""
    assert [page.ask("api/about", headers={"Host": host}).status for host in ("localhost:9", "[::1]:80")] == [200, 200]


def test_another_page_may_not_send_files(page: Served) -> None:
    """A POST needs the page's own origin; no response allows another origin to read it."""
    for origin in ("http://evil.example", "null", None, "http://127.0.0.1:1"):
        reply = page.ask("api/drop", method="POST", headers={"Origin": origin}, body=b"x")
        assert reply.status == 403
        assert not any(name.startswith("access-control") for name in reply.headers)


def test_every_answer_has_a_policy_without_inline_scripts(page: Served) -> None:
    """Every response, errors included, has CSP, no sniffing, no referrer; and the page needs nothing inline."""
    for reply in (
        page.ask(""),
        page.ask("page.css"),
        page.ask("api/videos"),
        page.ask("content", id=page.id_of("0.mp4")),
        page.ask("picture", id=page.id_of("broken.mp4")),
        page.ask("nothing"),
        page.ask("", headers={"Host": "evil.example"}),
    ):
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        assert (reply.headers["x-content-type-options"], reply.headers["referrer-policy"]) == ("nosniff", "no-referrer")
    html = page.ask("").body.decode()
    assert not re.search(r"<script(?![^>]*src=)|\sstyle=|\son\w+=|javascript:|https?://", html)


def test_everything_the_page_loads_is_there(page: Served) -> None:
    """It works offline: what HTML and modules name is served with its type, and nothing names another host."""
    html = page.ask("").body.decode()
    names = set(re.findall(r'(?:src|href)="([^"#]+)"', html))
    for name in list(names):
        names |= set(re.findall(r'from "\./([\w.]+)"', page.ask(name).body.decode()))
    types = {name: page.ask(name).headers["content-type"] for name in names}
    assert {name: kind for name, kind in types.items() if name.endswith(".js")} and len(names) >= 9
    assert all(kind.startswith(server.TYPES[Path(name).suffix]) for name, kind in types.items())
    assert not any(re.search(rb"https?://(?!www\.w3\.org/2000/svg)", page.ask(name).body) for name in names)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, None),
        ("bytes=-7", -7, None),
        ("bytes=5-5", 5, 6),
        ("bytes=9-9999999", 9, None),
    ],
)
def test_ranges_are_those_of_the_file(page: Served, films: Path, asked: str, start: int, end: int | None) -> None:
    """Any range of a video has the bytes of its file, and the right Content-Range."""
    content = (films / "0.mp4").read_bytes()
    reply = page.ask("content", id=page.id_of("0.mp4"), headers={"Range": asked})
    expected = content[start:end]
    first = start % len(content)
    assert (reply.status, reply.body) == (206, expected)
    assert reply.headers["content-range"] == f"bytes {first}-{first + len(expected) - 1}/{len(content)}"
    assert (reply.headers["content-type"], reply.headers["accept-ranges"]) == ("video/mp4", "bytes")


def test_what_ranges_and_versions_give(page: Served, films: Path) -> None:
    """Beyond the end is 416; invalid, several or outdated ranges give the whole file; HEAD has no body.

    A client that has this version already gets 304 and no bytes.
    """
    content, video = (films / "0.mp4").read_bytes(), page.id_of("0.mp4")
    beyond = page.ask("content", id=video, headers={"Range": f"bytes={len(content)}-"})
    assert (beyond.status, beyond.body, beyond.headers["content-range"]) == (416, b"", f"bytes */{len(content)}")
    etag = page.ask("content", id=video).headers["etag"]
    for headers in ({"Range": "bytes=9-2"}, {"Range": "lines=1-2"}, {"Range": "bytes=0-1,4-5"}):
        assert page.ask("content", id=video, headers=headers).body == content
    for if_range, status in ((etag, 206), ('"another"', 200)):
        assert page.ask("content", id=video, headers={"Range": "bytes=0-1", "If-Range": if_range}).status == status
    for named, status in ((etag, 304), (f'"another", W/{etag}', 304), ("*", 304), ('"another"', 200)):
        reply = page.ask("content", id=video, headers={"If-None-Match": named, "Range": "bytes=0-"})
        assert (reply.status, reply.headers["etag"]) == (status if status == 304 else 206, etag)
        assert reply.body == (b"" if status == 304 else content)
    head = page.ask("content", id=video, method="HEAD")
    assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(content)))


def test_nothing_but_videos_of_the_dataset_is_served(page: Served, films: Path) -> None:
    """No path, uri, dotted or encoded name reaches a file: a video is named by its id, and only by that."""
    secret = films.parent / "secret.mp4"
    own = ("0.mp4", (films / "0.mp4").as_uri())  # search accepts these names, but they open no file
    for name in (str(secret), secret.as_uri(), "../secret.mp4", *own, "", "\0", "." * 5000):
        for what in ("content", "picture", "api/video", "api/frames"):
            reply = page.ask(what, id=name, t="0")
            assert reply.status == 400 and b"secret" not in reply.body.replace(str(secret).encode(), b"")
        assert page.ask("api/similar", id=name).status == (200 if name in own else 400)
    for path in ("../page.css", "..%2fserver.py", "%2e%2e/server.py", "static/page.css", "page.css/..", "page.css%00"):
        assert page.ask(path).status in (400, 404), path


def test_a_video_that_changed_is_not_served(films: Path, small_weights: Path, tmp_path: Path) -> None:
    """Rewritten, removed, or replaced by a link: the response has the reason, and no byte of the file."""
    root = tmp_path / "v"
    root.mkdir()
    for name in ("rewritten", "removed", "linked", "folder"):
        shutil.copy(films / "2.mp4", root / f"{name}.mp4")
    store = LocalStore(str(tmp_path / "out"))
    embed_all(str(root), store, JobSpec(None, str(small_weights)), tmp_path)
    with serving(store) as page:
        assert page.ask("content", id=page.id_of("rewritten.mp4")).status == 200
        opened = open_content(page.ref("rewritten.mp4"), DEFAULTS)
        (root / "rewritten.mp4").write_bytes(b"other")
        with pytest.raises(VideoError, match="not the file that was embedded"):
            opened.read(0, 10)  # also if it changes while it is being sent
        opened.close()
        for name in ("removed", "linked", "folder"):
            (root / f"{name}.mp4").unlink()
        (root / "linked.mp4").symlink_to(films.parent / "secret.mp4")
        (root / "folder.mp4").mkdir()
        for name, reason in (
            ("rewritten", "source_changed"),
            ("removed", "source_missing"),
            ("linked", "not_a_file"),
            ("folder", "not_a_file"),
        ):
            for what in ("content", "picture"):
                reply = page.ask(what, id=page.id_of(f"{name}.mp4"))
                assert (reply.status, reply.json["reason"]) == (404, reason), name


def test_hostile_names_stay_data(page: Served, films: Path) -> None:
    """They are found by text, come back unchanged as JSON strings, and their videos play; no HTML contains one."""
    shown = {video["path"] for video in page.ask("api/videos").json["videos"]}
    expected = {name.decode("utf-8", "backslashreplace") for name in HOSTILE}
    assert expected <= shown
    for name in expected:
        (video,) = page.ask("api/videos", text=name.upper()).json["videos"]
        assert page.ask("content", id=video["video_id"]).status == 200
        reply = page.ask("api/video", id=video["video_id"])
        assert reply.json["video"]["path"] == name and reply.headers["content-type"].startswith("application/json")
    assert b"onerror" not in page.ask("").body


def test_similar_is_what_search_finds(any_page: Served, out: LocalStore) -> None:
    """The hits and cosines of `p3d search`, for a video, a second of it, with conditions and without near-copies."""
    page, video = any_page, any_page.id_of("0.mp4")
    for params, query, how in (
        ({}, "0.mp4", {}),
        ({"top": 2}, "0.mp4", {"top": 2}),
        ({"top": 2, "where": "n_frames<20"}, "0.mp4", {"top": 2, "where": ["n_frames<20"]}),
        ({"t": 1.0, "top": 3}, "0.mp4@1.0s", {"top": 3}),
        ({"t": "0:01", "level": "clip", "top": 5}, "0.mp4@1", {"top": 5, "level": "clip"}),
        ({"level": "clip"}, "0.mp4", {"level": "clip"}),
        ({"level": "clip", "every": "yes"}, "0.mp4", {"level": "clip", "per_video": False}),
        ({"where": ["n_frames>=20", "codec=h264"]}, "0.mp4", {"where": ["n_frames>=20"]}),
        ({"distinct": 0.9999}, "0.mp4", {"distinct": 0.9999}),
    ):
        for own in (False, True):
            found = p3d.search(out.url, query, **{"top": 24, "level": "video", "with_self": own, **how})
            reply = page.ask("api/similar", id=video, own="yes" if own else "no", **params).json
            mine = [(hit["video_id"], hit["clip_index"], hit["cosine"], hit["start_s"]) for hit in reply["hits"]]
            assert mine == [(hit.video_id, hit.clip_index, hit.score, hit.start_s) for hit in found.hits]
            assert mine and reply["rows"] == found.n_rows, params
    others = page.ask("api/similar", id=video, level="clip").json
    assert others["hits"] and video not in {hit["video_id"] for hit in others["hits"]}
    assert others["query_vectors"] == 3 and {hit["query_start_s"] for hit in others["hits"]} <= {0.0, 0.64, 0.96}


def test_mistakes_have_messages(page: Served) -> None:
    """An invalid condition, number, second or video is 400, with a message that names it."""
    video = page.id_of("0.mp4")
    for name, params, word in (
        ("api/videos", {"where": "colour=red"}, "colour"),
        ("api/videos", {"offset": "nan"}, "nan"),
        ("api/videos", {"failed": "perhaps"}, "perhaps"),
        ("api/similar", {"id": video, "t": "1e99"}, "1e99"),
        ("api/similar", {"id": video, "t": "1:75"}, "1:75"),
        ("api/similar", {"id": video, "t": "99"}, "99"),
        ("api/similar", {"id": video, "level": "frame"}, "frame"),
        ("api/similar", {"dropped": "never"}, "again"),
        ("api/similar", {}, "neither"),
        ("api/similar", {"id": page.id_of("broken.mp4")}, "failed"),
    ):
        reply = page.ask(name, **params)
        assert reply.status == 400 and word in reply.json["error"], (name, params, reply.body)


def test_the_list_is_narrowed(page: Served) -> None:
    """By text in path or id, conditions, cluster and failure; the pages add up to the whole list."""
    every = page.ask("api/videos").json
    assert every["total"] == 9 == len(every["videos"])
    failed = page.ask("api/videos", failed="yes").json["videos"]
    assert [(video["path"], video["reason"]) for video in failed] == [("broken.mp4", "not_a_video")]
    assert page.ask("api/video", id=failed[0]["video_id"]).json["remedy"].startswith("Nothing, if it is not a video.")
    assert page.ask("api/videos", failed="no").json["total"] == 8
    assert page.ask("api/videos", text=page.id_of("1.mp4")[3:20]).json["videos"][0]["path"] == "1.mp4"
    assert page.ask("api/videos", where=["n_frames>=20", "n_frames<40"], text=".mp4").json["total"] == 3
    pieces = [page.ask("api/videos", offset=at, limit=4).json["videos"] for at in (0, 4, 8)]
    assert [video for piece in pieces for video in piece] == every["videos"]
    drawn = page.ask("api/map").json
    by_cluster = [page.ask("api/videos", cluster=one).json["total"] for one in sorted(set(drawn["cluster"]))]
    assert sum(by_cluster) == 8 == len(drawn["ids"]) == len(drawn["x"]) == len(drawn["y"])
    about = page.ask("api/about").json
    assert (about["videos"], about["failed"], about["pending"], about["model"]) == (8, 1, 0, "p3d-demo")
    assert {"duration_s", "codec"} <= {column["name"] for column in about["columns"]}


def test_a_dropped_file_finds_itself(
    out: LocalStore, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embedded as in the job: cosine 1 at both levels, conditions apply, and nothing of the file remains."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with serving(out) as page:
        _drop_and_find(page, (films / "1.mp4").read_bytes(), tmp_path)
    assert not list(tmp_path.iterdir())


def _drop_and_find(page: Served, body: bytes, scratch: Path) -> None:
    dropped = page.ask("api/drop", method="POST", body=body, name="../../x.mp4").json
    assert (dropped["clips"], dropped["duration_s"]) == (2, 0.8)
    for level in ("video", "clip"):
        hits = page.ask("api/similar", dropped=dropped["dropped"], level=level, where="path=1.mp4", every="yes").json[
            "hits"
        ]
        assert [(hit["path"], hit["cosine"]) for hit in hits] == [("1.mp4", 1.0)] * (1 if level == "video" else 2)
    clip = page.ask("api/similar", dropped=dropped["dropped"], t=0.1, level="clip", top=1).json["hits"][0]
    assert (clip["cosine"], clip["start_s"]) == (1.0, 0.0)
    assert [one.name for one in scratch.rglob("*")] == [next(scratch.iterdir()).name, "pictures"]


def test_a_file_that_cannot_be_embedded_says_why(page: Served, out: LocalStore) -> None:
    """Not a video, or too large, whatever the Content-Length: the response has the reason, and the page still works."""
    bad = page.ask("api/drop", method="POST", body=b"text <b>", name="x.mp4")
    assert (bad.status, bad.json["reason"]) == (404, "not_a_video")
    with serving(out, dropped_bytes=1000) as small:
        large = small.ask("api/drop", method="POST", body=b"x" * 1001)
        assert (large.status, large.json["reason"]) == (404, "too_large")
        parts = urlsplit(small.url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=20)
        headers = {"Origin": f"http://{parts.netloc}", "Transfer-Encoding": "chunked"}
        connection.request("POST", f"{parts.path}api/drop", iter([b"x" * 600] * 3), headers, encode_chunked=True)
        assert json.loads(connection.getresponse().read())["reason"] == "too_large"
        connection.close()
        assert small.ask("api/about").json["drop_bytes"] == 1000


def test_pictures_are_jpegs_of_the_second(page: Served, films: Path) -> None:
    """A picture has the video's shape; one that fails says why; several seconds come at once."""
    reply = page.ask("picture", id=page.id_of("0.mp4"), t="0.5")
    assert (reply.status, reply.headers["content-type"]) == (200, "image/jpeg")
    decoder = av.CodecContext.create("mjpeg", "r")
    (frame,) = decoder.decode(av.Packet(reply.body))
    assert (frame.width, frame.height) == (240, 180)
    broken = page.ask("picture", id=page.id_of("broken.mp4"))
    assert (broken.status, broken.json["reason"]) == (404, "not_a_video")
    frames = page.ask("api/frames", id=page.id_of("1.mp4"), t=["0", "0.2", "0.4"]).json
    assert frames == {"failures": [None, None, None]}


def test_pictures_stay_within_their_limit(page: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used are removed first, and made again on request."""
    kept = pictures.Pictures(tmp_path, DEFAULTS)
    made: list[float] = []
    monkeypatch.setattr(pictures, "KEPT_BYTES", 25)
    monkeypatch.setattr(
        pictures.Pictures, "_made", lambda _, video, seconds: [made.append(one) or b"ten bytes." for one in seconds]
    )
    video = page.ref("0.mp4")
    kept.of(video, [0.0, 1.0])
    kept.of(video, [0.0])
    kept.of(video, [2.0])
    assert len(list(tmp_path.iterdir())) == 2
    kept.of(video, [0.0, 1.0])
    assert made == [0.0, 1.0, 2.0, 1.0]


def a_video(out: LocalStore) -> VideoRef:
    """A video of the dataset that has rows."""
    for folder, table in rows_of(out).rows(clips=False):
        if folder == "videos" and table.num_rows:
            row = table.select(["video_id", "path", "uri", "version"]).to_pylist()[0]
            return VideoRef(**row, size_bytes=0)
    raise AssertionError("no video has rows")


def test_a_failure_that_may_pass_is_not_kept(
    out: LocalStore, films: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source gets its pictures once it is reachable again; a file that is not a video is not decoded again."""
    video, pictures = a_video(out), Pictures(tmp_path, DEFAULTS)
    away = films.rename(films.with_name("away"))
    try:
        (failure,) = pictures.of(video, [0.0])
    finally:
        away.rename(films)
    assert isinstance(failure, Failure) and failure.reason == Reason.SOURCE_MISSING
    assert isinstance(pictures.of(video, [0.0])[0], bytes)
    asked = []
    never = Failure(Reason.NO_FRAMES, "")
    monkeypatch.setattr(Pictures, "_made", lambda *given: asked.append(given) or [never])
    assert [pictures.of(video, [9.0]) for _ in range(2)] == [[never]] * 2 and len(asked) == 1


def test_a_request_that_is_broken_off_leaves_no_file_open(out: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file opened by a thread for a closed request is closed with its last reference."""
    video, before = a_video(out), psutil.Process().num_fds()
    for _ in range(20):
        open_content(video, DEFAULTS)
    assert psutil.Process().num_fds() <= before + 1


def test_an_error_of_the_machine_is_reported(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or a process that cannot start, is an error of one request, with the reason."""
    for error in (OSError(28, "No space left on device"), RuntimeError("can't start new thread")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(Archive, "find", fail)
        reply = page.ask("api/videos")
        assert reply.status == 507 and str(error) in reply.json["error"]


def test_the_server_takes_only_so_many_requests(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further requests are refused as too many, instead of being queued."""
    monkeypatch.setattr(server, "MOST_REQUESTS", 0)
    reply = page.ask("api/about")
    assert (reply.status, reply.headers["retry-after"]) == (503, "1")
    monkeypatch.undo()
    assert page.ask("api/about").status == 200


def test_a_search_ends_when_its_client_has_gone(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the client has closed the connection, the search ends at its next step."""
    began, ended, go_on = threading.Event(), threading.Event(), similar._go_on

    def step(gone: threading.Event, *steps: int) -> None:
        began.set()
        assert gone.wait(20)  # the search lasts until the server notices the closed connection
        try:
            go_on(gone, *steps)
        except similar.NobodyWaits:
            ended.set()
            raise

    monkeypatch.setattr(similar, "_go_on", step)
    parts = urlsplit(page.url)
    with socket.create_connection((parts.hostname or "", parts.port or 0), timeout=10) as raw:
        path = f"{parts.path}api/similar?id={page.id_of('0.mp4')}&level=clip"
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode())
        assert began.wait(20)
    assert ended.wait(20)


def test_a_snapshot_is_shown_too(out: LocalStore, tmp_path: Path) -> None:
    """Its rows, videos and neighbours; without clips only videos are compared."""
    dest = LocalStore(str(tmp_path / "clean"))
    snapshot(rows_of(out), dest, clips=False)
    with serving(dest) as page:
        assert page.ask("api/about").json["levels"] == ["video"]
        video = page.id_of("0.mp4")
        assert page.ask("content", id=video).status == 200
        assert page.ask("api/similar", id=video).json["hits"][0]["cosine"] > 0
        assert "no clips" in page.ask("api/similar", id=video, level="clip").json["error"]


def test_videos_on_s3_stream_through(films: Path, small_weights: Path, bucket: str, tmp_path: Path) -> None:
    """Source and output on S3: ranges and pictures are the object's, and another one under its key is refused."""
    client = boto3.client("s3")
    for at in range(3):
        client.upload_file(str(films / f"{at}.mp4"), bucket, f"v/{at} <b>&.mp4")
    store = open_store(f"s3://{bucket}/out")
    embed_all(f"s3://{bucket}/v/", store, JobSpec(None, str(small_weights)), tmp_path)
    content = (films / "0.mp4").read_bytes()
    with serving(store) as page:
        video = page.id_of("0 <b>&.mp4")
        assert page.ask("content", id=video).body == content
        reply = page.ask("content", id=video, headers={"Range": "bytes=100-299"})
        assert (reply.status, reply.body) == (206, content[100:300])
        assert page.ask("picture", id=video, t="0.5").headers["content-type"] == "image/jpeg"
        opened = open_content(page.ref("0 <b>&.mp4"), DEFAULTS)
        client.upload_file(str(films / "1.mp4"), bucket, "v/0 <b>&.mp4")
        with pytest.raises(VideoError, match="no longer the object"):
            opened.read(0, 10)
        assert page.ask("content", id=video).json["reason"] == "source_changed"
        client.delete_object(Bucket=bucket, Key="v/0 <b>&.mp4")
        assert page.ask("content", id=video).json["reason"] == "source_missing"


def test_the_command_serves_until_it_is_interrupted(out: LocalStore) -> None:
    """`p3d results serve` prints the URL on stdout, answers there, listens on loopback alone, and ends with 0."""
    command = [*P3D, "results", "serve", out.url, "--no-open"]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None and child.stderr is not None
            url = child.stdout.readline().strip()
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", url)
            port = urlsplit(url).port
            served = Served(url, None)  # type: ignore[arg-type]
            while "loading" in (about := served.ask("api/about").json):
                time.sleep(0.01)
            assert about["videos"] == 8
            taken = subprocess.run(
                [*command, "--port", str(port)], cwd=REPO, capture_output=True, text=True, check=False
            )
            assert (taken.returncode, f"--port {port}" in taken.stderr) == (2, True)
            # what is not HTTP gets no traceback
            for no_http in (b"\x16\x03\x01\r\n\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"):
                with socket.create_connection(("127.0.0.1", port), timeout=60) as odd:
                    odd.sendall(no_http)
                    assert odd.recv(4096).startswith(b"HTTP/1.0 400")
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 0
            assert "Traceback" not in child.stderr.read()
        finally:
            child.kill()


def test_its_end_does_not_wait_for_an_embedding(small_weights: Path, tmp_path: Path) -> None:
    """Ctrl-C while a long file is being embedded: the process exits with 0, the decoder ends, nothing is left."""
    for name in ("films", "tmp"):
        (tmp_path / name).mkdir()
    moving.video(tmp_path / "films" / "short.mp4", 0, 16)
    out = LocalStore(str(tmp_path / "out"))
    embed_all(str(tmp_path / "films"), out, JobSpec(None, str(small_weights), clips="every:1"), tmp_path)
    film = moving.video(tmp_path / "long.mp4", 1, 4000, hw=(48, 64))  # 3985 clips, most of a minute
    env = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [*P3D, "results", "serve", out.url, "--no-open"]
    with subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            served = Served(child.stdout.readline().strip(), None)  # type: ignore[arg-type]

            def send() -> None:
                with contextlib.suppress(OSError, http.client.HTTPException):
                    served.ask("api/drop", method="POST", body=film.read_bytes(), name="long.mp4")

            sending = threading.Thread(target=send)
            sending.start()
            while not (decoders := psutil.Process(child.pid).children()):
                assert sending.is_alive()
                time.sleep(0.05)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 0
            sending.join(20)
            assert not psutil.wait_procs(decoders, timeout=20)[1] and not list((tmp_path / "tmp").iterdir())
        finally:
            child.kill()


def test_the_browser_is_not_told_the_token_among_its_arguments(out: LocalStore, tmp_path: Path) -> None:
    """It is started with a file that only its user may read, which redirects to the page and is removed at the end."""
    browser, said = tmp_path / "browser", tmp_path / "said"
    os.mkfifo(said)
    browser.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{said}"\n')
    browser.chmod(0o700)
    env = {**os.environ, "BROWSER": f"{browser} %s"}
    with subprocess.Popen([*P3D, "results", "serve", out.url], cwd=REPO, env=env, stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            url = child.stdout.readline().decode().strip()
            (argument,) = said.read_text().splitlines()
            assert argument.startswith("file:///") and urlsplit(url).path.strip("/") not in argument
            path = Path(urlsplit(argument).path)
            assert [oct(one.stat().st_mode & 0o777) for one in (path, path.parent)] == ["0o600", "0o700"]
            assert f'content="0; url={url}"' in path.read_text()
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 0 and not path.parent.exists()
        finally:
            child.kill()


def test_without_weights_no_file_may_be_dropped(out: LocalStore, tmp_path: Path) -> None:
    """The page says so before a file is dropped."""
    from p3d.jobs.cli.serve import _embed_of

    shutil.copytree(out.root, tmp_path / "out")
    store = LocalStore(str(tmp_path / "out"))
    assert _embed_of(rows_of(store), "cpu") is not None
    shutil.rmtree(tmp_path / "out" / "weights")
    assert _embed_of(rows_of(store), "cpu") is None


def test_the_page_is_there_while_videos_are_read(out: LocalStore) -> None:
    """Until the rows are read, and until the map is made, requests get how far that is; an error ends the page."""
    source, steps = rows_of(out), threading.Semaphore(0)

    def read(on_step: OnStep) -> Iterator[Archive]:
        steps.acquire()
        on_step("read", 1, 3)
        steps.acquire()
        rows = read_rows(source)
        yield rows
        steps.acquire()
        yield with_map(rows)

    opening = Opening(read)
    with serving(out, opening=opening) as page:
        opening.start()
        assert page.ask("").status == 200
        assert page.ask("api/about").status == page.ask("api/similar").status == 503
        steps.release()
        while page.ask("api/about").json["loading"] != {"what": "read", "done": 1, "of": 3}:
            time.sleep(0.01)
        steps.release()
        while (reply := page.ask("api/about")).status == 503:
            time.sleep(0.01)
        assert reply.json["videos"] == 8
        assert page.ask("api/map").json["loading"]["what"] == "map"
        steps.release()
        while (reply := page.ask("api/map")).status == 503:
            time.sleep(0.01)
        assert reply.json["ids"] and reply.json["of"] == 8

    def fails(_: OnStep) -> Iterator[Archive]:
        raise DamagedJob("this file")
        yield

    ended = threading.Event()
    failing = Opening(fails)
    failing.on_error = ended.set
    failing.start()
    assert ended.wait(10)
    with pytest.raises(DamagedJob, match="this file"):
        failing.archive()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reading_that_fails_after_the_page_has_ended_is_silent() -> None:
    """Ctrl-C ended the page and its loop; the thread fails later and has nobody to tell."""
    ended = threading.Event()

    def read(_: OnStep) -> Iterator[Archive]:
        ended.wait(30)
        raise DamagedJob("this file")
        yield

    opening = Opening(read)
    rule, stop = EVERY_SOURCE, lambda _: os.kill(os.getpid(), signal.SIGINT)
    asyncio.run(
        server.serve_until_stopped(
            opening, embed=None, options=DEFAULTS, port=0, dropped_bytes=1, rule=rule, on_ready=stop
        )
    )
    ended.set()
    opening._thread.join(30)
    assert isinstance(opening.error, DamagedJob)


def test_umap_that_is_not_installed_is_named(page: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the command that installs it."""
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(InputError, match=r"p3d-embeddings\[umap\]"):
        read_archive(page.archive.source, layout="umap")


def test_the_port_is_free_again(out: LocalStore) -> None:
    """A server that has ended releases its port."""
    with serving(out) as page:
        port = urlsplit(page.url).port
    assert port is not None
    with socket.create_server(("127.0.0.1", port)):
        pass
