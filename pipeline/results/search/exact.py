"""Exact search: the rows nearest to one or several vectors, by reading every row once.

    NewestRows | SnapshotRows ──row groups──> scores in float32 ──candidates──> float64 ──> Hits

Each group is scored by one matrix product. Rows within `SLACK` of the worst kept score are scored again in float64 from
the stored numbers. So a row that is bit-equal to the query has exactly cosine 1 and distance 0. Hits of equal score are
in the order of path, id and clip, so the answer does not depend on shards or plans. Rows of small shards are gathered
into a group. Memory holds such a group, its scores, and the best rows so far. Legend: N rows of a group, Q query
vectors, P pairs of a row and a query, D feature dimension.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError
from p3d.pipeline.results.search import where as conditions_of
from p3d.pipeline.results.search.metrics import cosines, rule_of
from p3d.pipeline.results.search.options import Level
from p3d.pipeline.types import FLOAT32, FLOAT64

POOL = 1000  # best rows to find before near-duplicates are left out
SCORES = 4 * 1024**2  # scores (rows x queries) computed at a time, 16 MiB
FEW = 8  # queries whose products take less time without BLAS
PAIRS = 512  # pairs of a row and a query scored in float64 at a time
HIT_COLUMNS = "video_id path uri plan_seq clip_index start_frame end_frame start_s end_s duration_s".split()


@dataclass(frozen=True, slots=True, eq=False)
class Hit:
    """A row and how near it is: `score` is the cosine in [-1, 1], or the Euclidean distance.

    `query` is the number of the nearest query vector. A clip has frames [start_frame, end_frame) and seconds
    [start_s, end_s). For a video, `clip_index` and the frames are None, and the seconds cover all of it. `out` is the
    output that has the row if several were searched, else None.
    """

    score: float
    query: int
    video_id: str
    path: str
    uri: str
    plan_seq: int
    clip_index: int | None
    start_frame: int | None
    end_frame: int | None
    start_s: float
    end_s: float
    embedding_D: FLOAT32 = field(repr=False)
    out: str | None = None


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The nearest rows, best first; `n_rows` were compared in `seconds`.

    `cut_short`: so many of the POOL best rows were near-duplicates that there may be more hits. With an index,
    `n_indexed` is the number of rows in it, and `n_new` that of videos not in it yet, which were compared exactly.
    `warning` is that of the query: a file that could not be embedded in the precision of the rows.
    """

    hits: tuple[Hit, ...]
    n_rows: int
    seconds: float
    cut_short: bool = False
    n_indexed: int = 0
    n_new: int = 0
    warning: str | None = None


