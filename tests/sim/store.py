"""A store in memory that records its history, and a wrapper that fails at a chosen operation."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from p3d.pipeline.errors import StoreMissing, StoreUnknown
from p3d.pipeline.storage.store import CREATED, EXISTS, Created, ObjectInfo, Store, aside_key, control_key

KINDS = ("before", "after", "crash before", "crash after")


class Died(BaseException):
    """The process has died; no code catches this."""


class MemoryStore(Store):
    """S3's guarantee in memory: an object appears complete, once, or not at all. `written` lists all changes."""

    def __init__(self) -> None:
        self.url = "memory"
        self.objects: dict[str, bytes] = {}
        self.written: list[tuple[str, str]] = []

    def create(self, key: str, source: bytes | Path) -> Created:
        content = source.read_bytes() if isinstance(source, Path) else source
        if key in self.objects:
            return EXISTS
        self.objects[key] = content
        self.written.append(("create", key))
        return CREATED

    def read(self, key: str) -> bytes:
        if key not in self.objects:
            raise StoreMissing(f"{key} does not exist")
        return self.objects[key]

    def open(self, key: str) -> BinaryIO:
        return io.BytesIO(self.read(key))

    def head(self, key: str) -> ObjectInfo | None:
        return ObjectInfo(key, len(self.objects[key]), 0) if key in self.objects else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return iter(
            [ObjectInfo(key, len(self.objects[key]), 0) for key in sorted(self.objects) if key.startswith(prefix)]
        )

    def download(
        self, key: str, path: Path, *, etag: str | None = None, received: Callable[[int], object] | None = None
    ) -> None:
        path.write_bytes(self.read(key))

    def replace(self, key: str, content: bytes) -> None:
        control_key(key)
        self.objects[key] = content
        self.written.append(("replace", key))

    def delete(self, key: str) -> None:
        control_key(key)
        if self.objects.pop(key, None) is not None:
            self.written.append(("delete", key))

    def set_aside(self, key: str) -> str:
        aside = aside_key(key)
        self.objects[aside] = self.objects.pop(key)
        self.written.append(("aside", key))
        return aside

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "object.tmp"


class FaultyStore(MemoryStore):
    """The same objects for a process whose nth operation fails; with `always`, all later ones fail too.

    before, after              the request, or its answer, is lost: StoreUnknown
    crash before, crash after  the process dies before or after the operation
    """

    def __init__(self, inner: MemoryStore, nth: int, kind: str, *, always: bool) -> None:
        self.url, self.objects, self.written = inner.url, inner.objects, inner.written
        self.nth, self.kind, self.always = nth, kind, always
        self.operations, self.fired = 0, 0

    def _do(self, operation: Callable[[], Any]) -> Any:
        self.operations += 1
        wrong = self.operations == self.nth or (self.always and self.operations > self.nth)
        if not wrong:
            return operation()
        self.fired += 1
        if self.kind.endswith("after"):
            operation()
        raise Died if self.kind.startswith("crash") else StoreUnknown(f"{self.kind} operation {self.operations}")

    def create(self, key: str, source: bytes | Path) -> Created:
        return self._do(lambda: super(FaultyStore, self).create(key, source))

    def read(self, key: str) -> bytes:
        return self._do(lambda: super(FaultyStore, self).read(key))

    def open(self, key: str) -> BinaryIO:
        return self._do(lambda: io.BytesIO(super(FaultyStore, self).read(key)))

    def head(self, key: str) -> ObjectInfo | None:
        return self._do(lambda: super(FaultyStore, self).head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._do(lambda: super(FaultyStore, self).list(prefix))

    def replace(self, key: str, content: bytes) -> None:
        return self._do(lambda: super(FaultyStore, self).replace(key, content))

    def delete(self, key: str) -> None:
        return self._do(lambda: super(FaultyStore, self).delete(key))

    def set_aside(self, key: str) -> str:
        return self._do(lambda: super(FaultyStore, self).set_aside(key))
