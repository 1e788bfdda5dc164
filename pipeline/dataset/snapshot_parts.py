"""Rows -> DEST/<folder>/part-00000.parquet ...: files of bounded size; memory holds one large row group."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from p3d.pipeline.dataset.files import local_path, sha256_of
from p3d.pipeline.dataset.schema import open_parquet, parquet_writer
from p3d.pipeline.dataset.snapshot_record import FileRecord
from p3d.pipeline.errors import AlreadyRunning, StoreCorrupt
from p3d.pipeline.storage.local import writing
from p3d.pipeline.storage.store import EXISTS, Store

GROUP_BYTES = 64 * 1024**2  # of a row group in memory, which Arrow holds three times: 8k rows of 2048 float32
GROUP_ROWS = 16 * 1024  # with 2048 float16 each, they fill GROUP_BYTES too
FILE_BYTES = 1024**3


def create_file(store: Store, key: str, path: Path, n_rows: int | None) -> FileRecord:
    """Put a local file into the store. AlreadyRunning if its key holds something else."""
    record = FileRecord(key, sha256_of(path), path.stat().st_size, n_rows)
    if store.create(key, path) == EXISTS:  # perhaps by this very call: its first response may have been lost
        with local_path(store, key) as there:
            if sha256_of(there) != record.sha256:
                raise AlreadyRunning(f"{store.url}/{key} was made by another process meanwhile; choose another DEST")
    return record


class Parts:
    """Writes the rows of one folder as they arrive. A context manager: it removes its temporary files on exit.

    At least one file is made, so that a glob of the folder always finds a table. `finish` writes the last one.
    """

    def __init__(self, store: Store, folder: str, schema: pa.Schema) -> None:
        self.store, self.folder, self.schema = store, folder, schema
        self.files: list[FileRecord] = []
        self._waiting: list[pa.Table] = []
        self._rows = self._bytes = 0  # of the tables in _waiting
        self._open: tuple[Path, pq.ParquetWriter] | None = None
        self._open_rows = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, table: pa.Table) -> None:
        """Add rows. They, and the tables they are slices of, stay in memory until their row group is written."""
        while table.num_rows:
            fit = (GROUP_BYTES - self._bytes) * table.num_rows // max(1, table.nbytes)
            taken = table.slice(0, max(1, min(GROUP_ROWS - self._rows, fit)))
            self._waiting.append(taken)
            self._rows, self._bytes = self._rows + taken.num_rows, self._bytes + taken.nbytes
            if self._rows >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
                self._write_group()
            table = table.slice(taken.num_rows)

    def finish(self) -> None:
        """Write the remaining rows and close the last file."""
        if self._waiting or (self._open is None and not self.files):
            self._write_group()
        self._close_file()

    def _write_group(self) -> None:
        if self._open is not None and self._open[0].stat().st_size + self._bytes > FILE_BYTES:
            self._close_file()
        if self._open is None:
            path = self._stack.enter_context(self.store.temp_file())
            self._open = path, parquet_writer(path, self.schema)
            self._stack.callback(_abandon, self._open[1])
        path, writer = self._open
        with writing(path):
            group = pa.concat_tables([self.schema.empty_table(), *self._waiting])
            writer.write_table(group, row_group_size=max(1, self._rows))
        self._open_rows += self._rows
        self._waiting, self._rows, self._bytes = [], 0, 0

    def _close_file(self) -> None:
        if self._open is None:
            return
        path, writer = self._open
        with writing(path):
            writer.close()
            with open_parquet(path) as file:
                n_rows = file.metadata.num_rows
        if n_rows != self._open_rows:
            raise StoreCorrupt(f"{path}: what was written does not read back; is the disk failing?")
        self.files.append(create_file(self.store, f"{self.folder}/part-{len(self.files):05d}.parquet", path, n_rows))
        self._open, self._open_rows = None, 0
        self._stack.close()


def _abandon(writer: pq.ParquetWriter) -> None:
    with contextlib.suppress(OSError):  # close() writes a footer, which fails on a full disk
        writer.close()
