"""A FAISS index of a dataset, kept in this user's cache (`index_cache.py`): its record, and search with it.

An index only proposes rows; every hit and score is read from the dataset. Rows that are newer than the index are
searched exactly, so a growing dataset costs time but no hits. `index_build.py` makes an index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import DamagedJob, InputError
from p3d.pipeline.results.search import where as conditions_of
from p3d.pipeline.results.search.exact import POOL, SearchResult, nearest
from p3d.pipeline.results.search.index_cache import CachedFile, IndexFolder, for_faiss, name_old_index
from p3d.pipeline.results.search.metrics import rule_of
from p3d.pipeline.results.search.options import Level
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, FLOAT32, INT64

SCHEMA_VERSION = 2
KINDS = ("flat", "ivf", "sq8", "pq")
RESCORED = {"flat": 1, "ivf": 1, "sq8": 2, "pq": 4}  # x `top` rows are scored exactly, as these kinds round vectors


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """An index of `pieces` of the dataset. A search visits `nprobe` of its `nlist` lists (0 if it has no lists).

    `recall_at_10` is the share of the ten exact nearest neighbours that the index finds, over `sample` rows; None if
    nothing was compared.
    """

    recipe_digest: str
    level: Level
    metric: str
    kind: str
    factory: str
    n_rows: int
    nlist: int
    nprobe: int
    recall_at_10: float | None
    sample: int
    pieces: tuple[str, ...]
    created_at: str
    faiss: str
    vectors: CachedFile | None = None  # None only while it is built
    rows: CachedFile | None = None

    def to_json(self) -> bytes:
        return (json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n").encode()


def read_record(source: NewestRows | SnapshotRows, level: str, metric: str) -> IndexRecord | None:
    """The record of this user's index of the dataset; None if there is no index. DamagedJob, InputError."""
    folder = IndexFolder.of(source, level, metric)
    try:
        folder.refuse_shared()
        given = json.loads(folder.record.read_bytes())
        if (version := given.pop("schema_version")) != SCHEMA_VERSION:
            raise ValueError(f"it is of version {str(version)[:20]}, and this program reads version {SCHEMA_VERSION}")
        vectors, rows = (_file_of(folder, given.pop(name), name) for name in ("vectors", "rows"))
        return IndexRecord(**{**given, "pieces": tuple(given["pieces"])}, vectors=vectors, rows=rows)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedJob(f"{folder.record} cannot be read ({error}). {_remedy(source.store, level, metric)}") from None


def _file_of(folder: IndexFolder, given: dict[str, Any], name: str) -> CachedFile:
    made = CachedFile(**{**given, "mark": tuple(given["mark"])})
    if not folder.is_ours(made.name, {"vectors": "faiss", "rows": "parquet"}[name]):
        raise ValueError(f"{made.name!r} is not a name of an index")
    return made


