"""The pages of the documentation: which there are, and the code blocks in them.

The words after ``` say what a block is, as GitHub shows only the first:

    ```sh             commands that run in tests/test_how_to.py, or in a test of their page (`RUN_ELSEWHERE`)
    ```sh WHAT        commands that cannot run here, for want of WHAT: their options are parsed by the real program
    ```console        a session of such commands, each after `$ `, with what they print; its page has a test
    ```python, sql    code that a test runs
    ```bash, zsh ...  lines for the configuration of that shell; tests/jobs/test_help.py runs those of bash
    ```yaml           settings for another tool: they are parsed
    ```text           no code: what a command prints, files of a folder
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.conftest import REPO

DOCS = sorted(str(path.relative_to(REPO)) for path in (REPO / "docs").rglob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *DOCS]
LOGS = [page for page in DOCS if page.startswith("docs/log/")]
GENERATED = [page for page in DOCS if "Generated from the code by `make docs`" in (REPO / page).read_text()]
WITH_CODE = ["README.md", "docs/tutorial.md", *(page for page in DOCS if page.startswith("docs/how-to/"))]
SHELLS = {"bash", "zsh", "fish"}
LACKING = {"gpu", "s3", "cluster", "network", "browser", "labels", "make"}  # what a block may need that is not here


@dataclass(frozen=True)
class Block:
    """A code block: the page, the words after its fence, and its text."""

    page: str
    kind: str
    text: str

    @property
    def language(self) -> str:
        return self.kind.partition(" ")[0]

    @property
    def lacks(self) -> set[str]:
        return set(self.kind.split()[1:])

    def lines(self) -> list[str]:
        """The commands of a block of shell: comments are left out, and continued lines joined."""
        whole = [line for line in self.text.replace("\\\n", " ").splitlines() if line.strip()]
        if self.language == "console":
            whole = [line.removeprefix("$ ") for line in whole if line.startswith("$ ")]
        return [line for line in whole if not line.lstrip().startswith("#")]

    def p3d_words(self) -> Iterator[list[str]]:
        """The words of each `p3d` command, without variables before it and without `p3d`."""
        for line in self.lines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z0-9_]+=\S*", words[0]):
                words = words[1:]
            if words[:1] == ["p3d"]:
                yield words[1:]


def prose(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", (REPO / page).read_text(), flags=re.S | re.M)


def blocks(page: str) -> list[Block]:
    """The code blocks of a page, in order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", (REPO / page).read_text(), re.S | re.M)
    return [Block(page, kind.strip(), text) for kind, text in found]
