"""Read a text, CSV or Parquet list of videos: its entries, ids and the user's own columns. No file is looked up here.

A text list has one path per line. A CSV or Parquet list has the paths in a column of LIST_COLUMNS. Paths and ids are
always text: 007 stays 007.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from p3d.pipeline.dataset.schema import own_columns, read_parquet
from p3d.pipeline.errors import InputError
from p3d.pipeline.types.versions import SCHEMA_VERSION

LIST_EXTENSIONS = (".txt", ".csv", ".parquet")
LIST_COLUMNS = ("uri", "url", "path", "video", "file", "filename")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class FileList:
    """The content of a list. Bytes of an entry that are not UTF-8 are surrogates, as in `os.fsdecode`."""

    entries: list[str]
    ids: pa.Array | None = None
    own: pa.Table | None = None


def read_list(source: str, content: bytes, id_column: str | None) -> FileList:
    """Parse a list. InputError for an invalid one, naming the column if one is wrong."""
    if b"\0" in content and not source.lower().endswith(".parquet"):
        raise InputError(f"{source} contains NUL bytes, so it is not a list in UTF-8 (UTF-16?); save it as UTF-8")
    if source.lower().endswith(".txt"):
        lines = content.removeprefix(BYTE_ORDER_MARK).split(b"\n")
        return FileList([os.fsdecode(line.removesuffix(b"\r")) for line in lines if line.strip()])
    try:
        is_csv = source.lower().endswith(".csv")
        table = _read_csv(content, id_column) if is_csv else read_parquet(io.BytesIO(content))
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from None
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise InputError(f"{source} has more than one column named {twice[0]!r}; rename one")
    column = _path_column(table.column_names)
    if column is None:
        raise InputError(f"{source} has no column of paths: rename one to any of {', '.join(LIST_COLUMNS)}")
    entries = [os.fsdecode(entry) if isinstance(entry, bytes) else entry for entry in table[column].to_pylist()]
    if missing := sum(not entry for entry in entries):
        raise InputError(f"{source}: {missing} rows have no path in column {column!r}")
    own = table.select([name for name in table.column_names if name not in (column, id_column)])
    if odd := [name for name in own.column_names if name in own_columns(SCHEMA_VERSION)]:
        raise InputError(f"{source}: columns {odd} have names that the dataset uses itself; rename them in the list")
    ids = None if id_column is None else _ids(source, table, id_column)
    return FileList([str(entry) for entry in entries], ids, own)


def read_ids(source: str, content: bytes, column: str) -> frozenset[str]:
    """The ids of a list: one per line, or in `column` of a CSV or Parquet file. InputError for an empty list."""
    name = source.lower()
    try:
        if name.endswith(".csv"):
            ids = _ids(source, _read_csv(content, column), column).to_pylist()
        elif name.endswith(".parquet"):
            ids = _ids(source, read_parquet(io.BytesIO(content)), column).to_pylist()
        else:
            lines = content.removeprefix(BYTE_ORDER_MARK).decode().split("\n")
            ids = [line.removesuffix("\r") for line in lines if line.strip()]
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from None
    if not ids:
        raise InputError(f"{source} contains no ids")
    return frozenset(ids)


def _path_column(names: list[str]) -> str | None:
    return next((name for name in LIST_COLUMNS if name in names), None)


def _read_csv(content: bytes, id_column: str | None) -> pa.Table:
    """The table, with inferred types for all columns except those of paths (bytes) and ids (text)."""
    text = text_of(content)
    names = pyarrow.csv.open_csv(pa.BufferReader(text)).schema.names
    types = {_path_column(names): pa.binary(), id_column: pa.string()}
    options = pyarrow.csv.ConvertOptions(column_types={name: kind for name, kind in types.items() if name in names})
    return pyarrow.csv.read_csv(pa.BufferReader(text), convert_options=options)


def text_of(content: bytes) -> pa.Buffer:
    """A text file in Arrow's own memory, without a byte order mark, for a `pa.BufferReader`.

    Arrow's threads must not hold a Python object (see `schema.open_parquet`).
    """
    memory = pa.BufferOutputStream()
    memory.write(content.removeprefix(BYTE_ORDER_MARK))
    return memory.getvalue()


def _ids(source: str, table: pa.Table, id_column: str) -> pa.Array:
    if id_column not in table.column_names:
        raise InputError(f"{source} has no column {id_column!r}; it has {', '.join(table.column_names)}")
    try:
        ids = pc.cast(table[id_column], pa.string()).combine_chunks()
    except pa.ArrowException as error:
        raise InputError(f"{source}: column {id_column!r} cannot be used as ids: {error}") from None
    if ids.null_count or pc.any(pc.equal(pc.utf8_length(ids), 0)).as_py():
        raise InputError(f"{source}: some rows have no id in column {id_column!r}")
    return ids
