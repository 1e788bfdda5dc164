"""Read a list of videos: its entries, ids and the user's own columns. No file is looked up here.

A text list has one path per line; a line that begins with `#` is a comment. A CSV, TSV, JSONL or Parquet list has the
paths in a column of LIST_COLUMNS. Paths and ids are always text: 007 stays 007. Text is UTF-8, or UTF-16 with a byte
order mark. Another encoding is never guessed.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from p3d.pipeline.dataset.schema import own_columns, read_parquet
from p3d.pipeline.errors import MALFORMED, InputError, counted, shell_words
from p3d.pipeline.types.versions import SCHEMA_VERSION

TABLE_EXTENSIONS = (".csv", ".tsv", ".jsonl", ".parquet")
LIST_EXTENSIONS = (".txt", *TABLE_EXTENSIONS)
LIST_COLUMNS = ("uri", "url", "path", "video", "file", "filename")
DELIMITERS = ",;"  # of a CSV; the first one with which the header has the column that is needed
SHOWN = 20  # bytes around the one that cannot be read


@dataclass(frozen=True, slots=True)
class FileList:
    """The content of a list. Bytes of a binary column that are not UTF-8 are surrogates, as in `os.fsdecode`."""

    entries: list[str]
    ids: pa.Array | None = None
    own: pa.Table | None = None


def read_list(source: str, content: bytes, id_column: str | None, texts: Collection[str] = ()) -> FileList:
    """Parse a list. InputError for an invalid one, naming the column or the line if one is wrong."""
    if not source.lower().endswith(TABLE_EXTENSIONS):
        return FileList([line for line in _lines(source, content) if not line.startswith("#")])
    table = read_table(source, content, lambda names: path_column(names) is not None, id_column, texts)
    if twice := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise InputError(f"{source} has more than one column named {twice[0]!r}; rename one")
    column = path_column(table.column_names)
    if column is None:
        raise InputError(
            f"{source} has no column of paths: rename one to any of {', '.join(LIST_COLUMNS)}. "
            f"It has {', '.join(table.column_names)[:200]}"
        )
    entries = [os.fsdecode(entry) if isinstance(entry, bytes) else entry for entry in table[column].to_pylist()]
    if missing := sum(not entry for entry in entries):
        raise InputError(f"{source}: {counted(missing, 'row')} without a path in column {column!r}; add or remove them")
    own = table.select([name for name in table.column_names if name not in (column, id_column)])
    if odd := [name for name in own.column_names if name in own_columns(SCHEMA_VERSION)]:
        raise InputError(f"{source}: columns {odd} have names that the dataset uses itself; rename them in the list")
    ids = None if id_column is None else _ids(source, table, id_column)
    return FileList([str(entry) for entry in entries], ids, own)


def line_numbers(source: str, content: bytes, n_entries: int) -> tuple[str, list[int]]:
    """("line", the line of each entry of a list), or ("row", 1 to N) of Parquet and where a row may have several lines.

    `n_entries` is the number of entries that `read_list` has found.
    """
    rows = list(range(1, n_entries + 1))
    if source.lower().endswith(".parquet"):
        return "row", rows
    text = utf8_of(source, content).decode().split("\n")
    numbers = [number for number, line in enumerate(text, 1) if line.strip()]
    if source.lower().endswith((".csv", ".tsv")):
        del numbers[:1]  # the header
    elif not source.lower().endswith(TABLE_EXTENSIONS):
        numbers = [number for number in numbers if not text[number - 1].startswith("#")]
    return ("line", numbers) if len(numbers) == n_entries else ("row", rows)


def read_ids(source: str, content: bytes, column: str) -> frozenset[str]:
    """The ids of a list: one per line, or in `column` of a CSV, TSV, JSONL or Parquet file.

    InputError for an empty list.
    """
    if source.lower().endswith(TABLE_EXTENSIONS):
        ids = _ids(source, read_table(source, content, lambda names: column in names, column), column).to_pylist()
    else:
        ids = _lines(source, content)
    if not ids:
        raise InputError(f"{source} contains no ids")
    return frozenset(ids)


def _lines(source: str, content: bytes) -> list[str]:
    """The lines that are not blank. Only a newline ends one, since a name may have any other character."""
    lines = utf8_of(source, content).decode().split("\n")
    return [line.removesuffix("\r") for line in lines if line.strip()]


def path_column(names: Iterable[str]) -> str | None:
    """The column of LIST_COLUMNS that has the paths; None without any."""
    names = set(names)
    return next((name for name in LIST_COLUMNS if name in names), None)


def read_table(
    source: str,
    content: bytes,
    has: Callable[[list[str]], bool],
    id_column: str | None,
    texts: Collection[str] = (),
) -> pa.Table:
    """The table of a list in any format but text, with inferred types for all columns except paths and ids (text).

    Of a CSV or TSV file, the columns `texts` are text, too: 001 and 1 are not one value. `has` says whether these are
    the columns that are needed. InputError for an invalid list. Two columns may have one name.
    """

    def types(names: list[str]) -> dict[str, pa.DataType]:
        as_text = (path_column(names), id_column, *texts)
        return {name: pa.string() for name in as_text if name is not None and name in names}

    try:
        if source.lower().endswith(".parquet"):
            return read_parquet(io.BytesIO(content))
        if source.lower().endswith(".jsonl"):
            return _read_jsonl(source, utf8_of(source, content).decode())
        return read_csv(source, content, has, types)
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from None


def read_csv(
    source: str,
    content: bytes,
    has: Callable[[list[str]], bool],
    types: Callable[[list[str]], dict[str, pa.DataType]],
    **convert: Any,
) -> pa.Table:
    """A CSV or TSV file. `has` says whether these are the columns that are needed, `types` has those not to infer.

    Columns are separated by tabs in a .tsv, else by the first of DELIMITERS with which the header has what is needed.
    """
    text = utf8_of(source, content)
    head = text.lstrip(b"\r\n").partition(b"\n")[0].decode().removesuffix("\r")

    def names_by(delimiter: str) -> list[str]:
        return next(csv.reader([head], delimiter=delimiter), [])

    allowed = "\t" if source.lower().endswith(".tsv") else DELIMITERS
    parse = pyarrow.csv.ParseOptions(delimiter=next((one for one in allowed if has(names_by(one))), allowed[0]))
    memory = pa.BufferOutputStream()
    memory.write(text)
    buffer = memory.getvalue()  # Arrow's threads must not hold a Python object (see `schema.open_parquet`)
    names = pyarrow.csv.open_csv(pa.BufferReader(buffer), parse_options=parse).schema.names
    options = pyarrow.csv.ConvertOptions(column_types=types(names), **convert)
    return pyarrow.csv.read_csv(pa.BufferReader(buffer), parse_options=parse, convert_options=options)


def _read_jsonl(source: str, text: str) -> pa.Table:
    """One JSON object per line. Columns are in the order in which they first appear; a row may lack some."""
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}, line {number} is not JSON ({error}); write one object per line") from None
        if not isinstance(row, dict):
            raise InputError(f'{source}, line {number} is not a JSON object; write one, as {{"path": "a.mp4"}}')
        rows.append(row)
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
            pq.write_table(pa.table({name: columns[name][:1]}), pa.BufferOutputStream())
        except (pa.ArrowException, *MALFORMED) as error:
            raise InputError(
                f"{source}: column {name!r} cannot be kept ({str(error)[:200]}); give its values one type"
            ) from None
    return pa.table(columns)


def utf8_of(source: str, content: bytes) -> bytes:
    """The text of a file as UTF-8 without a byte order mark. InputError, with the line, for another encoding."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            content = content.decode("utf-16").encode()
        except UnicodeError as error:
            raise InputError(f"{source} begins as UTF-16 and is not ({error}); save it as UTF-8") from None
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content:
        raise InputError(f"{source} contains NUL bytes, so it is not text in UTF-8; save it as UTF-8")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = max(content.rfind(b"\n", 0, error.start) + 1, error.start - SHOWN)
        shown = content[start : error.start + SHOWN].partition(b"\n")[0].decode("utf-8", "backslashreplace")
        raise InputError(
            f"{source}, line {line} is not UTF-8: {shown!r}. Convert it from its encoding, such as LATIN1: "
            f"`iconv -f LATIN1 -t UTF-8 {shell_words(source)} > NEW`. If a file name itself is not UTF-8, write it as "
            "file:///..., percent-encoded"
        ) from None
    return content


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
