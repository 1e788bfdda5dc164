"""A simulated disk that may lose unsynced data: it records a LocalStore's system calls and lists what may survive.

A power loss keeps or drops each change of a folder independently. Of an unsynced file it keeps nothing, a part or all,
in any combination. That is more than real file systems lose, but POSIX allows it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from p3d.pipeline.storage import local as store_module
from tests.sim.store import Died

FOLDER = "folder"
METHODS = ("write_bytes", "mkdir", "unlink", "replace", "rename")  # of Path
CALLS = ("mkdir", "unlink", "replace", "rename", "link", "open", "fsync", "close")  # of os


class Disk:
    """The folder `root` and the system calls on it. Each goes through `call`, which may raise instead."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root, self.calls = root, 0
        self.die_at = 0  # the process dies before this call
        self.fail_at, self.error, self.after = 0, OSError(), False  # or this call fails, before or after its effect
        self.failed = ""
        self.now: dict[str, Any] = {".": FOLDER}  # path -> FOLDER or a file's number
        self.durable: dict[str, Any] = {".": FOLDER}
        self.files: list[tuple[bytes, bool]] = []  # content, synced
        self.opened: dict[int, Path] = {}
        for name in METHODS:
            patch.setattr(Path, name, self._method(name, getattr(Path, name)))
        calls = {name: getattr(os, name) for name in dir(os) if not name.startswith("__")}
        calls |= {name: self._of_os(name) if name in METHODS else getattr(self, name) for name in CALLS}
        patch.setattr(store_module, "os", SimpleNamespace(**calls))

    # -- what happens

    def call(self, name: str, real: Callable[[], Any], seen: Callable[[], None], path: Path) -> Any:
        if not path.is_relative_to(self.root) and path != self.root.parent:
            return real()
        self.calls += 1
        if self.die_at and self.calls >= self.die_at:  # a dead process does nothing more, not even cleaning up
            raise Died
        fails = self.calls == self.fail_at
        if fails:
            self.failed = name
        if fails and not self.after:
            raise OSError(self.error.errno, self.error.strerror, str(path))
        done = real()
        seen()
        if fails:
            raise OSError(self.error.errno, self.error.strerror, str(path))
        return done

    def _method(self, name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def method(path: Path, *given: Any, **named: Any) -> Any:
            if name == "write_bytes":  # a file grows
                half = given[0][: len(given[0]) // 2]
                self.call(name, lambda: true(path, half), lambda: self._write_bytes(path, half), path)
            seen = getattr(self, f"_{name}")
            return self.call(name, lambda: true(path, *given, **named), lambda: seen(path, *given), path)

        return method

    def at(self, name: Any, folder: int | None) -> Path:
        """The path of a name in an open folder."""
        return Path(name) if folder is None else self.opened[folder] / name

    def _of_os(self, name: str) -> Callable[..., Any]:
        def call(*names: Any, dir_fd: int | None = None, **of: int) -> Any:
            folders = [of.get("src_dir_fd", dir_fd), of.get("dst_dir_fd")]
            paths = [self.at(one, folder) for one, folder in zip(names, folders, strict=False)]
            given = {"dir_fd": dir_fd} if dir_fd is not None else of
            seen = getattr(self, f"_{name}")
            return self.call(name, lambda: getattr(os, name)(*names, **given), lambda: seen(*paths), paths[0])

        return call

    def link(self, *names: Any, src_dir_fd: int | None = None, dst_dir_fd: int | None = None, **how: Any) -> None:
        source, target = self.at(names[0], src_dir_fd), self.at(names[1], dst_dir_fd)
        real = partial(os.link, *names, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, **how)
        self.call("link", real, lambda: self._link(source, target), target)

    def open(self, name: Any, flags: int, *, dir_fd: int | None = None) -> int:
        path = self.at(name, dir_fd)
        number: int = self.call("open", lambda: os.open(name, flags, dir_fd=dir_fd), lambda: None, path)
        self.opened[number] = path
        return number

    def fsync(self, number: int) -> None:
        path = self.opened[number]
        self.call("fsync", lambda: None, lambda: self._fsync(path), path)

    def close(self, number: int) -> None:
        path = self.opened.pop(number)
        self.call("close", lambda: os.close(number), lambda: None, path)

    def key(self, path: Path) -> str:
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else ".."

    def _write_bytes(self, path: Path, content: bytes) -> None:  # always of a new file here
        self.files.append((content, False))
        self.now[self.key(path)] = len(self.files) - 1

    def _mkdir(self, path: Path, *_: Any) -> None:
        self.now[self.key(path)] = FOLDER

    def _unlink(self, path: Path, *_: Any) -> None:
        self.now.pop(self.key(path), None)

    def _rename(self, path: Path, target: Path) -> None:
        self.now[self.key(target)] = self.now.pop(self.key(path))

    _replace = _rename

    def _link(self, source: Path, target: Path) -> None:
        self.now[self.key(target)] = self.now[self.key(source)]

    def _fsync(self, path: Path) -> None:
        key = self.key(path)
        if isinstance(self.now.get(key), int):
            self.files[self.now[key]] = (self.files[self.now[key]][0], True)
            return
        for name in self.now.keys() | self.durable.keys():
            if name != "." and str(Path(name).parent) == key:
                if name in self.now:
                    self.durable[name] = self.now[name]
                else:
                    del self.durable[name]

    # -- what may survive

    def after_power_loss(self) -> Iterator[dict[str, bytes]]:
        """Every possible content of the folder after a power loss, as path -> content of the file."""
        changed = sorted(k for k in self.now.keys() | self.durable.keys() if self.now.get(k) != self.durable.get(k))
        for kept in itertools.product((False, True), repeat=len(changed)):
            tree = dict(self.durable)
            for name, is_kept in zip(changed, kept, strict=True):
                value = self.now.get(name) if is_kept else self.durable.get(name)
                tree[name] = value
            found = {
                name: value
                for name, value in tree.items()
                if isinstance(value, int) and all(tree.get(str(up)) == FOLDER for up in Path(name).parents)
            }
            numbers = sorted(set(found.values()))
            choices = [parts(*self.files[number]) for number in numbers]
            for contents in itertools.product(*choices):
                content = dict(zip(numbers, contents, strict=True))
                yield {name: content[number] for name, number in found.items()}


def parts(content: bytes, synced: bool) -> tuple[bytes, ...]:
    """The possible contents of a file after a power loss."""
    return (content,) if synced else (b"", content[: len(content) // 2], content)
