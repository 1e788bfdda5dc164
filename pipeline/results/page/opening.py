"""An archive that is read in a thread while the page is already shown."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from p3d.pipeline.results.page.archive import Archive

OnStep = Callable[[str, int, int], None]


class StillReading(Exception):
    """What is asked for is not read yet: `done` of `count` shards are."""

    def __init__(self, what: str, done: int, count: int) -> None:
        super().__init__(what, done, count)
        self.step = {"what": what, "done": done, "of": count}


class Closed(Exception):
    """The page has ended, and so does the reading."""


class Opening:
    """Reads an archive in a thread. `read` gives it twice: without its map, then with it.

    `on_error` is called from the thread if that fails, with `error` set.
    """

    def __init__(self, read: Callable[[OnStep], Iterator[Archive]], on_step: OnStep | None = None) -> None:
        self.error: Exception | None = None
        self.on_error: Callable[[], object] = lambda: None
        self._read, self._on_step, self._closed = read, on_step, False
        self._step: tuple[str, int, int] = ("read", 0, 0)
        self._archive: Archive | None = None
        self._mapped = False
        self._thread = threading.Thread(target=self._work, name="archive", daemon=True)

    @classmethod
    def of(cls, archive: Archive) -> Opening:
        """The opening of an archive that was read before."""
        made = cls(lambda _: iter([archive, archive]))
        made._work()
        return made

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed = True

    def archive(self, *, mapped: bool = False) -> Archive:
        """The archive; with `mapped`, not before its map is there. StillReading, or the error of the reading."""
        if self.error is not None:
            raise self.error
        if self._archive is None or (mapped and not self._mapped):
            raise StillReading(*self._step)
        return self._archive

    def _work(self) -> None:
        try:
            archives = self._read(self._note)
            self._archive = next(archives)
            self._step = ("map", 0, 0)
            self._archive = next(archives)
            self._mapped = True
        except Closed:
            pass
        except Exception as error:  # noqa: BLE001 - it is raised again where the archive is asked for
            self.error = error
            self.on_error()

    def _note(self, what: str, done: int, count: int) -> None:
        if self._closed:
            raise Closed
        self._step = (what, done, count)
        if self._on_step is not None:
            self._on_step(what, done, count)
