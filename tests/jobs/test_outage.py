"""A real store that fails during a job: SeaweedFS frozen, killed and started again."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from tests.conftest import LONG, P3D, p3d
from tests.servers import Weed, weed


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, archive: Path) -> Iterator[Weed]:
    """A separate server, with the archive in a bucket."""
    with weed(tmp_path / "weed") as running:
        for name, value in running.env.items():
            monkeypatch.setenv(name, value)
        client = client_of(running)
        client.create_bucket(Bucket="archive")
        for path in archive.rglob("*.mp4"):
            client.upload_file(str(path), "archive", f"in/{path.relative_to(archive)}")
        yield running


def client_of(server: Weed) -> Any:
    return boto3.session.Session().client("s3", endpoint_url=server.env["AWS_ENDPOINT_URL"])


def commits(client: Any) -> int:
    return client.list_objects_v2(Bucket="archive", Prefix="out/clips/")["KeyCount"]


def wait_for(true: Callable[[], bool], driver: subprocess.Popen[str], timeout_s: float = 120) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert driver.poll() is None, "the run ended early"
        assert time.monotonic() < until
        time.sleep(0.05)


def launched(weights: Path, said: Path, *more: object) -> subprocess.Popen[str]:
    # so that it does not end before the fault; the short form's network needs a tenth of the time for a clip
    many = ("--shard-videos", 1, "--clips", f"uniform:{60 if LONG else 200}")
    words = ["launch", "s3://archive/in", "s3://archive/out", "--weights", weights, *many, *more]
    with said.open("w") as stderr:
        return subprocess.Popen([*P3D, *map(str, words)], stdout=subprocess.DEVNULL, stderr=stderr, text=True)


def verified() -> dict[str, Any]:
    ran = p3d("verify", "s3://archive/out", "--json")
    assert ran.code == 0, ran.err
    return {name: ran.json[name] for name in ("manifest", "ok", "failed", "pending", "lost", "duplicated", "changed")}


ALL_OK = {"manifest": 12, "ok": 12, "failed": 0, "pending": 0, "lost": 0, "duplicated": 0, "changed": 0}


@pytest.mark.fault(28)
def test_an_outage_pauses_the_job_and_fails_no_video(server: Weed, tmp_path: Path, small_weights: Path) -> None:
    """A frozen server, and one that is killed and started again, only cost time."""
    said = tmp_path / "said"
    driver, client = launched(small_weights, said), client_of(server)
    wait_for(lambda: commits(client) >= 1, driver)
    server.freeze()
    time.sleep(2)  # the length of the freeze; requests wait for it
    server.thaw()
    wait_for(lambda: commits(client) >= 2, driver)
    server.kill()
    wait_for(lambda: "paused" in said.read_text(), driver)
    server.start()
    assert driver.wait(180) == 0, said.read_text()
    assert "continuing: the store answers again" in said.read_text()
    assert verified() == ALL_OK


@pytest.mark.skipif(not LONG, reason="a minute of waiting: make chaos")
@pytest.mark.fault(28)
def test_an_outage_that_lasts_stops_the_job_resumable(server: Weed, tmp_path: Path, small_weights: Path) -> None:
    """After --store-patience the run exits with 6 and a message; a resume finishes, and no video has failed."""
    said = tmp_path / "said"
    driver, client = launched(small_weights, said, "--store-patience", 1), client_of(server)
    wait_for(lambda: commits(client) >= 2, driver)
    server.kill()
    assert driver.wait(120) == 6, said.read_text()
    assert "no video failed because of it" in said.read_text()
    assert "p3d resume" in said.read_text()
    server.start()
    ran = p3d("resume", "s3://archive/out", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["videos_failed"] == 0
    assert verified() == ALL_OK
