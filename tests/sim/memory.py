"""Caches results of the real code, because thousands of lives write and read the same Parquet files.

The real code writes and reads every distinct content once per process. Without the cache Arrow would take nearly all
of the time.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.recipe import JobRecord, PlanRecord, Recipe

write_parquet, open_parquet = schema.write_parquet, schema.open_parquet
WRITTEN: dict[Any, bytes] = {}


def written(path: Path, table: pa.Table, footer: dict[str, str]) -> int:
    """The cached write_parquet; returns the number of bytes written."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    key = (sink.getvalue().to_pybytes(), tuple(footer.items()))
    if key not in WRITTEN:
        write_parquet(path, table, footer)
        WRITTEN[key] = path.read_bytes()
    else:
        path.write_bytes(WRITTEN[key])
    return len(WRITTEN[key])


class Opened:
    """A data file whose tables are read only once."""

    def __init__(self, content: bytes) -> None:
        self.file = open_parquet(io.BytesIO(content))
        self.metadata, self.schema_arrow = self.file.metadata, self.file.schema_arrow
        self.num_row_groups = self.file.num_row_groups
        self.read_row_group = lru_cache(self.file.read_row_group)
        self.tables: dict[tuple[str, ...], pa.Table] = {}

    def read(self, columns: list[str] | None = None, *, use_threads: bool) -> pa.Table:
        key = tuple(columns or ())
        if key not in self.tables:
            self.tables[key] = self.file.read(columns=columns, use_threads=use_threads)
        return self.tables[key]

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None: ...


_opened = lru_cache(maxsize=8192)(Opened)


def opened(source: Any) -> Opened:
    """The cached open_parquet."""
    content = source.read_bytes() if isinstance(source, Path) else source.read()
    return _opened(content)


def once(pure: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a pure function of hashable values."""
    return lru_cache(maxsize=4096)(pure)


job_record, plan_record = once(JobRecord.from_json), once(PlanRecord.from_json)
recipe_digest = property(once(Recipe.digest.fget))  # type: ignore[attr-defined] # of a property
outcomes_json, parse_outcomes = once(schema.outcomes_json), once(schema.parse_outcomes)
