"""CONTRIBUTING.md, CHANGELOG.md and CITATION.cff say what is true, and `make release` does what they say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO

# what a list must name completely: the program, and what generates its tables
PROGRAM = [
    *(path for folder in ("p3d", "pipeline", "jobs") for path in (REPO / folder).rglob("*.py")),
    REPO / "docs" / "generate.py",
]
SECTION = re.compile(r"^### (An? [^\n]+)\n\nExample: [^\n]*<!-- example: (\S+) -->\n(.*?)(?=^##)", re.S | re.M)
SECTIONS = {found[1]: (found[2], found[3]) for found in SECTION.finditer((REPO / "CONTRIBUTING.md").read_text())}
KINDS = ("Added", "Changed", "Deprecated", "Fixed", "Removed", "Security")  # in this order
HEAD = "## [Unreleased]\n"
MADE_BY = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"} | {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "A Person"), ("EMAIL", "person@example.com"))
}


def test_there_is_a_list_for_each_kind() -> None:
    assert set(SECTIONS) == {"A failure reason", "A column", "An option", "A network", "A store"}


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_list_names_every_file_to_change(kind: str) -> None:
    """Each file of a list mentions the example, and no other file of the program does."""
    example, text = SECTIONS[kind]
    mentions = re.compile(rf"\b(?:{example})\b")
    listed = re.findall(r"^- `([^`]+)`: ", text, re.M)
    assert len(listed) >= 3
    assert not [name for name in listed if not mentions.search((REPO / name).read_text())]
    # p3d/pipeline and p3d/jobs are links to the folders
    found = {path.resolve().relative_to(REPO.resolve()) for path in PROGRAM if mentions.search(path.read_text())}
    assert {str(path) for path in found} <= set(listed)


def test_every_file_and_target_that_is_named_exists() -> None:
    """Paths and `make` targets of CONTRIBUTING.md."""
    page = (REPO / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"[` ]((?:\.ci|\w+)/[\w./-]*\w)", page)
    named = {name for name in paths if not name.startswith("build/")}
    assert "jobs/scheduler/state.py" in named
    assert not [name for name in named if not (REPO / name).exists() and not (REPO / "p3d" / name).exists()]
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", page, re.M)) <= targets


def test_the_changelog_keeps_its_form() -> None:
    """[Unreleased] first, then versions with dates; in each, kinds of Keep a Changelog in order, each with entries."""
    _, *parts = re.split(r"^## ", (REPO / "CHANGELOG.md").read_text(), flags=re.M)
    assert parts[0].startswith("[Unreleased]\n")
    versions = [re.match(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d\n", part) for part in parts[1:]]
    assert all(versions)
    for part in parts:
        _, *lists = re.split(r"^### ", part, flags=re.M)
        kinds = [one.split("\n", 1)[0] for one in lists]
        assert kinds == [kind for kind in KINDS if kind in kinds]
        assert all(re.search(r"^- ", one, re.M) for one in lists)


def test_the_citation_has_what_its_format_requires() -> None:
    """The required fields of CFF 1.2.0, of the software and of the paper; licence as in pyproject.toml."""
    cited = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert cited["cff-version"] == "1.2.0" and cited["message"] and cited["title"] and cited["type"] == "software"
    (paper,) = cited["references"]
    assert {"type", "title", "authors"} <= paper.keys() and paper["type"] == "conference-paper"
    for author in [*cited["authors"], *paper["authors"]]:
        assert author.keys() in ({"name"}, {"family-names", "given-names"}) and all(author.values())
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert (cited["license"], cited["keywords"]) == (project["license"], project["keywords"])
    assert paper["title"] in " ".join((REPO / "README.md").read_text().split())
    assert "version" not in cited, "pyproject.toml is the only place of the version"


# ---- make release -------------------------------------------------------------------------------------------------


def git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], env=os.environ | MADE_BY, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone of a repository with the files of a release as they are here, and two changes more."""
    origin = tmp_path / "origin"
    (origin / ".ci").mkdir(parents=True)
    for name in ("Makefile", "CHANGELOG.md", "pyproject.toml", "CITATION.cff", ".ci/release.py"):
        shutil.copy(REPO / name, origin / name)
    log = origin / "CHANGELOG.md"
    log.write_text(log.read_text().replace(HEAD, f"{HEAD}\n### Added\n\n- This.\n\n### Removed\n\n- That.\n", 1))
    git(origin, "init", "--quiet")
    git(origin, "add", "--all")
    git(origin, "commit", "--quiet", "--message", "Begin")
    git(tmp_path, "clone", "--quiet", str(origin), "clone")
    return tmp_path / "clone"


