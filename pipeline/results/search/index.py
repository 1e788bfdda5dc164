"""An index beside the dataset: what it is, and search by it.

    OUT/_job/index/clip-cosine.json               the record, replaced last: readers see the old index or the new, whole
    OUT/_job/index/clip-cosine-<8 hex>.faiss      the vectors, as FAISS writes them
    OUT/_job/index/clip-cosine-<8 hex>.parquet    the rows they are of, in order: video_id, plan_seq [, clip_index]

An index holds no data of its own: it proposes rows, and every hit and score is read from the dataset. Rows that came
after it was made are searched exactly, so that growth costs time and no hits. `indexing.py` makes one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.files import local_path
from p3d.pipeline.dataset.newest import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import DamagedJob, InputError, OtherRecipe, StoreMissing
from p3d.pipeline.results.search import where as conditions_of
from p3d.pipeline.results.search.exact import POOL, Level, Metric, SearchResult, nearest
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, FLOAT32, INT64

FOLDER = "_job/index/"
SCHEMA_VERSION = 1
KINDS = ("flat", "ivf", "sq8", "pq")
RESCORED = {"flat": 1, "ivf": 1, "sq8": 2, "pq": 4}  # times `top` rows are read again, for the kind's rough scores


@dataclass(frozen=True, slots=True)
class IndexRecord:
    """What an index is of: `pieces` of the dataset. `nprobe` of `nlist` lists are looked through (0: it has none).

    `recall_at_10`: of the ten nearest other rows of each of `sample` rows by exact search, the share that the index
    gives by itself; None where nothing was compared.
    """

    recipe_digest: str
    level: Level
    metric: Metric
    kind: str
    factory: str
    n_rows: int
    nlist: int
    nprobe: int
    recall_at_10: float | None
    sample: int
    pieces: tuple[str, ...]
    index_key: str
    index_bytes: int
    rows_key: str
    created_at: str
    faiss: str

    def to_json(self) -> bytes:
        return (json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, indent=2) + "\n").encode()


def record_key(level: str, metric: str) -> str:
    return f"{FOLDER}{level}-{metric}.json"


def read_record(source: NewestRows | SnapshotRows, level: str, metric: str) -> IndexRecord | None:
    """The index at this dataset; None if there is none. OtherRecipe if it is of rows of other weights or settings."""
    place, key = source.store.url, record_key(level, metric)
    try:
        given = json.loads(source.store.read(key))
        if given.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("it is of another version")
        record = IndexRecord(**{**given, "pieces": tuple(given["pieces"])})
    except StoreMissing:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedJob(f"{place}/{key} cannot be read ({error}). {_remedy(place, level, metric)}") from None
    if record.recipe_digest != source.job.recipe.digest:
        raise OtherRecipe(
            f"the index at {place}/{key} is of rows of other weights or settings (recipe {record.recipe_digest[:8]}, "
            f"here {source.job.recipe.digest[:8]}). {_remedy(place, level, metric)}"
        )
    return record


def nearest_by_index(
    source: NewestRows | SnapshotRows,
    queries_QD: FLOAT32,
    *,
    level: Level,
    metric: Metric = "cosine",
    top: int = 10,
    where: Iterable[str] = (),
    distinct: float | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> SearchResult:
    """`nearest`, over the videos that the index proposes and those that it does not know yet.

    InputError where there is no index, OtherRecipe where it is of other weights, DamagedJob where it cannot be read.
    """
    started = time.monotonic()
    record = read_record(source, level, metric)
    if record is None:
        place = source.store.url
        raise InputError(
            f"{place} has no index of its {level}s by {metric}: `{_command(place, level, metric)}` makes one"
        )
    where = tuple(where)
    of_ids, others = _conditions(source, where)
    wanted = RESCORED[record.kind] * top if distinct is None else POOL
    videos = _proposed(source, record, queries_QD, wanted, of_ids, _ids_where(source, others))
    new = frozenset(_videos_in(source, frozenset(record.pieces)))
    found = nearest(
        source,
        queries_QD,
        level=level,
        metric=metric,
        top=top,
        where=where,
        distinct=distinct,
        only=videos | new,
        on_step=on_step,
    )
    return dataclasses.replace(found, seconds=time.monotonic() - started, n_indexed=record.n_rows, n_new=len(new))


def _videos_in(source: NewestRows | SnapshotRows, known: frozenset[str]) -> Iterator[str]:
    """The videos of the pieces that are not known."""
    if known.issuperset(source.pieces):
        return
    for folder, table in source.rows(clips=False, skip=known):
        if folder == "videos":
            yield from table["video_id"].to_pylist()


def _conditions(
    source: NewestRows | SnapshotRows, where: tuple[str, ...]
) -> tuple[tuple[conditions_of.Condition, ...], tuple[conditions_of.Condition, ...]]:
    """The conditions on the id, which the rows of an index have themselves, and those that need a pass over videos/."""
    try:
        conditions = conditions_of.parse(where, source.schemas["videos"])
    except InputError as error:
        raise InputError(f"{error}. An index is filtered by columns of videos/ alone: leave out --index") from None
    of_ids = tuple(one for one in conditions if one.column == "video_id")
    return of_ids, tuple(one for one in conditions if one.column != "video_id")


def _ids_where(
    source: NewestRows | SnapshotRows, conditions: tuple[conditions_of.Condition, ...]
) -> frozenset[str] | None:
    """The videos that satisfy the conditions, by a pass over videos/; None where there are none."""
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
    of_ids: tuple[conditions_of.Condition, ...],
    among: frozenset[str] | None,
) -> frozenset[str]:
    """The videos of the `n_rows` rows that the index finds nearest to any query, of those that still hold."""
    with opened(source.store, record) as (index, rows):
        allowed_N = current(source, rows, among)
        for condition in of_ids:
            allowed_N &= condition.holds(rows).to_numpy()
        scores_QK, found_QK = search(index, record, queries_QD, min(n_rows, record.n_rows), allowed_N)
        sign = 1 if record.metric == "l2" else -1
        order = np.argsort(sign * scores_QK, axis=None, kind="stable")
        found = found_QK.ravel()[order]
        first = list(dict.fromkeys(found[found >= 0].tolist()))[:n_rows]
        return frozenset(rows["video_id"].take(pa.array(first, pa.int64())).to_pylist())


@contextlib.contextmanager
def opened(store: Store, record: IndexRecord) -> Iterator[tuple[Any, pa.Table]]:
    """FAISS's index, its file mapped into memory and not read, and the rows it is of. DamagedJob if either is not."""
    import faiss

    place = store.url
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(local_path(store, record.index_key))
            rows_path = stack.enter_context(local_path(store, record.rows_key))
            index = read_index(path)
            with schema.open_parquet(rows_path) as file:
                rows = file.read(use_threads=False)
            if not index.ntotal == rows.num_rows == record.n_rows or path.stat().st_size != record.index_bytes:
                raise ValueError(f"it holds {index.ntotal} vectors for {record.n_rows} rows")
        except (StoreMissing, RuntimeError, ValueError, OSError, pa.ArrowException) as error:
            remedy = _remedy(place, record.level, record.metric)
            raise DamagedJob(f"the index {place}/{record.index_key} cannot be used: {error}. {remedy}") from None
        if record.nlist:
            faiss.extract_index_ivf(index).nprobe = record.nprobe
        yield index, rows


