"""All videos of a dataset without their vectors, in memory: the table that the page searches.

It takes one pass over videos/ and failures/, with every check of `NewestRows`. Memory: columns and ids, some 450 bytes
per video (docs/page.md says how they were counted), and the vectors of at most MAP_ROWS videos. In a larger dataset
these are a sample, which is freed once the map is made. Legend: V rows, S of them on the map, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import as_stored
from p3d.pipeline.results.page.projection import Projection, project
from p3d.pipeline.results.sample import Reservoir
from p3d.pipeline.results.search import where as conditions_of
from p3d.pipeline.results.search.metrics import SLACK
from p3d.pipeline.results.search.where import Condition
from p3d.pipeline.types import BOOL, FLOAT32, INT64

MAP_ROWS = 20_000  # points of the map at most, a uniform sample: 164 MB of 2048 features, twice that while it is made
SUGGESTED = 30  # largest number of distinct values of a column that are suggested


@dataclass(frozen=True, slots=True)
class Column:
    """A column that conditions may name. `values` are all its values, if they are text and at most SUGGESTED."""

    name: str
    kind: str
    values: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Archive:
    """`rows` has the columns of videos/ except vectors, and those of failures/. Columns of the other table are null."""

    source: NewestRows | SnapshotRows
    rows: pa.Table
    at: dict[str, int]  # video_id -> row
    projection: Projection
    cluster_V: INT64  # -1 where a row is not on the map
    vectors_SD: FLOAT32 | None  # of the rows on the map, length 1; None if the map lacks some videos

    @property
    def n_failed(self) -> int:
        return int(pc.count(self.rows["reason"]).as_py())

    def row(self, video_id: str) -> dict[str, object] | None:
        """The columns of one video that are not null; None if there is no such video."""
        at = self.at.get(video_id)
        if at is None:
            return None
        (row,) = schema.records(self.rows.slice(at, 1))
        return {name: value for name, value in row.items() if value is not None}

    def find(
        self, text: str, where: Sequence[str | Condition] = (), cluster: int | None = None, failed: bool | None = None
    ) -> INT64:
        """Numbers of the rows whose path or id contains `text`, ignoring case, and that satisfy all other conditions.

        InputError if a condition is not valid.
        """
        found_V = self._has(as_stored(text))
        for condition in conditions_of.parse(where, self.rows.schema):
            found_V &= _numpy(condition.holds(self.rows))
        if cluster is not None:
            found_V &= self.cluster_V == cluster
        if failed is not None:
            found_V &= _numpy(pc.is_valid(self.rows["reason"])) == failed
        return np.flatnonzero(found_V)

    def _has(self, text: str) -> BOOL:
        if not text:
            return np.ones(self.rows.num_rows, bool)
        has = [pc.match_substring(self.rows[name], text, ignore_case=True) for name in ("path", "video_id")]
        return _numpy(pc.or_(*has))

    def likely(self, queries_QD: FLOAT32, wanted: int, where: Sequence[str | Condition]) -> frozenset[str] | None:
        """Ids that include the `wanted` videos nearest to any query by cosine; None without vectors.

        As in exact search, videos within the rounding error of the last one are included. InputError as in `find`.
        """
        if self.vectors_SD is None:
            return None
        units_DQ = (queries_QD / np.linalg.norm(queries_QD, axis=1, keepdims=True)).T
        near_S = (self.vectors_SD @ units_DQ).max(axis=1, initial=-np.inf)
        near_S[~np.isin(self.projection.rows_S, self.find("", where))] = -np.inf
        floor = np.partition(near_S, -wanted)[-wanted] - 2 * SLACK if len(near_S) > wanted else -np.inf
        likely_S = np.flatnonzero((near_S >= floor) & (near_S > -np.inf))
        return frozenset(self.rows["video_id"].take(self.projection.rows_S[likely_S]).to_pylist())

    def columns(self) -> tuple[Column, ...]:
        """The columns that conditions may name. As in search, those of failures/ are not included."""
        names = [one.name for one in self.source.schemas["videos"] if not pa.types.is_nested(one.type)]
        return tuple(Column(name, str(self.rows.schema.field(name).type), self._values(name)) for name in names)

    def _values(self, name: str) -> tuple[str, ...]:
        if not pa.types.is_string(self.rows.schema.field(name).type) or name in ("video_id", "path", "uri", "version"):
            return ()
        values = pc.unique(self.rows[name]).drop_null()
        return tuple(sorted(values.to_pylist())) if len(values) <= SUGGESTED else ()


def _numpy(mask: pa.ChunkedArray) -> BOOL:
    values: BOOL = mask.to_numpy()
    return np.asarray(values, bool).copy()


def read_archive(
    source: NewestRows | SnapshotRows,
    *,
    layout: str = "pca",
    on_step: Callable[[int, int], None] | None = None,
) -> Archive:
    """Read every video and failure once. `layout` is as in `project`. DamagedJob if a row is damaged."""
    dim = source.job.recipe.feature_dim
    sample, seen = Reservoir(np.random.default_rng(0), MAP_ROWS, dim), 0
    tables = [_plain(source.schemas[folder].empty_table()) for folder in ("videos", "failures")]
    for folder, table in source.rows(clips=False, on_step=on_step):
        if folder == "videos":
            numbers = pa.table({"row": np.arange(seen, seen + table.num_rows)})
            sample.add(schema.features_of(table["embedding"], dim), numbers)
        seen += table.num_rows
        tables.append(_plain(table))
    rows = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    rows_S = np.array([sample.keys[at][0] for at in range(sample.n)], np.int64)
    vectors_SD = sample.rows_SD[: sample.n]
    vectors_SD /= np.maximum(np.linalg.norm(vectors_SD, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    projection = project(rows_S, vectors_SD, layout)
    cluster_V = np.full(rows.num_rows, -1, np.int64)
    cluster_V[projection.rows_S] = projection.cluster_S
    at = {video_id: number for number, video_id in enumerate(rows["video_id"].to_pylist())}
    return Archive(source, rows, at, projection, cluster_V, vectors_SD if sample.n == sample.seen else None)


def _plain(table: pa.Table) -> pa.Table:
    """The table without vectors, and without schema metadata such as that of pandas."""
    kept = [one.name for one in table.schema if not pa.types.is_fixed_size_list(one.type)]
    return table.select(kept).replace_schema_metadata(None)