def release(clone: Path, version: str) -> tuple[int, str]:
    """(exit code, output) of `make release`; make says 2 for every code of its command."""
    done = subprocess.run(
        ["make", "--silent", "release", f"VERSION={version}", f"PYTHON={sys.executable}"],
        cwd=clone,
        env=os.environ | MADE_BY,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_release_is_a_commit_and_a_tag_with_notes(clone: Path) -> None:
    """The version is set in one place, the entries get version and date, and nothing is pushed."""
    before = (clone / "CHANGELOG.md").read_text()
    code, said = release(clone, "7.8.9")
    assert code == 0, said
    assert tomllib.loads((clone / "pyproject.toml").read_text())["project"]["version"] == "7.8.9"
    after = (clone / "CHANGELOG.md").read_text()
    today = datetime.now(UTC).date()
    assert after == before.replace(HEAD, f"{HEAD}\n## [7.8.9] - {today}\n", 1)
    notes = git(clone, "tag", "--list", "--format=%(contents)", "v7.8.9")
    assert notes.startswith("Release 7.8.9\n\n### Added\n\n- This.\n\n### Removed\n\n- That.")
    assert git(clone, "log", "-1", "--format=%s", "v7.8.9") == "Release 7.8.9"
    assert not git(clone, "status", "--porcelain")
    assert git(clone, "show", "--format=", "--name-only").split() == ["CHANGELOG.md", "pyproject.toml"]
    origin = clone.parent / "origin"
    assert (git(origin, "tag"), git(origin, "log", "--format=%s")) == ("", "Begin")
    code, said = release(clone, "7.8.10")
    assert code == 2 and "no entries below [Unreleased]" in said, "the entries were released"


@pytest.mark.parametrize(
    ("version", "says"),
    [
        ("", "is not a version"),
        ("v1.2.3", "is not a version"),
        ("1.2", "is not a version"),
        ("0.0.1", "is older than"),
        ("6.0.0", "the tag v6.0.0 exists"),
        ("9.0.0", "the tree is not clean"),
    ],
)
def test_a_release_that_cannot_be_changes_nothing(clone: Path, version: str, says: str) -> None:
    """A wrong, older or tagged version, and a tree that is not clean, are one message."""
    git(clone, "tag", "v6.0.0")
    if version == "9.0.0":
        (clone / "new.py").touch()
    files = {path: path.read_bytes() for path in clone.iterdir() if path.is_file()}
    code, said = release(clone, version)
    assert code == 2 and says in said and "Traceback" not in said
    assert {path: path.read_bytes() for path in clone.iterdir() if path.is_file()} == files
    assert (git(clone, "tag"), git(clone, "log", "--format=%s")) == ("v6.0.0", "Begin")


def test_a_commit_that_is_refused_leaves_the_files_as_they_were(clone: Path) -> None:
    """As by a hook: no tag, and a clean tree."""
    hook = clone / ".git" / "hooks" / "pre-commit"
    hook.write_text("#!/bin/sh\necho no commits on Fridays\nexit 1\n")
    hook.chmod(0o755)
    code, said = release(clone, "7.8.9")
    assert code == 2 and "no commits on Fridays" in said
    assert not git(clone, "tag") and not git(clone, "diff", "HEAD")