def nearest(
    source: NewestRows | SnapshotRows,
    queries_QD: FLOAT32,
    *,
    level: Level,
    metric: str = "cosine",
    top: int = 10,
    where: Iterable[str | conditions_of.Condition] = (),
    distinct: float | None = None,
    per_video: bool = False,
    only: frozenset[str] | None = None,
    skip: frozenset[str] = frozenset(),
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """The `top` rows nearest to any of the queries [Q, D].

    `where` are conditions on columns (`results.search.where`); for clips, also on columns of videos/. With `distinct`,
    a row whose cosine to the query or to a better row is at least that value is left out. With `per_video`, only the
    best row of each video counts. `only` and `skip` are as in `rows`. InputError if a condition is not valid;
    DamagedJob if a row is damaged.
    """
    started = time.monotonic()
    clips = level == "clip"
    if clips and not source.with_clips:
        raise InputError(f"the snapshot at {source.store.url} has no clips; search its videos, with --level video")
    direct, only = _split(source, where, level, only)
    best = _Best(queries_QD, metric, top if distinct is None else max(top, POOL), per_video and clips)
    waiting = _Waiting(best, direct, source.job.recipe.feature_dim)
    folder_of_level = "clips" if clips else "videos"
    for folder, table in source.rows(clips=clips, only=only, skip=skip, on_step=on_step):
        if folder == folder_of_level:
            waiting.add(table)
        if folder == "videos" and clips:
            waiting.names.append(table.select(["video_id", "uri"]))
    waiting.compare()
    hits, cut, n_rows = best.hits(), False, waiting.n_rows
    if distinct is not None:
        hits, cut = _distinct(hits, queries_QD, distinct, top, len(hits) == best.size < n_rows)
    return SearchResult(tuple(hits[:top]), n_rows, time.monotonic() - started, cut)


def merge(
    found: Sequence[tuple[str, SearchResult]], queries_QD: FLOAT32, *, metric: str, top: int, distinct: float | None
) -> SearchResult:
    """The results of several outputs, each with its URL, as the one of an output that has all rows.

    With `distinct` they must have been searched without it, for max(top, POOL) rows.
    """
    sign = -1 if rule_of(metric).largest else 1
    hits = [replace(hit, out=out) for out, one in found for hit in one.hits]
    hits.sort(key=lambda hit: (sign * hit.score, hit.path, hit.video_id, hit.clip_index or 0))
    n_rows, cut = sum(one.n_rows for _, one in found), False
    if distinct is not None:
        size = max(top, POOL)
        hits, cut = _distinct(hits[:size], queries_QD, distinct, top, size <= len(hits) and size < n_rows)
    return SearchResult(
        tuple(hits[:top]),
        n_rows,
        sum(one.seconds for _, one in found),
        cut,
        sum(one.n_indexed for _, one in found),
        sum(one.n_new for _, one in found),
        next((one.warning for _, one in found if one.warning), None),
    )


class _Waiting:
    """Rows of several small shards, which are compared together; `names` has the uris of the clips' videos."""

    def __init__(self, best: _Best, direct: tuple[conditions_of.Condition, ...], dim: int) -> None:
        self.names: list[pa.Table] = []
        self.n_rows = 0
        self._best, self._direct, self._dim, self._tables, self._held = best, direct, dim, list[pa.Table](), 0

    def add(self, table: pa.Table) -> None:
        self._tables.append(table)
        self._held += table.num_rows
        if self._held >= schema.ROW_GROUP_ROWS:
            self.compare()

    def compare(self) -> None:
        """Compare the rows that wait. The clips of a video come before its name."""
        if self._tables:
            rows = conditions_of.holding(self._direct, pa.concat_tables(self._tables))
            self._best.add(rows, schema.features_of(rows["embedding"], self._dim))
            self.n_rows += rows.num_rows
        if self.names:
            self._best.name(pa.concat_tables(self.names))
        self.names, self._tables, self._held = [], [], 0


def _split(
    source: NewestRows | SnapshotRows,
    where: Iterable[str | conditions_of.Condition],
    level: Level,
    only: frozenset[str] | None,
) -> tuple[tuple[conditions_of.Condition, ...], frozenset[str] | None]:
    """The conditions on the rows themselves, and the ids of `only` that satisfy those on columns of videos/."""
    own = source.schemas["clips" if level == "clip" else "videos"]
    every = conditions_of.parse(where, pa.unify_schemas([own.remove_metadata(), _plain(source.schemas["videos"], own)]))
    only = _planned(source, every, only)
    direct = tuple(one for one in every if one.column in own.names)
    of_videos = tuple(one for one in every if one.column not in own.names)
    if not of_videos:
        return direct, only
    ids: set[str] = set()
    for folder, table in source.rows(clips=False, only=only):
        if folder == "videos":
            ids.update(conditions_of.holding(of_videos, table)["video_id"].to_pylist())
    return direct, frozenset(ids)


def _planned(
    source: NewestRows | SnapshotRows, conditions: Iterable[conditions_of.Condition], only: frozenset[str] | None
) -> frozenset[str] | None:
    """The ids of `only` that can satisfy conditions of equality on an id or path, which the plans have."""
    for one in conditions:
        if one.compare is not pc.equal or one.column not in ("video_id", "path"):
            continue
        value = one.value.as_py()
        ids = frozenset([value]) if one.column == "video_id" else frozenset(source.find(value))
        if one.column == "path" and value in ids:  # found as an id, so other videos may have this path
            continue
        only = ids if only is None else only & ids
    return only


def _plain(videos: pa.Schema, own: pa.Schema) -> pa.Schema:
    """Columns of videos/ that the rows themselves do not have."""
    return pa.schema([one for one in videos if one.name not in own.names])


class _Best:
    """The `size` rows nearest to any query, of all rows added; with `per_video`, of the best row of each video."""

    def __init__(self, queries_QD: FLOAT32, metric: str, size: int, per_video: bool) -> None:
        # equal queries, as those of a still image, are merged into the first of them
        self._queries_QD, self._first_Q = np.unique(np.asarray(queries_QD, np.float32), axis=0, return_index=True)
        self._rule, self.size, self._per_video = rule_of(metric), size, per_video
        self._squares_Q = np.einsum("qd,qd->q", self._queries_QD, self._queries_QD)
        self._scaled_DQ = np.ascontiguousarray(self._rule.scaled(self._queries_QD).T)
        self._hits: list[tuple[float, Hit]] = []  # (nearness, hit), the nearest first

    def add(self, table: pa.Table, features_ND: FLOAT32) -> None:
        """Add the rows of a group with their vectors [N, D], in slices of at most SCORES scores."""
        step = max(1, SCORES // len(self._queries_QD))
        for first in range(0, table.num_rows, step):
            self._add(table.slice(first, step), features_ND[first : first + step])

    def _add(self, table: pa.Table, features_ND: FLOAT32) -> None:
        near_NQ, slack = self._near(features_ND)
        near_N, videos_N = near_NQ.max(axis=1), np.arange(len(near_NQ))
        if self._per_video:
            videos_N = table["video_id"].combine_chunks().dictionary_encode().indices.to_numpy()
        best_V = np.full(videos_N.max() + 1, -np.inf, np.float32)
        np.maximum.at(best_V, videos_N, near_N)
        floor = self._hits[-1][0] if len(self._hits) == self.size else -np.inf
        if len(best_V) > self.size:
            floor = max(floor, float(np.partition(best_V, -self.size)[-self.size]))
        rows_P, queries_P = np.nonzero(near_NQ >= np.maximum(floor, best_V[videos_N])[:, None] - slack)
        if not len(rows_P):
            return
        exact_P = np.concatenate(
            [
                self._exact(features_ND[rows_P[at : at + PAIRS]], self._queries_QD[queries_P[at : at + PAIRS]])
                for at in range(0, len(rows_P), PAIRS)
            ]
        )
        order_P = np.lexsort((self._first_Q[queries_P], -exact_P, rows_P))  # by row, its nearest query first
        first_P = np.flatnonzero(np.diff(rows_P[order_P], prepend=-1))
        chosen = order_P[first_P]
        chosen = chosen[np.argsort(-exact_P[chosen], kind="stable")]  # of equal clips of a video the first
        chosen = chosen[np.sort(np.unique(videos_N[rows_P[chosen]], return_index=True)[1])]
        if len(chosen) > self.size:  # with those that are as near as the last one
            chosen = chosen[exact_P[chosen] >= exact_P[chosen[self.size - 1]]]
        kept = table.select([name for name in HIT_COLUMNS if name in table.column_names])
        rows = kept.take(pa.array(rows_P[chosen])).to_pylist()
        for row, at in zip(rows, chosen.tolist(), strict=True):
            near = float(exact_P[at])
            query = int(self._first_Q[queries_P[at]])
            self._hits.append((near, _hit(row, self._rule.score(near), query, features_ND[rows_P[at]].copy())))
        self._hits.sort(key=lambda one: (-one[0], one[1].path, one[1].video_id, one[1].clip_index or 0))
        if self._per_video:
            best: dict[str, tuple[float, Hit]] = {}
            for one in self._hits:
                best.setdefault(one[1].video_id, one)
            self._hits = list(best.values())
        del self._hits[self.size :]

    def name(self, videos: pa.Table) -> None:
        """Set the uri of the hits of these videos. Rows of clips/ do not have it, and are read before their video."""
        wanted = pa.array([hit.video_id for _, hit in self._hits if not hit.uri], pa.string())
        if not len(wanted):
            return
        rows = videos.select(["video_id", "uri"]).filter(pc.is_in(videos["video_id"], wanted))
        uris = dict(zip(rows["video_id"].to_pylist(), rows["uri"].to_pylist(), strict=True))
        self._hits = [
            (near, hit if hit.uri else replace(hit, uri=uris.get(hit.video_id, ""))) for near, hit in self._hits
        ]

    def hits(self) -> list[Hit]:
        return [hit for _, hit in self._hits]

    def _near(self, features_ND: FLOAT32) -> tuple[FLOAT32, float]:
        """The nearness of each row to each query in float32, [N, Q], larger is nearer; and a bound of its error."""
        squares_N = np.einsum("nd,nd->n", features_ND, features_ND)
        near_NQ = _products(features_ND, self._scaled_DQ)
        return near_NQ, self._rule.finished(near_NQ, squares_N, self._squares_Q)

    def _exact(self, rows_PD: FLOAT32, queries_PD: FLOAT32) -> FLOAT64:
        """The nearness of pairs in float64, [P]."""
        return self._rule.exact(rows_PD.astype(np.float64), queries_PD.astype(np.float64))


def _products(features_ND: FLOAT32, scaled_DQ: FLOAT32) -> FLOAT32:
    """The products of rows and queries, [N, Q].

    For few queries without BLAS, whose threads wait actively for their next call, on cores that read the next rows.
    """
    if scaled_DQ.shape[1] > FEW:
        found_NQ: FLOAT32 = features_ND @ scaled_DQ
        return found_NQ
    near_QN = [np.einsum("nd,d->n", features_ND, np.ascontiguousarray(one_D)) for one_D in scaled_DQ.T]
    return np.stack(near_QN, axis=1)


def _hit(row: dict[str, Any], score: float, query: int, embedding_D: FLOAT32) -> Hit:
    return Hit(
        score=score,
        query=query,
        video_id=row["video_id"],
        path=row["path"],
        uri=row.get("uri", ""),
        plan_seq=row["plan_seq"],
        clip_index=row.get("clip_index"),
        start_frame=row.get("start_frame"),
        end_frame=row.get("end_frame"),
        start_s=row.get("start_s", 0.0),
        end_s=row["end_s"] if "end_s" in row else row["duration_s"],
        embedding_D=embedding_D,
    )


def _distinct(hits: Sequence[Hit], queries_QD: FLOAT32, cosine: float, top: int, more: bool) -> tuple[list[Hit], bool]:
    """At most `top` hits whose cosine to each query and better hit is below `cosine`; and whether more may exist."""
    taken = list(np.asarray(queries_QD, np.float64))
    kept: list[Hit] = []
    for hit in hits:
        mine_D = hit.embedding_D.astype(np.float64)
        if cosines(np.broadcast_to(mine_D, (len(taken), len(mine_D))), np.stack(taken)).max() >= cosine:
            continue
        kept.append(hit)
        taken.append(mine_D)
        if len(kept) == top:
            return kept, False
    return kept, more
