"""One schema for the users' own columns of all plans, so that videos/ is one table.

Plans may come from lists with different columns, or with different types for the same column. A column that a plan
lacks is null in its rows. Numbers get the wider type if no value changes by the cast; other mixed types become text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.errors import InputError


def own_fields(manifests: Iterable[Manifest]) -> list[pa.Field]:
    """The user's columns of all manifests, in the order in which they first appear, without metadata."""
    kinds: dict[str, set[pa.DataType]] = {}
    holders: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        for field in manifest.own_fields:
            kinds.setdefault(field.name, set()).add(field.type)
            holders.setdefault(field.name, []).append(manifest)
    return [
        pa.field(name, next(iter(found)) if len(found) == 1 else _common(name, holders[name]))
        for name, found in kinds.items()
    ]


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly the schema's columns: cast to their types, and null where the table lacks one."""
    if table.schema.equals(schema):
        return table
    have = set(table.column_names)
    columns = [
        _cast(table[field.name], field.type) if field.name in have else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def _common(name: str, manifests: list[Manifest]) -> pa.DataType:
    """A type that holds every value that the plans have in a column."""
    columns = [pa.chunked_array([chunk for rows in one.parts() for chunk in rows[name].chunks]) for one in manifests]
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
