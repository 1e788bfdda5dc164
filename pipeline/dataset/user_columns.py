"""One schema for the users' own columns of all plans, so that videos/ is one table.

Plans may come from lists with different columns, or with different types for the same column. A column that a plan
lacks is null in its rows. Numbers get the wider type if no value changes by the cast; other mixed types become text.
"""

from __future__ import annotations

import contextlib

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset.schema import own_columns
from p3d.pipeline.errors import InputError


def own_fields(manifests: list[pa.Table], version: int) -> list[pa.Field]:
    """The user's columns of all manifests, in the order in which they first appear, without metadata."""
    ours = own_columns(version)
    names = [name for table in manifests for name in table.column_names if name not in ours]
    return [
        pa.field(name, _common(name, [table[name] for table in manifests if name in table.column_names]))
        for name in dict.fromkeys(names)
    ]


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns: cast to their types, and null where the table lacks one."""
    have = set(table.column_names)
    columns = [
        _cast(table[field.name], field.type) if field.name in have else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _common(name: str, columns: list[pa.ChunkedArray]) -> pa.DataType:
    """A type that holds every value of all columns."""
    wanted = [pa.schema([pa.field(name, column.type)]) for column in columns]
    candidates: list[pa.DataType] = [pa.string()]
    with contextlib.suppress(pa.ArrowException):
        candidates.insert(0, pa.unify_schemas(wanted, promote_options="permissive").field(0).type)
    for candidate in candidates:
        try:
            for column in columns:
                _cast(column, candidate)
        except pa.ArrowException:
            continue
        return candidate
    kinds = sorted({str(column.type) for column in columns})
    raise InputError(f"column {name!r} is {' and '.join(kinds)} in different plans, and no one type holds them all")


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column if column.type.equals(kind) else pc.cast(column, kind)
