"""All videos of a dataset: the table that the page searches in memory, and their vectors in a mapped file.

It takes one pass over videos/ and failures/, with every check of `NewestRows`. Memory: columns, some 310 bytes per
video, measured by Arrow's pool; the vectors are in a temporary file (`results.vectors`). The map shows at most MAP_ROWS
videos. Legend: V rows, N of them with a vector, S of these on the map, Q query vectors, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import as_stored
from p3d.pipeline.results.page.projection import Projection, project
from p3d.pipeline.results.search import where as conditions_of
from p3d.pipeline.results.search.exact import SCORES
from p3d.pipeline.results.search.metrics import SLACK
from p3d.pipeline.results.search.where import Condition
from p3d.pipeline.results.vectors import VectorFile
from p3d.pipeline.types import BOOL, FLOAT32, INT64

INT8 = npt.NDArray[np.int8]

MAP_ROWS = 20_000  # points of the map at most, a uniform sample: 164 MB of 2048 features, twice, while it is made
MERGED = 256  # tables that become one while they are read
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
    units_ND: FLOAT32  # vectors of length 1, mapped
    rows_N: INT64  # the row of each vector
    projection: Projection
    cluster_V: INT8  # -1 where a row is not on the map

    @property
    def n_failed(self) -> int:
        return int(pc.count(self.rows["reason"]).as_py())

    def row(self, video_id: str) -> dict[str, object] | None:
        """The columns of one video that are not null; None if there is no such video."""
        at = pc.index(self.rows["video_id"], as_stored(video_id)).as_py()
        if at < 0:
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

    def likely(self, queries_QD: FLOAT32, wanted: int, where: Sequence[str | Condition]) -> frozenset[str]:
        """Ids that include the `wanted` videos nearest to any query by cosine.

        As in exact search, videos within the rounding error of the last one are included. InputError as in `find`.
        """
        units_DQ = (queries_QD / np.linalg.norm(queries_QD, axis=1, keepdims=True)).T
        near_N, step = np.empty(len(self.units_ND), np.float32), max(1, SCORES // units_DQ.shape[1])
        for at in range(0, len(near_N), step):
            near_N[at : at + step] = (self.units_ND[at : at + step] @ units_DQ).max(axis=1)
        allowed_V = np.zeros(self.rows.num_rows, np.bool_)
        allowed_V[self.find("", where)] = True
        near_N[~allowed_V[self.rows_N]] = -np.inf
        floor = np.partition(near_N, -wanted)[-wanted] - 2 * SLACK if len(near_N) > wanted else -np.inf
        likely_N = np.flatnonzero((near_N >= floor) & (near_N > -np.inf))
        return frozenset(self.rows["video_id"].take(self.rows_N[likely_N]).to_pylist())

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
    return with_map(read_rows(source, on_step=on_step), layout)


def read_rows(source: NewestRows | SnapshotRows, on_step: Callable[[int, int], None] | None = None) -> Archive:
    """`read_archive` without its map."""
    vectors, numbers, seen = VectorFile(source.job.recipe.feature_dim), [np.empty(0, np.int64)], 0
    merged = [_plain(source.schemas[folder].empty_table()) for folder in ("videos", "failures")]
    tables: list[pa.Table] = []
    for folder, table in source.rows(clips=False, on_step=on_step):
        if folder == "videos" and table.num_rows:
            vectors.add(table)
            numbers.append(np.arange(seen, seen + table.num_rows))
        seen += table.num_rows
        tables.append(_plain(table))
        if len(tables) == MERGED:  # thousands of small tables would take more memory than their values
            merged, tables = [*merged, _merged(tables)], []
    rows = _merged([*merged, *tables])
    cluster_V = np.full(rows.num_rows, -1, np.int8)
    units_ND = vectors.mapped()
    unmapped = project(np.empty(0, np.int64), np.empty((0, vectors.dim), np.float32))
    return Archive(source, rows, units_ND, np.concatenate(numbers), unmapped, cluster_V)


def with_map(archive: Archive, layout: str = "pca") -> Archive:
    """The archive with the map of its videos, or of a sample of them."""
    n, rng = len(archive.rows_N), np.random.default_rng(0)
    chosen_S = np.arange(n) if n <= MAP_ROWS else np.sort(rng.choice(n, MAP_ROWS, replace=False))
    projection = project(archive.rows_N[chosen_S], np.array(archive.units_ND[chosen_S]), layout)
    cluster_V = archive.cluster_V.copy()
    cluster_V[projection.rows_S] = projection.cluster_S
    return replace(archive, projection=projection, cluster_V=cluster_V)


def _merged(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables, promote_options="permissive").combine_chunks()


def _plain(table: pa.Table) -> pa.Table:
    """The table without vectors, and without schema metadata such as that of pandas."""
    kept = [one.name for one in table.schema if not pa.types.is_fixed_size_list(one.type)]
    return table.select(kept).replace_schema_metadata(None)
