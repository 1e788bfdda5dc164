"""Words that a newcomer would have to learn stay out of what people read, and out of names.

`codespell` holds single words (`tests/words/plain.txt`, in `make check`); these tests hold phrases and parts of names.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
READ = (".py", ".md", ".html", ".js", ".css", ".yaml", ".toml", ".txt", "Makefile", "Dockerfile")

ONE = (
    r"(clip|video|task|core|day|shard|frame|second|minute|hour|class|worker|node|job|batch|query|row|file|format"
    r"|device)\b"
)
# pattern of a phrase -> what to write
PHRASES = {
    r"\bslots?\b(?!=True)": "concurrent decodes, decode concurrency",
    r"\b(that|which|it|who|there) (is|are) none\b": "there is no ..., not a ...",
    r"\bis no (video|number|class|job|file|list|folder|P3D|MD5|terminal|error|failure|share|sign)\b": "is not a ...",
    r"\bare no (videos?|numbers?|classes|files?|MD5|errors?|attempts?)\b": "are not ...",
    r"\b(no|not a) number that is none\b": "NaN",
    r"\bnumbers? that (is|are) none\b": "NaN",
    r"\bat hand\b": "available, ready",
    r"\b(is|are|in|becomes?|as) (a|one) sentence\b": "one message, fails with an error",
    r"\bfor ever\b": "forever, without end",
    r"\bhalf way\b": "halfway",
    rf"\b(ms|s|seconds|minutes|MB|GB|kB|bytes|clips|videos|frames|shards|requests|rows|lines) an? {ONE}": "per",
    rf"\b(one|a|an) (task|folder|loader|thread|process|object|line|event|request|file|row) an? {ONE}": "one per",
    r"\btold apart\b": "distinguished",
    r"\b(decoded|made|run|embedded) apart\b": "in a child process",
    r"\bfrom clips to video\b": "Pool clip vectors into a video vector",
    r"\bno more(?= (is|are)\b)": "no longer",
}
# part of a name -> what to use
NAMES = {
    r"(?<!p)lane(?!t)": "inference_thread",
    r"parcel": "message_batch",
    r"spool": "listing_buffer",
    r"stripe": "chunk",
    r"knock": "connection probe",
    r"convict|innocent|blam(e|es|ed)(?![a-z])|suspect|verdict": "fail, attribute, retry alone, outcome",
    r"ordeal|witness|(?<![a-z])vain": "what it is",
    r"^(?!test_).*_(apart|away)$|^apart$": "child, remote",
    r"disposable": "skippable",
    r"likest|likeness": "most_similar, similarity",
    r"(?<![a-z])n_places|(?<![a-z])whole_places": "ticks",
}
# (file, pattern) -> why the words may stand there
ALLOWED: dict[tuple[str, str], str] = {
    ("CHANGELOG.md", r"\bslots?\b(?!=True)"): "names the JSON key that was renamed",
}


@cache
def files() -> list[str]:
    """What people read, and git knows, relative to the repository; not the lists of the words themselves."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    left_out = ("tests/words/", "docs/log/")
    return [
        name for name in listed if name.endswith(READ) and not name.startswith(left_out) and (REPO / name).is_file()
    ]


@cache
def tokens_of(name: str) -> list[tokenize.TokenInfo]:
    """The tokens of a Python file."""
    return list(tokenize.generate_tokens(io.StringIO((REPO / name).read_text()).readline))


@cache
def names_in(name: str) -> frozenset[str]:
    """The identifiers of a Python file."""
    return frozenset(token.string for token in tokens_of(name) if token.type == tokenize.NAME)


@cache
def prose_of(name: str) -> str:
    """What is read as text, on one line: all of a page, the comments and strings of a Python file."""
    if not name.endswith(".py"):
        return " ".join((REPO / name).read_text().split())
    read = [token.string.lstrip("#") for token in tokens_of(name) if token.type in (tokenize.COMMENT, tokenize.STRING)]
    return " ".join(" ".join(read).split())


@pytest.mark.parametrize("pattern", PHRASES)
def test_phrases_are_plain(pattern: str) -> None:
    """No text holds a phrase of the list."""
    found = [
        f"{name}: {match[0]!r}"
        for name in files()
        if (name, pattern) not in ALLOWED
        for match in re.finditer(pattern, prose_of(name), re.I)
    ]
    assert not found, f"write {PHRASES[pattern]}:\n" + "\n".join(found)


@pytest.mark.parametrize("pattern", NAMES)
def test_names_are_plain(pattern: str) -> None:
    """No identifier holds a coined word."""
    found = [
        f"{name}: {identifier}"
        for name in files()
        if name.endswith(".py") and (name, pattern) not in ALLOWED
        for identifier in sorted(names_in(name))
        if re.search(pattern, identifier, re.I)
    ]
    assert not found, f"use {NAMES[pattern]}:\n" + "\n".join(found)


def test_what_is_allowed_is_still_there() -> None:
    """An exception that is no longer needed goes."""
    for (name, pattern), why in ALLOWED.items():
        assert why and re.search(pattern, (REPO / name).read_text(), re.I), (name, pattern)
