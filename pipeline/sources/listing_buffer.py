"""The rows of a long listing before they are planned: Arrow in files instead of millions of Python objects.

    pages of a listing --write--> a file for each process that has listed --table--> rows, mapped from the files

Threads list parts side by side, and each page says of which part it is. A buffer with a folder of its own is kept after
a kill: a later listing of the same source reads how far each part had come (`before`), and continues there, in another
file. An Arrow stream that was cut is read up to its last whole batch, so nothing is synced.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.errors import MALFORMED, InputError
from p3d.pipeline.storage.local import is_private, make_private, writing
from p3d.pipeline.types import VideoRef

FIELDS = [field for field in MANIFEST if field.name != "shard"]
KEPT_S = 24 * 3600.0  # after which a listing that was interrupted is started again
ABOUT = b"p3d.page"  # in the metadata of a batch
SUFFIX = ".arrows"
PARTS = "parts.json"
SOME = 1000  # names of other files that are kept of a page, and of all that an earlier process has listed


def batch_of(rows: Sequence[VideoRef]) -> pa.RecordBatch:
    """The rows as a record batch: the MANIFEST columns except `shard`."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in FIELDS]
    return pa.record_batch(columns, schema=pa.schema(FIELDS))


@dataclass(slots=True)
class Progress:
    """How far a part of a listing has come: the last key, and the files that were not videos, some of them by name."""

    last: str = ""
    done: bool = False
    n_rows: int = 0
    n_others: int = 0
    others: list[str] = field(default_factory=list)


class ListingBuffer:
    """Call `write` from any thread, but for each part from one thread at a time; then `table` once.

    `kept` is a private folder for this listing alone. If it cannot be used, or another process has it, the rows are in
    a temporary folder and are not kept.
    """

    def __init__(self, kept: Path | None = None) -> None:
        self._stack = contextlib.ExitStack()
        self._open: tuple[BinaryIO, Any] | None = None  # the file, and what writes Arrow to it
        self._lock = threading.Lock()
        self.n_rows = 0
        self.parts: list[str] | None = None  # of the listing, if an earlier process has found them
        self.before: dict[str, Progress] = {}  # of each part, by an earlier process
        self.is_kept = kept is not None and self._holds(kept)
        if self.is_kept:
            assert kept is not None
            self._folder = kept
            self._continue()
        else:
            with writing(Path(tempfile.gettempdir())):
                self._folder = Path(tempfile.mkdtemp(prefix="p3d-listing-"))

    def _holds(self, kept: Path) -> bool:
        """Lock the folder until the process ends, or `close`. False if that fails."""
        try:
            make_private(kept)
            lock = self._stack.enter_context(kept.with_name(f"{kept.name}.lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return is_private(kept)
        except OSError:
            return False

    def _continue(self) -> None:
        """Read what an earlier process has listed. It is removed if that was long ago, or before this machine started.

        Nothing was synced, so after a power failure the files may hold anything.
        """
        try:
            record = json.loads((self._folder / PARTS).read_bytes())
            parts, fresh = list(map(str, record["parts"])), time.time() - float(record["began"]) < KEPT_S
            if record["boot"] != boot_id() or not fresh:
                raise ValueError("it is too old")
        except (OSError, *MALFORMED):
            self.forget()
            with writing(self._folder):
                make_private(self._folder)
            return
        self.parts, left = parts, SOME  # names of other files that are still kept
        for path in self._files():
            for batch, about in _batches(path):
                others = about.get("others", [])[:left]
                left -= len(others)
                _add(self.before.setdefault(str(about["part"]), Progress()), batch.num_rows, about, others)
        self.n_rows = sum(found.n_rows for found in self.before.values())

    def split(self, parts: Sequence[str]) -> None:
        """All that is of no part has been written, and these parts follow. Before this call, a kill keeps nothing."""
        self.parts = list(parts)
        if self.is_kept:
            with writing(self._folder):
                path = self._folder / f"{PARTS}.part"
                path.write_text(json.dumps({"parts": self.parts, "began": time.time(), "boot": boot_id()}))
                path.replace(self._folder / PARTS)

    def write(self, rows: Sequence[VideoRef], part: str = "", last: str = "", others: Sequence[str] = ()) -> None:
        """Append one page: its videos, its last key, and the names of its other files."""
        about = {"part": part, "last": last, "n_others": len(others), "others": others[:SOME]}
        self._append(batch_of(rows), about)

    def end(self, part: str) -> None:
        """A part is complete."""
        self._append(batch_of([]), {"part": part, "done": True})

    def _append(self, batch: pa.RecordBatch, about: dict[str, object]) -> None:
        with self._lock, writing(self._folder):
            if self._open is None:
                path = self._folder / f"{len(self._files()):06d}{SUFFIX}"
                sink: BinaryIO = self._stack.enter_context(path.open("xb"))
                self._open = sink, pa.ipc.new_stream(sink, pa.schema(FIELDS))
            sink, writer = self._open
            writer.write_batch(batch, custom_metadata={ABOUT: json.dumps(about)})
            sink.flush()
            self.n_rows += batch.num_rows

    def _files(self) -> list[Path]:
        """The files in the order in which they were begun: each process writes one, as maps into memory are few."""
        return sorted(self._folder.glob(f"*{SUFFIX}"))

    def table(self) -> pa.Table:
        """All rows, in the order of the first rows of their batches. The files may be removed while it is used."""
        if self._open is not None:
            sink, writer = self._open
            with writing(self._folder):
                writer.close()
                sink.close()
        found = [batch for path in self._files() for batch, _ in _batches(path) if batch.num_rows]
        if (n_read := sum(batch.num_rows for batch in found)) != self.n_rows:
            raise InputError(
                f"{n_read} of {self.n_rows} listed videos can be read back from {self._folder}: were files removed or "
                "damaged there? Remove that folder, and give the same command again"
            )
        found.sort(key=lambda batch: str(batch["uri"][0].as_py()))
        if not self.is_kept:
            self.close()
        return pa.Table.from_batches(found, schema=pa.schema(FIELDS))

    def forget(self) -> None:
        """Remove the rows, also those that are kept."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """Close the files, and remove those that are not kept. May be called again."""
        self._stack.close()
        if not self.is_kept:
            self.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def boot_id() -> str:
    """What changes when this machine starts; empty where that is not known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    return ""


def _add(progress: Progress, n_rows: int, about: dict[str, Any], others: list[str]) -> None:
    progress.n_rows += n_rows
    progress.last = about.get("last") or progress.last
    progress.done = progress.done or bool(about.get("done"))
    progress.n_others += about.get("n_others", 0)
    progress.others += others


def _batches(path: Path) -> Iterator[tuple[pa.RecordBatch, dict[str, Any]]]:
    """The whole batches of a file, with what they say of themselves. Nothing of a file that cannot be read."""
    with contextlib.suppress(pa.ArrowException, OSError, StopIteration, *MALFORMED):
        reader = pa.ipc.open_stream(pa.memory_map(os.fsencode(path)))
        if not reader.schema.equals(pa.schema(FIELDS)):
            return
        while True:
            batch, metadata = reader.read_next_batch_with_custom_metadata()
            yield batch, json.loads(metadata[ABOUT])
