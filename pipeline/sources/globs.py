"""Patterns of paths below a source (`--include`, `--exclude`), and a pattern as a source (`'videos/**/*.mp4'`).

As in a `.gitignore` file: `*`, `?` and `[...]` match within one name, `**` any number of folders. A pattern without a
slash matches a name at any depth, another one is relative to the source. A folder that matches stands for all in it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from fnmatch import translate
from urllib.parse import unquote

from p3d.pipeline.errors import InputError

_MAGIC = re.compile(r"[*?[]")
_ANY_FOLDERS = "**"


class Globs:
    """Which paths below a source are wanted: those that a pattern of `include` matches, if any, and none of `exclude`.

    Falsy without patterns. `unmatched` are the patterns that have matched nothing so far.
    """

    def __init__(self, include: Iterable[str] = (), exclude: Iterable[str] = ()) -> None:
        self._include = {glob: _parts(glob) for glob in include}
        self._exclude = {glob: _parts(glob) for glob in exclude}
        self.unmatched = dict.fromkeys([*self._include, *self._exclude])

    def __bool__(self) -> bool:
        return bool(self._include or self._exclude)

    def keeps(self, path: str) -> bool:
        """Is the file at this path below the source wanted?"""
        return not self.excludes(path) and (not self._include or self._any(self._include, path))

    def excludes(self, path: str) -> bool:
        """Does a pattern of `exclude` match the file or folder?"""
        return self._any(self._exclude, path)

    def _any(self, globs: dict[str, list[re.Pattern[str] | None]], path: str) -> bool:
        found = [glob for glob, parts in globs.items() if _matches(parts, path.split("/"))]
        for glob in found:
            self.unmatched.pop(glob, None)
        return bool(found)


def _parts(glob: str) -> list[re.Pattern[str] | None]:
    """A pattern for each name of a path; None for `**`."""
    names = glob.removeprefix("./").rstrip("/").split("/")
    if not any(names) or ".." in names:
        raise InputError(f"the pattern {glob!r} matches nothing; write one for paths below SRC, such as 'talks/*.mp4'")
    if len(names) == 1:
        names = [_ANY_FOLDERS, *names]
    while len(names) > 1 and names[-1] == _ANY_FOLDERS:
        names.pop()  # a folder stands for all in it
    return [None if name == _ANY_FOLDERS else re.compile(translate(name)) for name in names if name]


def _matches(parts: list[re.Pattern[str] | None], names: list[str]) -> bool:
    if not parts:
        return True
    first, *rest = parts
    if first is None:
        return any(_matches(rest, names[at:]) for at in range(len(names) + 1))
    return bool(names and first.match(names[0])) and _matches(rest, names[1:])


def split_glob(source: str) -> tuple[str, str]:
    """The folder or prefix of a pattern that was given as a source, and the pattern below it; else the source and "".

    A local name that exists is no pattern, nor is an `s3://` URI without `*`, since keys may contain `?` and `[`.
    """
    if source.startswith("s3://"):
        found = re.search(r"\*", source)
    else:
        found = None if "://" in source or os.path.lexists(source) else _MAGIC.search(source)
    if found is None:
        return source, ""
    root, slash, _ = source[: found.start()].rpartition("/")
    if source.startswith("s3://") and not root.removeprefix("s3:/"):
        raise InputError(f"{source} has a pattern for its bucket; name the bucket")
    below = source[len(root) + len(slash) :]
    return root or slash or ".", f"/{unquote(below) if source.startswith('s3://') else below}"
