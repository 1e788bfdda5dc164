"""The rows of a long listing, on their way to a plan: Arrow in a temporary file, never millions of Python objects.

Threads write batches as pages of a listing arrive; read back, the batches stand in the order of their first rows and
lie in the file, mapped into memory, until somebody looks at them.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.types import VideoRef

FIELDS = [field for field in MANIFEST if field.name != "shard"]


def batch_of(rows: Sequence[VideoRef]) -> pa.RecordBatch:
    """The MANIFEST columns but `shard`."""
    columns = [pa.array([getattr(row, field.name) for row in rows], field.type) for field in FIELDS]
    return pa.record_batch(columns, schema=pa.schema(FIELDS))


class ListingBuffer:
    """Write from any thread, then take the table once."""

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp(prefix="p3d-listing-")
        self._file = os.fdopen(descriptor, "wb")
        self._writer = pa.ipc.new_file(self._file, pa.schema(FIELDS))
        self._firsts: list[str] = []
        self._lock = threading.Lock()
        self.n_rows = 0

    def write(self, rows: Sequence[VideoRef]) -> None:
        """One batch."""
        if not rows:
            return
        batch = batch_of(rows)
        with self._lock:
            self._writer.write_batch(batch)
            self._firsts.append(rows[0].uri)
            self.n_rows += len(rows)

    def table(self) -> pa.Table:
        """All rows. The file has no name any more, and is gone with the table."""
        self._writer.close()
        self._file.close()
        reader = pa.ipc.open_file(pa.memory_map(self._path))
        order = sorted(range(len(self._firsts)), key=self._firsts.__getitem__)
        self.close()
        return pa.Table.from_batches([reader.get_batch(at) for at in order], schema=pa.schema(FIELDS))

    def close(self) -> None:
        """Remove the file; may be repeated."""
        Path(self._path).unlink(missing_ok=True)

    def __enter__(self) -> ListingBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