def read_index(path: Path, *, mapped: bool = True) -> Any:
    """An index from a file: mapped, so that only the lists that are looked through take memory, or read whole."""
    import faiss

    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_READ_ONLY if mapped else 0)


def search(
    index: Any, record: IndexRecord, queries_QD: FLOAT32, k: int, allowed_N: BOOL | None, *, nprobe: int | None = None
) -> tuple[FLOAT32, INT64]:
    """FAISS's scores and row numbers, [Q, k]; -1 where it found none. `allowed_N` says which rows may be found."""
    import faiss

    selector = None
    if allowed_N is not None and not allowed_N.all():
        selector = faiss.IDSelectorBitmap(np.packbits(allowed_N, bitorder="little"))
    if record.nlist:
        settings = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe or record.nprobe)
    else:
        settings = faiss.SearchParameters(sel=selector)
    scores_QK, rows_QK = index.search(prepared(queries_QD, record.metric), k, params=settings)
    return scores_QK, rows_QK


def prepared(vectors_ND: FLOAT32, metric: str) -> FLOAT32:
    """Vectors as an index holds them: of length 1 for the cosine, which is then their inner product."""
    made_ND: FLOAT32 = np.array(vectors_ND, np.float32, order="C")
    if metric == "cosine":
        made_ND /= np.linalg.norm(made_ND, axis=1, keepdims=True)
    return made_ND


def current(source: NewestRows | SnapshotRows, rows: pa.Table, among: frozenset[str] | None = None) -> BOOL:
    """Which rows of an index still hold: their plan is the newest that names their video, which is one of `among`."""
    ids = rows["video_id"].combine_chunks().dictionary_encode()
    names = ids.dictionary.to_pylist()
    codes_N = ids.indices.to_numpy()
    wanted: BOOL = np.fromiter((among is None or name in among for name in names), bool, len(names))[codes_N]
    if isinstance(source, SnapshotRows):
        return wanted
    newest = np.fromiter((source.newest.get(name, -1) for name in names), np.int64, len(names))
    holds: BOOL = wanted & (newest[codes_N] == rows["plan_seq"].to_numpy())
    return holds


def _command(place: str, level: str, metric: str) -> str:
    return f"p3d results index {place} --level {level} --metric {metric}"


def _remedy(place: str, level: str, metric: str) -> str:
    return f"`{_command(place, level, metric)} --rebuild` makes it anew"
