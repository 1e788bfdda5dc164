"""Every paragraph, list or table of the pages that has a speed, time, memory or ratio says where it comes from.

An HTML comment follows directly: `<!-- measured: COMMAND; commit HASH -->` (or `commits HASH, HASH`), or, of what was
not measured, `<!-- not measured: WHY -->`. `column "command"` as COMMAND means that the table itself names the command
of each row.
"""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.conftest import REPO
from tests.pages import DOCS, GENERATED, LOGS

PAGES = ["README.md", *(page for page in DOCS if page not in LOGS and page not in GENERATED)]
FIGURE = re.compile(
    r"\d\s*%|\d\s?(?:(?:clips|frames|videos|shards|keys|rows|seeds)/s|GMAC/s|[kMGTP]i?B(?:/s)?|[mu]?s|microseconds"
    r"|min(?:utes?)?|h(?:ours?)?|seconds?|times)\b"
    r"|\d \(\d[\d. ]*%? to \d"  # a median, the lowest and the highest
    r"|\A\|.*\b(?:seconds|clips/s|frames/s|times|speed|relative error|recall@\d+|MB|(?:,|CPU) m?s)\b.*\n"
)
MARK = re.compile(
    r"<!-- (?:measured: (?P<command>[^;\n]+); commits? (?P<commits>[0-9a-f]{7,40}(?:, [0-9a-f]{7,40})*)"
    r"|not measured: (?:setting|limit|estimate|cited)) -->\s*\Z"
)
COMMANDS = {"python", "pytest", "make", "p3d", "du", "column"}


def blocks(text: str) -> list[str]:
    """What blank lines separate, without the code blocks, where it has a figure."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return [block for block in re.split(r"\n\s*\n", prose) if FIGURE.search(re.sub(r"<!--.*?-->\n?", "", block))]


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_has_a_source(page: str) -> None:
    """What has a figure ends in a marker, and its command is of a known program."""
    found = [(block, MARK.search(block)) for block in blocks((REPO / page).read_text())]
    assert not [block for block, mark in found if mark is None], "no marker follows"
    commands = [mark["command"] for _, mark in found if mark and mark["command"]]
    words = [re.split(r"[ ,]", re.sub(r"^([A-Z0-9_]+=\S+ )+", "", command))[0] for command in commands]
    assert set(words) <= COMMANDS


def test_every_commit_is_in_the_history() -> None:
    """The commits of the markers are ancestors of this one, where git has the whole history."""
    git = ["git", "-C", str(REPO)]
    asked = subprocess.run([*git, "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, check=False)
    if asked.stdout.strip() != "false":
        pytest.skip("no git, or not its whole history")
    log = subprocess.run([*git, "log", "--format=%H"], capture_output=True, text=True, check=True).stdout.split()
    marks = [MARK.search(block) for page in PAGES for block in blocks((REPO / page).read_text())]
    named = {one for mark in marks if mark and mark["commits"] for one in mark["commits"].split(", ")}
    assert named and not {one for one in named if not any(commit.startswith(one) for commit in log)}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It took 3 s.\n", "no"),
        ("It took 3 s.\n\n<!-- measured: make bench; commit 0123abc -->\n", "no"),
        ("It took 3 s.\n<!-- measured: make bench -->\n", "no"),
        ("At most 3 s.\n<!-- not measured: hope -->\n", "no"),
        ("| a | seconds |\n|---|---|\n| b | 3 |\n", "no"),
        ("It took 3 s.\n<!-- measured: make bench; commit 0123abc -->\n", "yes"),
        ("At most 20 %.\n<!-- not measured: limit -->\n", "yes"),
        ("16 frames of 160x160, 3 videos.\n", None),
        ("```\n3 s\n```\n", None),
    ],
)
def test_the_patterns_find_what_they_should(text: str, found: str | None) -> None:
    """A figure without a marker directly after it, or with a wrong one, is found; no figure needs none."""
    expected = [] if found is None else [found == "yes"]
    assert [MARK.search(block) is not None for block in blocks(text)] == expected
