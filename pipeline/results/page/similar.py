"""What is similar to a video, to one second of it, or to a file that was dropped on the page.

The search is exact, or uses the dataset's index if it has one. Both read and check rows as `p3d search` does. When the
client has gone, the search ends at its next step.
"""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.snapshot import SnapshotRows
from p3d.pipeline.errors import DamagedJob, InputError
from p3d.pipeline.results.page.archive import Archive
from p3d.pipeline.results.search.exact import POOL, SearchResult, nearest
from p3d.pipeline.results.search.index import nearest_by_index, read_record
from p3d.pipeline.results.search.options import LEVELS, Level
from p3d.pipeline.results.search.query import Query, clip_at, hits_wanted, stored
from p3d.pipeline.types import FLOAT32

DROPPED_BYTES = 256 * 1024**2  # of vectors kept for dropped files; the least recently used are removed first
MOST_HITS = 200

Embed = Callable[[Path], Mapping[Level, Query]]


class NobodyWaits(Exception):
    """The client has closed its request, so the search stops."""


@dataclass(frozen=True, slots=True)
class SimilarQuery:
    """A query: a video of the dataset, or a dropped file by its key. `at_s` selects one second of it.

    `own` allows hits of the same video, `every` several clips of one video. `distinct` leaves out near-duplicates, as
    in `nearest`.
    """

    video_id: str | None = None
    dropped: str | None = None
    at_s: float | None = None
    level: Level = "video"
    top: int = 24
    where: tuple[str, ...] = ()
    distinct: float | None = None
    own: bool = False
    every: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """Hits, best first, and the seconds [start, end) of each query vector, by `Hit.query`.

    `found.warning` is that of a dropped file, if it was not embedded in the precision of the rows.
    """

    found: SearchResult
    seconds: tuple[tuple[float, float], ...]


@dataclass(slots=True)
class Dropped:
    """Vectors of dropped files by key, DROPPED_BYTES at most."""

    queries: OrderedDict[str, Mapping[Level, Query]] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, query: Mapping[Level, Query]) -> str:
        """Store a query and return its key. InputError if it alone exceeds DROPPED_BYTES."""
        if sum(one.features_QD.nbytes for one in query.values()) > DROPPED_BYTES:
            raise InputError("the file has too many clips for the page; use `p3d search OUT FILE`")
        key = secrets.token_urlsafe(9)
        with self.lock:
            self.queries[key] = query
            while self._bytes() > DROPPED_BYTES:
                self.queries.popitem(last=False)
        return key

    def of(self, key: str) -> Mapping[Level, Query]:
        with self.lock:
            if key not in self.queries:
                raise InputError("the dropped file is no longer kept; drop it again")
            self.queries.move_to_end(key)
            return self.queries[key]

    def _bytes(self) -> int:
        return sum(one.features_QD.nbytes for query in self.queries.values() for one in query.values())


def similar(archive: Archive, asked: SimilarQuery, dropped: Dropped, gone: threading.Event | None = None) -> Answer:
    """The nearest rows. InputError if the query is not valid; NobodyWaits once `gone` is set.

    Among videos, the archive's vectors decide which few shards of videos/ need to be read.
    """
    source = archive.source
    clips = asked.level == "clip" or asked.at_s is not None
    if asked.dropped is not None:
        query, name = dropped.of(asked.dropped)["clip" if clips else "video"], "the dropped file"
    elif asked.video_id is not None:
        query, name = stored(source, asked.video_id, clips), asked.video_id
    else:
        raise InputError("the query names neither a video nor a dropped file")
    if asked.at_s is not None:
        query = clip_at(query, name, asked.at_s)
    where = hits_wanted(query, asked.where, asked.own)
    top = min(asked.top, MOST_HITS)
    likely = None
    if asked.level == "video":
        likely = archive.likely(query.features_QD, top if asked.distinct is None else POOL, where)
    look = partial(
        _nearest_by_index_or_not
        if likely is None and has_index(source, asked.level)
        else partial(nearest, only=likely),
        level=asked.level,
        top=top,
        where=where,
        distinct=asked.distinct,
        per_video=not asked.every,
        on_step=partial(_go_on, gone),
    )
    found = look(source, query.features_QD)
    if likely is not None:
        found = replace(found, n_rows=len(archive.find("", where, failed=False)))
    return Answer(replace(found, warning=query.warning), query.seconds)


def has_index(source: NewestRows | SnapshotRows, level: Level) -> bool:
    """Whether this user has a usable index by cosine. If it is damaged, exact search is used."""
    if importlib.util.find_spec("faiss") is None:
        return False
    with contextlib.suppress(DamagedJob, InputError):
        return read_record(source, level, "cosine") is not None
    return False


def _nearest_by_index_or_not(source: NewestRows | SnapshotRows, features_QD: FLOAT32, **asked: Any) -> SearchResult:
    """Search by the index; if it is damaged, search all rows, which takes longer and finds at least as much."""
    try:
        return nearest_by_index(source, features_QD, **asked)
    except DamagedJob:
        return nearest(source, features_QD, **asked)


def levels(source: NewestRows | SnapshotRows) -> Sequence[Level]:
    """The levels that can be searched."""
    return LEVELS if source.with_clips else ("video",)


def _go_on(gone: threading.Event | None, _done: int, _all: int) -> None:
    if gone is not None and gone.is_set():
        raise NobodyWaits
