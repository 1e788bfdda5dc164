"""The rows of a long listing before they are planned: Arrow in a temporary file instead of millions of Python objects.

Threads write batches as the pages of a listing arrive. The table that is read back has the batches in the order of
their first rows. It is mapped into memory from the file, so its data is loaded only when it is used.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.storage.local import writing
from p3d.pipeline.types import VideoRef

FIELDS = [field for field in MANIFEST if field.name != "shard"]


def batch_of(rows: Sequence[VideoRef]) -> pa.RecordBatch:
    """The rows as a record batch: the MANIFEST columns except `shard`."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in FIELDS]
    return pa.record_batch(columns, schema=pa.schema(FIELDS))


class ListingBuffer:
    """Call `write` from any thread, then `table` once."""

    def __init__(self) -> None:
        with writing(Path(tempfile.gettempdir())):
            descriptor, self._path = tempfile.mkstemp(prefix="p3d-listing-")
        self._file = os.fdopen(descriptor, "wb")
        self._writer = pa.ipc.new_file(self._file, pa.schema(FIELDS))
        self._firsts: list[str] = []
        self._lock = threading.Lock()
        self.n_rows = 0

    def write(self, rows: Sequence[VideoRef]) -> None:
        """Append the rows as one batch."""
        if not rows:
            return
        batch = batch_of(rows)
        with self._lock, writing(Path(self._path)):
            self._writer.write_batch(batch)
            self._firsts.append(rows[0].uri)
            self.n_rows += len(rows)

    def table(self) -> pa.Table:
        """All rows. The file is unlinked here, and its space is freed together with the table."""
        with writing(Path(self._path)):
            self._writer.close()
            self._file.close()
        reader = pa.ipc.open_file(pa.memory_map(os.fsencode(self._path)))
        order = sorted(range(len(self._firsts)), key=self._firsts.__getitem__)
        self.close()
        return pa.Table.from_batches([reader.get_batch(at) for at in order], schema=pa.schema(FIELDS))

    def close(self) -> None:
        """Remove the file. May be called again."""
        Path(self._path).unlink(missing_ok=True)

    def __enter__(self) -> ListingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
