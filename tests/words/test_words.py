"""Words that a newcomer would have to learn stay out of what people read, and out of names.

`codespell` holds single words (`tests/words/plain.txt`, in `make check`); these tests hold phrases and parts of names.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent.parent
READ = (".py", ".md", ".html", ".js", ".css", ".yaml", ".toml", ".txt", "Makefile", "Dockerfile")

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
    r"\b(ms|s|seconds|minutes|MB|GB|kB|bytes|clips|videos|frames|shards|requests|rows|lines) an? "
    r"(clip|video|task|core|day|shard|frame|second|minute|hour|class|worker|node|job|batch|query|row|file|device|event)\b": "per",
    r"\b(one|a|an) (task|folder|loader|thread|process|object|line|event|request|file|row|module) an? "
    r"(clip|video|task|core|day|shard|frame|class|worker|node|job|batch|query|row|file|format|device|second)\b": "one ... per ...",
    r"\btold apart\b": "distinguished",
    r"\b(decoded|made|run|embedded) apart\b": "in a child process",
    r"\bfrom clips to video\b": "Pool clip vectors into a video vector",
    r"\bno more(?= (is|are)\b)": "no longer",
}
# part of a name -> what to use
NAMES = {
    r"lane(?!t)": "inference_thread",
    r"parcel": "message_batch",
    r"spool": "listing_buffer",
    r"stripe": "chunk",
    r"knock": "connection probe",
    r"convict|innocent|blam(e|es|ed)(?![a-z])|suspect|verdict": "fail, attribute, retry alone, outcome",
    r"ordeal|witness|(?<![a-z])vain": "what it is",
    r"(?<![a-z])(apart|away)(?![a-z])": "child, remote",
    r"disposable": "skippable",
    r"likest|likeness": "most_similar, similarity",
    r"(?<![a-z])n_places|(?<![a-z])whole_places": "ticks",
}
# (file, pattern) -> why the words may stand there
ALLOWED: dict[tuple[str, str], str] = {}


def files() -> list[Path]:
    """What people read, and git knows; not the list of the words themselves."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True
    )
    paths = [REPO / name for name in listed.stdout.splitlines() if name.endswith(READ)]
    return [
        path
        for path in paths
        if path.is_file() and path.parent != Path(__file__).parent and "docs/log" not in str(path)
    ]


def names_in(path: Path) -> set[str]:
    """The identifiers of a Python file."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    return {token.string for token in tokens if token.type == tokenize.NAME}


def prose_of(path: Path) -> str:
    """What is read as text: all of a page, the comments and strings of a Python file."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(token.string for token in tokens if token.type in (tokenize.COMMENT, tokenize.STRING))


@pytest.mark.parametrize("pattern", PHRASES)
def test_phrases_are_plain(pattern: str) -> None:
    """No text holds a phrase of the list."""
    found = [
        f"{path.relative_to(REPO)}: {match[0]!r}"
        for path in files()
        if (str(path.relative_to(REPO)), pattern) not in ALLOWED
        for match in re.finditer(pattern, " ".join(prose_of(path).split()), re.I)
    ]
    assert not found, f"write {PHRASES[pattern]}:\n" + "\n".join(found)


@pytest.mark.parametrize("pattern", NAMES)
def test_names_are_plain(pattern: str) -> None:
    """No identifier holds a coined word."""
    found = [
        f"{path.relative_to(REPO)}: {name}"
        for path in files()
        if path.suffix == ".py" and (str(path.relative_to(REPO)), pattern) not in ALLOWED
        for name in sorted(names_in(path))
        if re.search(pattern, name, re.I)
    ]
    assert not found, f"use {NAMES[pattern]}:\n" + "\n".join(found)


def test_what_is_allowed_is_still_there() -> None:
    """An exception that is no longer needed goes."""
    for (name, pattern), why in ALLOWED.items():
        assert why and re.search(pattern, (REPO / name).read_text(), re.I), (name, pattern)