def nearest_by_index(
    source: NewestRows | SnapshotRows,
    queries_QD: FLOAT32,
    *,
    level: Level,
    metric: str = "cosine",
    top: int = 10,
    where: Iterable[str | conditions_of.Condition] = (),
    distinct: float | None = None,
    per_video: bool = False,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """`nearest` over the videos that the index proposes, and those that are not in it yet.

    InputError if there is no index of this dataset in the cache, DamagedJob if it cannot be read.
    """
    started = time.monotonic()
    record = read_record(source, level, metric)
    if record is None:
        name_old_index(source.store)
        made_by = _command(source.store, level, metric)
        raise InputError(f"your cache has no index of the {level}s of {source.store.url} by {metric}: run `{made_by}`")
    where = tuple(where)
    of_ids, others = _conditions(source, where)
    ids = _ids_where(source, others)
    n_rows = RESCORED[record.kind] * top if distinct is None else POOL
    try:
        videos = _proposed(source, record, queries_QD, n_rows, per_video, of_ids, ids)
    except DamagedJob:
        newer = read_record(source, level, metric)
        if newer in (None, record):
            raise
        record = newer  # a build has just replaced the files
        videos = _proposed(source, record, queries_QD, n_rows, per_video, of_ids, ids)
    new = frozenset(_videos_in(source, frozenset(record.pieces)))
    found = nearest(
        source,
        queries_QD,
        level=level,
        metric=metric,
        top=top,
        where=where,
        distinct=distinct,
        per_video=per_video,
        only=videos | new,
        on_step=on_step,
    )
    return dataclasses.replace(found, seconds=time.monotonic() - started, n_indexed=record.n_rows, n_new=len(new))


def _videos_in(source: NewestRows | SnapshotRows, known: frozenset[str]) -> Iterator[str]:
    """The videos of all pieces except the `known` ones."""
    if known.issuperset(source.pieces):
        return
    for folder, table in source.rows(clips=False, skip=known):
        if folder == "videos":
            yield from table["video_id"].to_pylist()


def _conditions(
    source: NewestRows | SnapshotRows, where: tuple[str | conditions_of.Condition, ...]
) -> tuple[tuple[conditions_of.Condition, ...], tuple[conditions_of.Condition, ...]]:
    """The conditions on video_id, which the rows of an index have, and those that need a pass over videos/."""
    try:
        conditions = conditions_of.parse(where, source.schemas["videos"])
    except InputError as error:
        raise InputError(f"{error}. An index is filtered by columns of videos/ alone: leave out --index") from None
    of_ids = tuple(one for one in conditions if one.column == "video_id")
    return of_ids, tuple(one for one in conditions if one.column != "video_id")


def _ids_where(
    source: NewestRows | SnapshotRows, conditions: tuple[conditions_of.Condition, ...]
) -> frozenset[str] | None:
    """The videos that satisfy the conditions, by a pass over videos/; None without conditions."""
    if not conditions:
        return None
    ids: set[str] = set()
    for folder, table in source.rows(clips=False):
        if folder == "videos":
            ids.update(conditions_of.holding(conditions, table)["video_id"].to_pylist())
    return frozenset(ids)


def _proposed(
    source: NewestRows | SnapshotRows,
    record: IndexRecord,
    queries_QD: FLOAT32,
    n_rows: int,
    per_video: bool,
    of_ids: tuple[conditions_of.Condition, ...],
    among: frozenset[str] | None,
) -> frozenset[str]:
    """The videos of the `n_rows` current rows that the index finds nearest to any query.

    With `per_video`, it is asked again without the videos found so far, until there are `n_rows` of them.
    """
    videos: set[str] = set()
    with opened(source, record) as (index, rows):
        allowed_N = current(source, rows, among)
        for condition in of_ids:
            allowed_N &= condition.holds(rows).to_numpy()
        sign = -1 if rule_of(record.metric).largest else 1
        while allowed_N.any():
            scores_QK, found_QK = search(index, record, queries_QD, min(n_rows, record.n_rows), allowed_N)
            order = np.argsort(sign * scores_QK, axis=None, kind="stable")
            found = found_QK.ravel()[order]
            first = list(dict.fromkeys(found[found >= 0].tolist()))[:n_rows]
            newly = rows["video_id"].take(pa.array(first, pa.int64()))
            videos.update(newly.to_pylist())
            if not per_video or not first or len(videos) >= n_rows:
                break
            allowed_N &= ~pc.is_in(rows["video_id"], newly).to_numpy()
        return frozenset(videos)


@contextlib.contextmanager
def opened(
    source: NewestRows | SnapshotRows, record: IndexRecord, *, mapped: bool = True
) -> Iterator[tuple[Any, pa.Table]]:
    """The FAISS index, and the rows of its vectors. DamagedJob if either is not the file in the record.

    A `mapped` index can only be searched, and only the lists that a search visits are loaded.
    """
    import faiss

    folder = IndexFolder.of(source, record.level, record.metric)
    try:
        assert record.vectors is not None and record.rows is not None, "an index that is being built"
        path, rows_path = record.vectors.check(folder.path), record.rows.check(folder.path)
        with for_faiss(path) as named:
            index = faiss.read_index(named, faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mapped else 0)
        with schema.open_parquet(rows_path) as file:
            rows = file.read(use_threads=False)
        if not index.ntotal == rows.num_rows == record.n_rows:
            raise ValueError(f"it holds {index.ntotal} vectors for {record.n_rows} rows")
    except (RuntimeError, ValueError, OSError, pa.ArrowException) as error:
        remedy = _remedy(source.store, record.level, record.metric)
        raise DamagedJob(
            f"the index of {source.store.url} in {folder.path} cannot be used: {error}. {remedy}"
        ) from None
    if record.nlist:
        faiss.extract_index_ivf(index).nprobe = record.nprobe
    yield index, rows


def search(
    index: Any, record: IndexRecord, queries_QD: FLOAT32, k: int, allowed_N: BOOL | None, *, nprobe: int | None = None
) -> tuple[FLOAT32, INT64]:
    """FAISS's scores and row numbers, [Q, k]; -1 if it found fewer. `allowed_N` says which rows may be found."""
    import faiss

    selector = None
    if allowed_N is not None and not allowed_N.all():
        selector = faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))
    if record.nlist:
        settings = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe or record.nprobe)
    else:
        settings = faiss.SearchParameters(sel=selector)
    scores_QK, rows_QK = index.search(rule_of(record.metric).indexed(queries_QD), k, params=settings)
    return scores_QK, rows_QK


def current(source: NewestRows | SnapshotRows, rows: pa.Table, among: frozenset[str] | None = None) -> BOOL:
    """Which rows of an index are current: from the newest plan that names their video, which must be in `among`."""
    ids = rows["video_id"].combine_chunks().dictionary_encode()
    names = ids.dictionary.to_pylist()
    codes_N = ids.indices.to_numpy()
    wanted: BOOL = np.fromiter((among is None or name in among for name in names), bool, len(names))[codes_N]
    if isinstance(source, SnapshotRows):
        return wanted
    newest = source.newest.find(ids.dictionary)[0]
    holds: BOOL = wanted & (newest[codes_N] == rows["plan_seq"].to_numpy())
    return holds


def _command(store: Store, level: str, metric: str) -> str:
    return f"p3d results index {store.words()} --level {level} --metric {metric}"


def _remedy(store: Store, level: str, metric: str) -> str:
    return f"`{_command(store, level, metric)} --rebuild` makes it again"
