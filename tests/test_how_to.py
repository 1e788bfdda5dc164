"""The code of README.md, docs/tutorial.md and docs/how-to: each block runs in a test, or cannot run here and is parsed.

Here the blocks of shell of each how-to page run in order, in a folder with made videos and two finished outputs. The
commands that start Ray are only parsed, and a launch is done without Ray; P3D_HOW_TO=1 runs them, too, in some minutes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from p3d.jobs.planning.prepare import JobSpec
from p3d.pipeline.storage.local import LocalStore
from tests.conftest import REPO, p3d
from tests.jobs.embedded import embed_all
from tests.jobs.test_cli import in_process
from tests.owned import own
from tests.p3d.test_resnet import ResNet
from tests.pages import LACKING, SHELLS, WITH_CODE, Block, blocks
from tests.test_deploy import parse_p3d
from tests.zoo import make

WITH_RAY = os.environ.get("P3D_HOW_TO") == "1"
STARTS_RAY = {"launch", "resume", "retry", "logs", "trace"}  # the last two need a run
# (page, language) -> the test that runs the blocks; the other ones run here
RUN_ELSEWHERE = {
    ("README.md", "python"): "tests/jobs/test_api.py",
    ("README.md", "sql"): "tests/jobs/test_end_to_end.py",
    ("docs/tutorial.md", "console"): "tests/test_tutorial.py",
    ("docs/how-to/results.md", "sql"): "tests/jobs/test_end_to_end.py",
    ("docs/how-to/results.md", "python"): "tests/jobs/test_embedding.py",
    ("docs/how-to/search-engines.md", "python"): "tests/test_recipes.py",
    ("docs/how-to/train.md", "sh"): "tests/training/test_how_to.py",
}
HERE = sorted({page for page in WITH_CODE if page.startswith("docs/how-to/")} - {"docs/how-to/train.md"})
# verb -> the exit codes that are right; 0 for all others
CODES = {"cancel": (0, 2, 4, 6), "launch": (0, 3), "resume": (0, 3), "retry": (0, 3)}


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_block_says_what_it_is(page: str) -> None:
    """The kinds are those of tests/pages.py, and text has no command that should run."""
    for block in blocks(page):
        assert block.language in {"sh", "console", "python", "sql", "yaml", "text"} | SHELLS, block
        assert block.lacks <= LACKING, block
        if block.language == "text":
            assert not re.match(r"p3d |pip |import |SELECT ", block.text), block


@pytest.mark.parametrize("page", WITH_CODE)
def test_every_command_is_valid(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real program takes the verbs, arguments and options of each `p3d` line."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page):
        for words in block.p3d_words() if block.language in ("sh", "console") else ():
            for word in words:
                if re.fullmatch(r"\w+\.(csv|txt|pth|safetensors)", word):
                    (tmp_path / word).touch()
            parse_p3d(words)


@pytest.mark.parametrize("page", WITH_CODE)
def test_make_has_each_target(page: str) -> None:
    """A block `sh make` has only targets of the Makefile."""
    targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
    for block in blocks(page):
        if "make" in block.lacks:
            assert {shlex.split(line, comments=True)[1] for line in block.lines()} <= set(targets)


def test_what_runs_elsewhere_does() -> None:
    """Each test that is named reads the page, and each block of code has a test."""
    for (page, _), test in RUN_ELSEWHERE.items():
        text = (REPO / test).read_text()
        assert page in text or Path(page).name in text, (page, test)
    for page in WITH_CODE:
        for block in blocks(page):
            if block.language in ("sql", "python", "console") or (block.language == "sh" and not block.lacks):
                assert (page, block.language) in RUN_ELSEWHERE or page in HERE, block


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, small_weights: Path) -> Path:
    """What the pages assume: videos, a list, weights, two finished outputs. It is made in work/, where pages run."""
    home = tmp_path_factory.mktemp("pages") / "work"
    (home / "videos").mkdir(parents=True)
    for name, n_frames in (("a", 40), ("b", 16), ("c", 20)):
        make.video(home / "videos" / f"{name}.mp4", "libx264", n_frames, options={"preset": "ultrafast"})
    (home / "videos" / "talks").mkdir()
    shutil.copy(home / "videos" / "b.mp4", home / "videos" / "talks" / "d.mp4")
    (home / "videos" / "broken.mp4").write_text("not a video\n")
    shutil.copy(home / "videos" / "a.mp4", home / "query.mp4")
    (home / "list.csv").write_text("path,id,label,split\nvideos/a.mp4,v1,archery,train\nvideos/b.mp4,v2,yoyo,test\n")
    (home / "labels.csv").write_text("path,label\na.mp4,1\nb.mp4,2\n")
    shutil.copy(small_weights, home / "p3d63.safetensors")
    torch.save(ResNet((3, 4, 6, 3), classes=3).state_dict(), home / "resnet50.pth")
    torch.save({"state_dict": {"fc.weight": torch.zeros(2, 2)}}, home / "w.pth.tar")
    for out in ("out", "out2"):
        words = ["launch", "videos/", out, "--weights", "p3d63.safetensors"]
        if WITH_RAY:
            assert p3d(*words, cwd=home).code == 3  # of broken.mp4
        else:
            embed(home, words)
    return home.rename(home.with_name("kept"))


def embed(folder: Path, words: list[str]) -> None:
    """What a launch does, without Ray; into an output that exists it does nothing."""
    given = parse_p3d(words).params
    out = folder / given["out"]
    if not (out / "job.json").exists():
        fields = {name: given[name] for name in ("model", "graph", "clips", "frame_step", "fps", "pool", "scores")}
        source = str(folder / given["src"].partition("/**")[0])
        embed_all(source, LocalStore(str(out)), JobSpec(weights=str(folder / given["weights"]), **fields), folder)


@pytest.fixture
def place(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `home` as the working directory, where archive/ is a copy of videos/."""
    work = home.with_name("work")
    shutil.copytree(home, work)
    monkeypatch.chdir(work)
    shutil.copytree("videos", "archive")
    for out in ("out", "out2"):
        own(LocalStore(out))
    yield work
    monkeypatch.undo()
    shutil.rmtree(work)


def run_line(place: Path, block: Block, line: str) -> None:
    """Run one command of a block, or check it if it starts Ray."""
    words = shlex.split(line, comments=True)
    if words[0] != "p3d":
        line = re.sub(r"^python ", f"{shlex.quote(sys.executable)} ", line)
        subprocess.run(["bash", "-c", line], cwd=place, env={**os.environ, "PYTHONPATH": str(REPO)}, check=True)
    elif STARTS_RAY & set(words[1:3]) and not WITH_RAY:
        if words[1] == "launch":
            embed(place, words[1:])
    else:
        code, _, said = in_process(*words[1:])
        assert code in CODES.get(words[1], (0,)), (block.page, line, code, said)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", HERE)
def test_a_page_runs(page: str, place: Path) -> None:
    """Each command and each block of Python of the page works, in order."""
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "sh" and not block.lacks:
            for line in block.lines():
                run_line(place, block, line)
        elif block.language == "yaml":
            assert yaml.safe_load(block.text)
        elif block.language == "python" and (page, "python") not in RUN_ELSEWHERE:
            code = block.text.replace('"OUT"', '"out/"').replace("VIDEO.mp4", "query.mp4")
            exec(compile(code.replace("duration_s>=1", "duration_s>=0"), page, "exec"), names)
