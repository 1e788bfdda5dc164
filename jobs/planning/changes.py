"""What a launch would do with the videos of a source at an existing output. `launch` and `plan` decide it here.

    videos of SRC ──compared by id and version with the newest plans──> new, changed, or unchanged
    shards of earlier plans that are not committed ────────────────────> pending: a launch runs them, too

A video that has moved (`p3d.pipeline.dataset.roots`) is unchanged if it is found where it is now, even if only its size
could be compared. If a list names it by its absolute path, it keeps the id that it had at the old place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.jobs.job import look, manifests
from p3d.jobs.planning.own_columns import own_names, values_of, with_types_of
from p3d.jobs.trust import is_trusted, skipped_plans
from p3d.pipeline.dataset.plans import Manifest, NewestPlans
from p3d.pipeline.dataset.roots import Roots
from p3d.pipeline.dataset.sorted_ids import UINT64, SortedIds, same_as_next, versions_of
from p3d.pipeline.errors import counted
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule, absolute
from p3d.pipeline.sources.identity import video_id
from p3d.pipeline.sources.listing import named_in, root_of
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, VideoRef

BATCH = 1 << 16  # rows that are Python objects at a time
FEW = 64  # changed videos of which it is known whether they were planned from another place


class Rows(Protocol):
    """Rows that are read in batches, more than once, such as a table: those of a long listing are not in memory."""

    @property
    def num_rows(self) -> int: ...

    def to_batches(self, max_chunksize: int | None = None) -> Iterable[pa.RecordBatch]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """The rows of a source that are to be planned, `chosen_N` of all.

    `n_new` are new, `n_changed` have another version, and `n_columns` have only other values in the user's own columns.
    `elsewhere` are the uris, here and as planned, of one of the first changed videos that was planned from another
    place: perhaps it is another video of the same name.
    """

    chosen_N: BOOL
    n_new: int
    n_changed: int
    n_columns: int
    _batches: Callable[[], Iterator[pa.Table]]
    elsewhere: tuple[str, str] | None = None

    @property
    def n_videos(self) -> int:
        """The videos to plan."""
        return int(np.count_nonzero(self.chosen_N))

    @property
    def n_same(self) -> int:
        """The videos that are unchanged."""
        return len(self.chosen_N) - self.n_videos

    def tables(self) -> Iterator[pa.Table]:
        """The rows to plan, in batches."""
        first = 0
        for videos in self._batches():
            chosen_N = self.chosen_N[first : first + videos.num_rows]
            first += videos.num_rows
            yield videos if chosen_N.all() else videos.filter(pa.array(chosen_N))

    def videos(self) -> pa.Table:
        """The rows to plan, in memory."""
        return pa.concat_tables(self.tables())

    def __str__(self) -> str:
        again = " (their clips are embedded again)" if self.n_columns else ""
        videos = f"{counted(self.n_new, 'new video')}, {counted(self.n_changed, 'changed file')}"
        return f"{videos}, {self.n_columns} with changed columns of the list{again}"

    @property
    def warning(self) -> str:
        """What to think of if a changed video was planned from another place; empty otherwise."""
        if self.elsewhere is None:
            return ""
        now, planned = self.elsewhere
        return (
            f"warning: {now} replaces {planned} in this output, because both have the same path below their source. If "
            "these are different videos, use another output for this source"
        )


@dataclass(frozen=True, slots=True)
class ToDo:
    """What a launch would compute: the changes, and `pending` videos in `n_pending_shards` shards of earlier plans.

    `skipped` has a uri for each plan that a launch would skip, because the job is not trusted.
    """

    changes: Changes
    pending: pa.Table
    n_pending_shards: int
    skipped: dict[int, str]


def changes(earlier: Sequence[Manifest], videos: Rows, *, without: Collection[int] = ()) -> Changes:
    """Compare the videos of a source with the newest plan that names each; plans of the numbers `without` do not count.

    `earlier` are all plans in ascending order. The user's columns get the types that they have in them. InputError for
    a column whose values do not fit.
    """
    plans = [manifest for manifest in earlier if manifest.plan.seq not in without]
    ids_now = _ids_of_moved(plans, videos)

    def batches() -> Iterator[pa.Table]:
        for batch in videos.to_batches(max_chunksize=BATCH):
            yield ids_now(with_types_of(pa.Table.from_batches([batch]), earlier))

    if not plans:
        return Changes(np.ones(videos.num_rows, bool), videos.num_rows, 0, 0, batches)
    own = next((own_names(pa.Table.from_batches([batch])) for batch in videos.to_batches(max_chunksize=BATCH)), [])
    roots, n_planned = plans[0].roots, sum(manifest.plan.n_videos for manifest in plans)
    names = ("version", *(["place"] if roots.records else []), *(["own"] if own else []))

    def fields(rows: pa.Table, plan_seq: int | None) -> dict[str, UINT64]:
        made = {"version": versions_of(rows["version"])}
        if roots.records:
            made["place"] = _places(rows, roots, plan_seq)
        return made | ({"own": _numbers(values_of(rows, own))} if own else {})

    new_N, changed_N, other_N = np.zeros((3, videos.num_rows), bool)
    with SortedIds(n_planned + videos.num_rows, *names) as ids:
        first = 0
        planned = ((part, manifest.plan.seq) for manifest in plans for part in manifest.parts())
        for rows, seq in chain(planned, ((rows, None) for rows in batches())):
            ids.add(rows["video_id"], range(first, first + rows.num_rows), **fields(rows, seq))
            first += rows.num_rows
        for run in ids.runs():
            is_found = run["row"] >= n_planned  # in the source, after the rows of all plans
            is_known = np.append(False, same_as_next(run)[:-1] & ~is_found[:-1])
            row_N, was, now = run["row"].astype(np.int64) - n_planned, run[:-1], run[1:]
            new_N[row_N[is_found & ~is_known]] = True
            changed = now["version"] != was["version"]
            if roots.records:
                changed &= (was["place"] == 0) | (was["place"] != now["place"])
            changed_N[row_N[1:][is_found[1:] & is_known[1:] & changed]] = True
            if own:
                other = is_found[1:] & is_known[1:] & ~changed & (was["own"] != now["own"])
                other_N[row_N[1:][other]] = True
    return Changes(
        new_N | changed_N | other_N,
        int(new_N.sum()),
        int(changed_N.sum()),
        int(other_N.sum()),
        batches,
        _elsewhere(plans, batches(), changed_N),
    )


def _elsewhere(plans: Sequence[Manifest], batches: Iterable[pa.Table], changed_N: BOOL) -> tuple[str, str] | None:
    """The uris, now and as planned, of a changed video that was planned from another place; None without any.

    The first FEW changed videos are looked at.
    """
    if not changed_N.any():
        return None
    now: dict[str, str] = {}
    first = 0
    for rows in batches:
        changed = rows.filter(pa.array(changed_N[first : first + rows.num_rows]))
        now |= zip(*(changed[name].slice(0, FEW - len(now)).to_pylist() for name in ("video_id", "uri")), strict=True)
        first += rows.num_rows
        if len(now) >= FEW:
            break
    wanted, seen = pa.array(list(now), pa.string()), set[str]()
    for manifest in reversed(plans):
        for rows in manifest.parts():
            held = manifest.roots.table(rows.filter(pc.is_in(rows["video_id"], wanted)), manifest.plan.seq)
            for one, uri in zip(held["video_id"].to_pylist(), held["uri"].to_pylist(), strict=True):
                if one not in seen and uri not in (None, now[one]):
                    return now[one], uri
                seen.add(one)  # the newest plan that names it decides
    return None


def _numbers(texts: Sequence[str]) -> UINT64:
    """A hash of each text, [N]; 0 for an empty one."""
    hashed_N = versions_of(pa.array(texts, pa.string()))
    return np.where([bool(text) for text in texts], hashed_N | np.uint64(1), np.uint64(0))


def _places(rows: pa.Table, roots: Roots, plan_seq: int | None) -> UINT64:
    """A hash of the place and size of each video, [N]; 0 for a planned one unless it has moved, and by size alone."""
    uris, sizes = rows["uri"].to_pylist(), rows["size_bytes"].to_pylist()
    if plan_seq is None:
        return _numbers([f"{size} {uri}" for uri, size in zip(uris, sizes, strict=True)])
    by_size = [uri is not None and roots.by_size(uri, plan_seq) for uri in uris]
    now = roots.table(rows, plan_seq)["uri"].to_pylist() if any(by_size) else uris
    return _numbers([f"{size} {uri}" if one else "" for uri, size, one in zip(now, sizes, by_size, strict=True)])


def _ids_of_moved(plans: Sequence[Manifest], videos: Rows) -> Callable[[pa.Table], pa.Table]:
    """What gives the videos of a list that it names by absolute paths the ids that they had before they moved.

    A video keeps its own id if a plan knows that, and if the list has the other one, too.
    """
    roots = plans[0].roots if plans else Roots()
    absolute = [
        (one, uri)
        for batch in (videos.to_batches(max_chunksize=BATCH) if roots.records else ())
        for one, path, uri in zip(*(batch[name].to_pylist() for name in ("video_id", "path", "uri")), strict=True)
        if _is_absolute(path, one)
    ]
    if not absolute:
        return lambda rows: rows
    known = NewestPlans(plans).find(pa.array([one for one, _ in absolute]))[0] >= 0
    wanted = pa.array([uri for (_, uri), is_known in zip(absolute, known, strict=True) if not is_known], pa.string())
    ids: dict[str, str] = {}  # of the wanted uris; those of newer plans count
    for manifest in plans:
        for rows in manifest.parts():
            moved = roots.table(rows, manifest.plan.seq)
            if moved is rows:
                continue
            chosen = pc.and_(pc.is_in(moved["uri"], wanted), pc.not_equal(moved["uri"], rows["uri"]))
            ids |= zip(*(moved[name].filter(chosen).to_pylist() for name in ("uri", "video_id")), strict=True)
    taken = {one for batch in videos.to_batches() for one in batch["video_id"].to_pylist()} if ids else set()
    ids = {uri: one for uri, one in ids.items() if one not in taken}

    def renamed(rows: pa.Table) -> pa.Table:
        names, uris = rows["video_id"].to_pylist(), rows["uri"].to_pylist()
        at = rows.schema.get_field_index("video_id")
        return rows.set_column(at, rows.schema.field(at), pa.array(list(map(ids.get, uris, names)), pa.string()))

    return renamed if ids else lambda rows: rows


def _is_absolute(path: str, named: str) -> bool:
    """Is the id of a video of a list made of an absolute path? A move of the video then changes the id."""
    return path.startswith(("/", "s3://")) and named == video_id(os.fsencode(path))


def rule_of_launch(src: str, videos: pa.Table, trusted: bool) -> SourceRule:
    """Which videos a launch may read: those of SRC alone, if the job at OUT is not trusted."""
    return EVERY_SOURCE if trusted else SourceRule(absolute(root_of(src)), listed=named_in(src, videos))


def to_do(store: Store, job: JobRecord, src: str, found: pa.Table, limit: int | None) -> ToDo:
    """What a launch of SRC, where `found` was listed, would compute at the existing job of a store."""
    plans = manifests(store, job)
    work, rule = look(store, plans), rule_of_launch(src, found, is_trusted(store, job))
    skipped = skipped_plans(plans, work.todo, rule)
    made = changes(list(plans.values()), found if limit is None else found.slice(0, limit), without=skipped)
    open_ = [key for key in work.todo if key.plan_seq not in skipped]
    rows = [plans[seq].roots.table(plans[seq].rows(shard), seq) for seq, shard in open_]
    names = list(VideoRef.__slots__)
    pending = pa.concat_tables([found.select(names).slice(0, 0), *(table.select(names) for table in rows)])
    return ToDo(made, pending, len(open_), skipped)
