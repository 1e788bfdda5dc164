"""Every command of docs/tutorial.md runs as it stands there, with made videos and a local server for the weights."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import P3D, REPO, p3d
from tests.jobs.test_fetch_weights import Server, serving
from tests.p3d.test_resnet import ResNet
from tests.zoo import make

TUTORIAL = (REPO / "docs" / "tutorial.md").read_text()
STEPS = re.findall(r"^\$ p3d (.*)\n(\^C)?", TUTORIAL, re.M)  # the command, and whether Ctrl-C ends it
CODES = {"resume": 3, "retry": 3}  # of a folder with one file that is not a video


def stopped(words: list[str], folder: Path, done: Path | str) -> subprocess.CompletedProcess[str]:
    """Run a command until a file appears (Path) or it prints a text, then press Ctrl-C."""
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen([*P3D, *words], cwd=folder, stdout=said, stderr=subprocess.STDOUT)
        end = time.monotonic() + 180
        while not (any(done.glob("*")) if isinstance(done, Path) else done in (folder / "said").read_text()):
            assert process.poll() is None and time.monotonic() < end, (folder / "said").read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    return subprocess.CompletedProcess(words, code, (folder / "said").read_text())


@pytest.mark.timeout(600)
def test_the_tutorial_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetch, plan, launch, Ctrl-C, resume, failures, search, page, report: every command ends as the text says."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("BROWSER", "true")  # the page opens a browser
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in "abcdef":
        make.video(videos / f"{name}.mp4", "libx264", 16, options={"preset": "ultrafast"})
    (videos / "broken.mp4").write_text("not a video\n")
    torch.save(ResNet((3, 4, 6, 3), classes=3).state_dict(), tmp_path / "resnet50.pth")
    assert len(STEPS) == TUTORIAL.count("$ p3d ") > 10
    with serving(Server()) as server:
        server.content = (tmp_path / "resnet50.pth").read_bytes()
        server.cut_at = len(server.content)
        mirror = f"fetch --url {server.url()} --sha256 {server.wanted().sha256}"
        for line, interrupted in STEPS:
            words = shlex.split(line.replace("fetch resnet50-v2", mirror))
            until = "127.0.0.1" if words[0] == "results" else tmp_path / "out" / "clips"
            ran = stopped(words, tmp_path, until) if interrupted else p3d(*words, cwd=tmp_path)
            expected = 130 if interrupted and words[0] == "launch" else CODES.get(words[0], 0)
            shown = ran.returncode if isinstance(ran, subprocess.CompletedProcess) else ran.code
            assert shown == expected, (line, ran)
    status = p3d("status", "out", cwd=tmp_path).out
    assert "6 videos" in status
    assert "..." in status and not re.search("[0-9a-f]{64}", status)  # the hash of the weights in short
    assert (tmp_path / "report.html").stat().st_size > 10_000
