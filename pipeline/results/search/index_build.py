"""Builds an index of a dataset, or adds new rows to it, in at most two passes over the rows.

    pass 1   new rows ──> their number, a sample to train on, a sample to measure the recall with
    pass 2   new rows ──> the index; all rows ──> the exact neighbours of the sample, for the recall

Memory: the index itself, TRAIN_BYTES of vectors to train on, and one row group. Legend: N rows of a group, S rows of
the sample, D feature dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import InputError, StoreUnknown
from p3d.pipeline.results.sample import Reservoir, keys_of
from p3d.pipeline.results.search.index import IndexRecord, current, opened, read_record
from p3d.pipeline.results.search.index import search as search_index
from p3d.pipeline.results.search.index_cache import IndexFolder, for_faiss, name_old_index
from p3d.pipeline.results.search.metrics import rule_of
from p3d.pipeline.results.search.options import Level
from p3d.pipeline.types import BOOL, FLOAT32

TRAIN_BYTES = 512 * 1024**2
TRAIN_ROWS_PER_LIST = 39  # with fewer, FAISS's k-means warns that the centroids are unreliable
CODES = 256  # centroids of each part of a product quantizer, which needs as many rows to train on
MOST_LISTS = 4096
GOOD_RECALL = 0.95  # recall at which `nprobe` is not increased further
LITTLE_GAIN = 0.005  # gain of recall below which `nprobe` is not increased further
NEIGHBOURS = 10
TIED = 40  # rows kept that may be as near as the tenth neighbour
EQUAL = 1e-6  # scores that differ by less are equal, such as those of copies of one video
GIB = 1024**3
BY_SIZE = (("flat", GIB // 4), ("ivf", 2 * GIB), ("sq8", 16 * GIB))  # up to these bytes of float32 vectors; above: pq

OnStep = Callable[[str, int, int], None]


def build_index(
    source: NewestRows | SnapshotRows,
    *,
    level: Level,
    metric: str,
    kind: str | None = None,
    sample: int = 100,
    threads: int = 1,
    rebuild: bool = False,
    seed: int = 0,
    on_step: OnStep | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> IndexRecord:
    """Build this user's index of a dataset, or add the rows that are not in it yet. Returns its record.

    `kind` is flat, ivf, sq8 or pq; None chooses one by BY_SIZE. Without `rebuild`, an existing index keeps its kind.
    Of two builds at once, one waits (`say`) and adds what is then missing. InputError if there are no rows, or too few
    for the kind; StoreFull, StoreDenied.
    """
    import faiss

    faiss.omp_set_num_threads(threads)
    name_old_index(source.store)
    with IndexFolder.of(source, level, metric).building(say):
        return _built(source, level, metric, kind, sample, rebuild, seed, on_step)


def _built(
    source: NewestRows | SnapshotRows,
    level: Level,
    metric: str,
    kind: str | None,
    sample: int,
    rebuild: bool,
    seed: int,
    on_step: OnStep | None,
) -> IndexRecord:
    """As `build_index`, while the folder is locked."""
    if level == "clip" and not source.with_clips:
        raise InputError(f"the snapshot at {source.store.url} has no clips; index its videos, with --level video")
    before = None if rebuild else read_record(source, level, metric)
    if before is not None and kind not in (None, before.kind):
        raise InputError(f"the index at {source.store.url} is of kind {before.kind}; give --rebuild for another")
    if before is not None and set(source.pieces) <= set(before.pieces):
        return before
    passes = _Passes(source, level, metric, on_step)
    known = frozenset(before.pieces if before else ())
    rng = np.random.default_rng(seed)
    train, drawn = (
        Reservoir(rng, max(1, TRAIN_BYTES // (4 * passes.dim)), passes.dim),
        Reservoir(rng, sample, passes.dim),
    )
    for table, vectors_ND in passes.rows("sampled", known):
        if before is None:
            train.add(vectors_ND)
        drawn.add(vectors_ND, table)
    if not drawn.seen and before is None:
        raise InputError(f"{source.store.url} has no rows to index yet: `p3d status {source.store.words()}` says why")
    if before is None:
        record, index = _trained(passes, train, kind)
        tables = []
    else:
        with opened(source, before, mapped=False) as (index, rows):
            tables = [rows]
        record = before
    exact = _Exact(drawn.rows_SD[: drawn.n], [drawn.keys[at] for at in range(drawn.n)], metric)
    for table, vectors_ND in passes.rows("indexed", known):
        exact.add(table, vectors_ND)
        index.add(vectors_ND)
        tables.append(table)
    if known and drawn.n:
        for table, vectors_ND in passes.rows("compared", frozenset(source.pieces) - known):
            exact.add(table, vectors_ND)
    rows = pa.concat_tables(tables)
    record = replace(record, n_rows=rows.num_rows, pieces=source.pieces, sample=drawn.n)
    record = _measured(record, index, exact, rows, current(source, rows))
    return _written(source, record, index, rows)


@dataclass(slots=True)
class _Passes:
    """Passes over the rows of one level, as an index needs them: key columns, and vectors prepared for the metric."""

    source: NewestRows | SnapshotRows
    level: Level
    metric: str
    on_step: OnStep | None

    @property
    def dim(self) -> int:
        return self.source.job.recipe.feature_dim

    def rows(self, what: str, skip: frozenset[str]) -> Any:
        """(key columns, vectors [N, D]) of each row group."""
        keys = ["video_id", "plan_seq", *(["clip_index"] if self.level == "clip" else [])]
        wanted, on_step = f"{self.level}s", self.on_step and partial(self.on_step, what)
        for folder, table in self.source.rows(clips=self.level == "clip", skip=skip, on_step=on_step):
            if folder == wanted and table.num_rows:
                vectors_ND = schema.features_of(table["embedding"], self.dim)
                yield table.select(keys).combine_chunks(), rule_of(self.metric).indexed(vectors_ND)


@dataclass(slots=True)
class _Exact:
    """The exact nearest neighbours of a sample of rows among all rows added, without the sampled rows themselves."""

    sample_SD: FLOAT32
    keys_S: list[tuple[Any, ...]]
    metric: str
    _best: list[list[tuple[float, tuple[Any, ...]]]] = field(default_factory=list)

    def add(self, table: pa.Table, vectors_ND: FLOAT32) -> None:
        if not len(self.keys_S):
            return
        near_SN = self.sample_SD @ vectors_ND.T
        rule_of(self.metric).of_index(near_SN, vectors_ND)
        k = min(TIED, len(vectors_ND))
        top_SK = np.argpartition(-near_SN, k - 1, axis=1)[:, :k]
        keys = dict(zip(np.unique(top_SK).tolist(), keys_of(table, np.unique(top_SK)), strict=True))
        self._best = self._best or [[] for _ in self.keys_S]
        for one, best in enumerate(self._best):
            best += [
                (-float(near_SN[one, at]), keys[at]) for at in top_SK[one].tolist() if keys[at] != self.keys_S[one]
            ]
            best.sort(key=lambda found: found[0])
            worst = best[NEIGHBOURS - 1][0] + EQUAL if len(best) >= NEIGHBOURS else math.inf
            self._best[one] = [found for found in best[:TIED] if found[0] <= worst]

    @property
    def has_neighbours(self) -> bool:
        """Is there a neighbour to find? A dataset of one row has none."""
        return any(self._best)

    def recall(self, found: list[list[tuple[Any, ...]]]) -> float:
        """The share of the exact neighbours that were found. Any of the rows as near as the tenth counts."""
        there = sum(
            len({key for _, key in best}.intersection(mine)) for best, mine in zip(self._best, found, strict=True)
        )
        return there / max(1, sum(min(NEIGHBOURS, len(best)) for best in self._best))


def _trained(passes: _Passes, train: Reservoir, kind: str | None) -> tuple[IndexRecord, Any]:
    """A record, and an empty index trained on the sample. If `kind` is None, the number of rows decides it."""
    import faiss

    n_rows, dim, train_TD = train.seen, passes.dim, train.rows_SD[: train.n]
    kind = kind or next((name for name, most in BY_SIZE if 4 * dim * n_rows <= most), "pq")
    nlist = 0
    if kind != "flat":
        nlist = max(1, min(math.isqrt(n_rows), len(train_TD) // TRAIN_ROWS_PER_LIST, MOST_LISTS))
    if kind == "pq" and len(train_TD) < CODES:
        raise InputError(f"an index of kind pq needs {CODES} rows to train on, and there are {n_rows}; use flat")
    parts = max(number for number in (1, 2, 4, 8, 16, 32, 64, 128) if dim % number == 0)
    # np: no polysemous training, which is not used here and takes a second for each part
    codec = {"flat": "Flat", "ivf": "Flat", "sq8": "SQ8", "pq": f"PQ{parts}np"}[kind]
    factory = codec if kind == "flat" else f"IVF{nlist},{codec}"
    index = faiss.index_factory(dim, factory, getattr(faiss, rule_of(passes.metric).faiss))
    if kind != "flat":
        index.cp.min_points_per_centroid = 1  # no warning from FAISS if the dataset has few rows
        if kind == "pq":
            index.pq.cp.min_points_per_centroid = 1
        index.train(train_TD)
    record = IndexRecord(
        recipe_digest=passes.source.job.recipe.digest,
        level=passes.level,
        metric=passes.metric,
        kind=kind,
        factory=factory,
        n_rows=0,
        nlist=nlist,
        nprobe=max(1, nlist // 16) if nlist else 0,
        recall_at_10=None,
        sample=0,
        pieces=(),
        created_at="",
        faiss=metadata.version("faiss-cpu"),
    )
    return record, index


def _measured(record: IndexRecord, index: Any, exact: _Exact, rows: pa.Table, allowed_N: BOOL) -> IndexRecord:
    """The record with its recall, and with `nprobe` doubled until the recall is good or hardly grows."""
    if not record.sample or not exact.has_neighbours:
        return replace(record, sample=0)
    recall, nprobe = -1.0, 1
    while True:
        _, found_SK = search_index(index, record, exact.sample_SD, NEIGHBOURS + 1, allowed_N, nprobe=nprobe)
        found = [
            [key for key in keys_of(rows, mine[mine >= 0]) if key != own][:NEIGHBOURS]
            for mine, own in zip(found_SK, exact.keys_S, strict=True)
        ]
        before, recall = recall, exact.recall(found)
        if not record.nlist:
            return replace(record, recall_at_10=recall)
        if recall >= GOOD_RECALL or 2 * nprobe > record.nlist or (nprobe >= 16 and recall - before < LITTLE_GAIN):
            return replace(record, recall_at_10=recall, nprobe=nprobe)
        nprobe *= 2


def _written(source: NewestRows | SnapshotRows, record: IndexRecord, index: Any, rows: pa.Table) -> IndexRecord:
    """Write both files, then the record that names them, then remove files that it no longer names."""
    import faiss

    folder = IndexFolder.of(source, record.level, record.metric)

    def write(path: Path) -> None:
        with for_faiss(path) as named:
            faiss.write_index(index, named)

    try:
        vectors = folder.new_file("faiss", write)
    except RuntimeError as error:  # FAISS says no more than that it could not write
        raise StoreUnknown(f"the index could not be written to {folder.path}; is the disk full? ({error})") from None
    rows_file = folder.new_file("parquet", lambda path: schema.write_parquet(path, rows, {}))
    now = datetime.now(UTC).isoformat(timespec="seconds")
    record = replace(record, vectors=vectors, rows=rows_file, created_at=now)
    folder.keep(record.to_json(), {vectors.name, rows_file.name})
    return record
