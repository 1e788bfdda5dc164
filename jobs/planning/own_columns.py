"""The user's own columns of a list, compared with those of earlier plans of an output.

A video is planned again if the list has other values in these columns. Then its rows are computed again, because a row
belongs to one plan, and only the newest plan of a video counts. A column that the list does not have changes nothing: a
launch of the folder after that of a list plans no video again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset.plans import Manifest, rows_of
from p3d.pipeline.dataset.schema import own_columns
from p3d.pipeline.errors import InputError, escape
from p3d.pipeline.types.versions import SCHEMA_VERSION


def own_names(videos: pa.Table) -> list[str]:
    """The names of the user's own columns."""
    ours = own_columns(SCHEMA_VERSION)
    return [name for name in videos.column_names if name not in ours]


def values_of(videos: pa.Table, own: Sequence[str]) -> list[str]:
    """The values of each video in the columns `own` as text; null is as if absent."""
    here = [name for name in own if name in videos.column_names]
    rows = rows_of(videos.select(here)) if here else [{}] * videos.num_rows
    return [_text({name: value for name, value in row.items() if value is not None}) for row in rows]


def _text(row: dict[str, Any]) -> str:
    return json.dumps(row, sort_keys=True, default=str) if row else ""


def with_types_of(videos: pa.Table, plans: Sequence[Manifest]) -> pa.Table:
    """The table with the types of the newest plan that has each of the user's columns, and with all columns of plans.

    So the files in videos/ are one table. `plans` are in ascending order. A column without any value is text, since no
    other value could be cast to the type null later. InputError for a column whose values do not fit.
    """
    own_here = own_names(videos)
    types: dict[str, tuple[pa.DataType, int]] = {}
    for manifest in plans:
        own = (field for field in manifest.own_fields if not pa.types.is_null(field.type))
        types |= {field.name: (field.type, manifest.plan.seq) for field in own}
    for at, field in enumerate(videos.schema):
        if field.name not in own_here:
            continue
        new = pa.string() if pa.types.is_null(field.type) else field.type
        kind, seq = types.pop(field.name, (new, 0))
        if not kind.equals(field.type):
            videos = videos.set_column(at, field.name, _cast(videos[field.name], kind, field.name, seq))
    for name, (kind, _) in types.items():
        videos = videos.append_column(name, pa.nulls(videos.num_rows, kind))
    return videos


def _cast(column: pa.ChunkedArray, kind: pa.DataType, name: str, seq: int) -> pa.ChunkedArray:
    """The column in another type. InputError, with the first value that it does not hold, if one would change."""
    if pa.types.is_null(column.type):
        return pa.chunked_array([pa.nulls(len(column), kind)])
    try:
        made = pc.cast(column, kind)
        if _same(pc.cast(made, column.type), column):
            return made
    except pa.ArrowException:
        pass
    misfit = next((value for value in column.to_pylist() if not _fits(value, column.type, kind)), None)
    raise InputError(
        f"column {name!r} of the list is {column.type}, and plan {seq} of OUT has it as {kind}, which cannot hold "
        f"{escape(repr(misfit))[:80]}. Give it values of that type, or another name in the list"
    )


def _same(one: pa.ChunkedArray, other: pa.ChunkedArray) -> bool:
    """Are the values equal, where NaN equals NaN?"""
    return bool(one.equals(other)) or repr(one.to_pylist()) == repr(other.to_pylist())


def _fits(value: Any, kind: pa.DataType, other: pa.DataType) -> bool:
    try:
        one = pa.chunked_array([pa.array([value], kind)])
        return _same(pc.cast(pc.cast(one, other), kind), one)
    except (pa.ArrowException, ValueError):
        return False
