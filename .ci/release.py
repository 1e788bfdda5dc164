"""Make a release: `python3 .ci/release.py VERSION`, or `make release VERSION=1.2.3`. Pushes nothing.

Checks that the tree is clean and that CHANGELOG.md has entries below [Unreleased]. Then sets the version in
pyproject.toml, gives these entries the version and the date (UTC), commits both files, and tags the commit with the
entries as notes. Exits 2, with nothing changed, if something is in the way.
"""

from __future__ import annotations

import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG, PROJECT = ROOT / "CHANGELOG.md", ROOT / "pyproject.toml"
NUMBER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
SET = re.compile(r'^version = "([^"]*)"$', re.M)  # the first one is that of [project]
HEAD = "## [Unreleased]\n"


class Refused(Exception):
    """What is in the way of a release, and what to do."""


def git(*words: str, said: str = "") -> str:
    """The output of a git command with `said` as its input. Refused if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *words], input=said, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Refused(f"`git {words[0]}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


def entries(changelog: str) -> str:
    """What is below [Unreleased]. Refused if nothing is."""
    _, head, after = changelog.partition(HEAD)
    if not head:
        raise Refused(f"CHANGELOG.md has no line '{HEAD.strip()}'")
    found = re.split(r"^## ", after, maxsplit=1, flags=re.M)[0].strip()
    if not re.search(r"^- ", found, re.M):
        raise Refused("CHANGELOG.md has no entries below [Unreleased]; write what has changed, and commit it")
    return found


def check_version(version: str, now: str) -> None:
    """Refused unless `version` is of the form 1.2.3, not older than that of the project, and not tagged yet."""
    wanted, current = NUMBER.fullmatch(version), NUMBER.fullmatch(now)
    if wanted is None:
        raise Refused(f"{version!r} is not a version; give one such as 1.2.3 (make release VERSION=1.2.3)")
    if current and tuple(map(int, wanted.groups())) < tuple(map(int, current.groups())):
        raise Refused(f"{version} is older than {now}, the version in pyproject.toml")
    if git("tag", "--list", f"v{version}"):
        raise Refused(f"the tag v{version} exists; choose a higher version")


def release(version: str) -> str:
    """Write, commit and tag. The notes of the release. Refused."""
    if changed := git("status", "--porcelain"):
        raise Refused(f"the tree is not clean; commit or remove this first:\n{changed}")
    changelog, project = CHANGELOG.read_text(), PROJECT.read_text()
    now = SET.search(project)
    if now is None:
        raise Refused('pyproject.toml has no line `version = "..."`')
    check_version(version, now[1])
    notes = entries(changelog)
    try:
        PROJECT.write_text(SET.sub(f'version = "{version}"', project, count=1))
        today = datetime.now(UTC).date()
        CHANGELOG.write_text(changelog.replace(HEAD, f"{HEAD}\n## [{version}] - {today}\n", 1))
        git("commit", "--quiet", "--all", "--message", f"Release {version}")
    except BaseException:
        CHANGELOG.write_text(changelog)
        PROJECT.write_text(project)
        raise
    # not `strip`, for which the headings of the notes would be comments
    git("tag", "--annotate", "--cleanup=whitespace", "--file=-", f"v{version}", said=f"Release {version}\n\n{notes}\n")
    return notes


def main() -> int:
    """The command line."""
    version = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        print(release(version))
    except Refused as why:
        print(f"error: {why}", file=sys.stderr)
        return 2
    print(f"\ntagged v{version}; nothing was pushed. To publish it:  git push origin HEAD v{version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
