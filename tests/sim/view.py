"""One process's access to the store of its world, with all its possible faults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from p3d.pipeline.dataset.commit import CREATE_TRIES
from p3d.pipeline.errors import StoreUnknown
from p3d.pipeline.storage.local import unless_swept
from p3d.pipeline.storage.store import EXISTS, Created, ObjectInfo, Store
from tests.sim.checked_store import CheckedStore
from tests.sim.world import World


class View(Store):
    """The store as seen by a process: requests and answers may be lost or late, and others may run in between."""

    def __init__(self, inner: CheckedStore, world: World) -> None:
        self.url, self.inner, self.world = inner.url, inner, world

    def _do(self, what: str, key: str, operation: Callable[[], Any], *, late: Callable[[], Any] | None = None) -> Any:
        world = self.world
        world.step(f"{what} {key}")
        if what not in ("creates", "looks for"):  # it gave up: later creates are new attempts
            world.current.notes.pop("tries", None)
        try:
            return self._happen(operation, late)
        except StoreUnknown:
            world.current.notes["beats"] = 0  # a run that could not read may not know of a newer one
            raise
        except AssertionError as error:
            world.fail(error)

    def _happen(self, operation: Callable[[], Any], late: Callable[[], Any] | None) -> Any:
        world = self.world
        if world.clock < world.out_until:
            world.fired["store outage"] += 1
            raise StoreUnknown("outage")
        if world.strikes("lost request"):
            raise StoreUnknown("request lost")
        if late is not None and world.strikes("delayed"):
            world.post(world.rng.choice((0.5, 5.0, 60.0, 600.0)), late)
            raise StoreUnknown("no answer yet")
        done = operation()
        if world.strikes("lost reply"):
            raise StoreUnknown("answer lost")
        return done

    def create(self, key: str, source: bytes | Path) -> Created:
        me, fired = self.world.current, self.world.fired
        last, tries = me.notes.get("tries", ("", 0))
        me.notes["tries"] = (key, tries + 1 if key == last else 1)
        if tries >= CREATE_TRIES and key == last:
            self.world.fail(AssertionError(f"I11: {me.name} tries {key} without end"))

        def now(content: bytes | Path, how: str) -> Created:
            created = self.inner.create(key, content)
            self.world.note(f"{how} {key}: {created} {len(self.inner.objects[key])}")
            if key.startswith("clips/"):
                if created == EXISTS:
                    fired["another commit is there"] += 1
                elif how == "late":
                    fired["commit arrives after its worker gave up"] += 1
                elif me.given_up:
                    fired["zombie commits"] += 1
            return created

        def late() -> None:
            if content is not None:
                now(content, "late")

        try:
            content = source.read_bytes() if isinstance(source, Path) else source
        except FileNotFoundError:  # swept by another run
            content = None
        return self._do("creates", key, lambda: now(source, "now"), late=late)

    def read(self, key: str) -> bytes:
        return self._do("reads", key, lambda: self.inner.read(key))

    def open(self, key: str) -> BinaryIO:
        return self._do("opens", key, lambda: self.inner.open(key))

    def head(self, key: str) -> ObjectInfo | None:
        return self._do("looks for", key, lambda: self.inner.head(key))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._do("lists", prefix, lambda: self.inner.list(prefix))

    def download(
        self, key: str, path: Path, *, etag: str | None = None, received: Callable[[int], object] | None = None
    ) -> None:
        path.write_bytes(self.read(key))

    def replace(self, key: str, content: bytes) -> None:
        notes = self.world.current.notes
        if key.startswith("_job/heartbeats/") and self.inner.superseded(int(key[-11:-5])):
            notes["beats"] = notes.get("beats", 0) + 1
        self._do(
            "replaces",
            key,
            lambda: self.inner.replace(key, content),
            late=lambda: self.inner.replace(key, content),
        )

    def delete(self, key: str) -> None:
        if key in self.inner.temps:
            self.world.fired["temporary file swept"] += 1
        self._do("deletes", key, lambda: self.inner.delete(key), late=lambda: self.inner.delete(key))

    def set_aside(self, key: str) -> str:
        raise AssertionError("nothing here repairs")

    @contextlib.contextmanager
    def temp_file(self) -> Iterator[Path]:
        me, inner = self.world.current, self.inner
        number = next(inner._temps)
        name = f"{number}-{number:032x}.tmp"
        inner.temps[f"_job/tmp/{name}"] = path = inner.scratch / name
        try:
            with unless_swept(path):
                yield path
        finally:
            if not me.dead:  # a dead process does not clean up
                path.unlink(missing_ok=True)
                inner.temps.pop(f"_job/tmp/{name}", None)
