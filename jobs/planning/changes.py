"""What a launch would do with the videos of a source at an existing output. `launch` and `plan` decide it here.

    videos of SRC ──compared by id and version with the newest plans──> new, changed, or unchanged
    shards of earlier plans that are not committed ────────────────────> pending: a launch runs them, too

A video that has moved (`p3d.pipeline.dataset.roots`) is unchanged if it is found where it is now, even if only its size
could be compared. If a list names it by its absolute path, it keeps the id that it had at the old place.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import pyarrow as pa

from p3d.jobs.job import look, manifests
from p3d.jobs.planning.own_columns import own_names, values_of, with_types_of
from p3d.jobs.trust import is_trusted, skipped_plans
from p3d.pipeline.dataset.plans import Manifest, newest_plans
from p3d.pipeline.errors import counted
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule, absolute
from p3d.pipeline.sources.identity import video_id
from p3d.pipeline.sources.listing import named_in, root_of
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import VideoRef


@dataclass(frozen=True, slots=True)
class Changes:
    """`videos` are those to plan: `n_new` are new, `n_changed` have another version, and `n_columns` have only other
    values in the user's own columns. `n_same` others are unchanged.
    """

    videos: pa.Table
    n_new: int
    n_changed: int
    n_columns: int
    n_same: int

    def __str__(self) -> str:
        again = " (their clips are embedded again)" if self.n_columns else ""
        videos = f"{counted(self.n_new, 'new video')}, {counted(self.n_changed, 'changed file')}"
        return f"{videos}, {self.n_columns} with changed columns of the list{again}"


@dataclass(frozen=True, slots=True)
class ToDo:
    """What a launch would compute: the changes, and `pending` videos in `n_pending_shards` shards of earlier plans.

    `skipped` has a uri for each plan that a launch would skip, because the job is not trusted.
    """

    changes: Changes
    pending: pa.Table
    n_pending_shards: int
    skipped: dict[int, str]


def changes(earlier: Sequence[Manifest], videos: pa.Table, *, without: Collection[int] = ()) -> Changes:
    """Compare the videos of a source with the newest plan that names each; plans of the numbers `without` do not count.

    `earlier` are all plans in ascending order. The user's columns get the types that they have in them. InputError for
    a column whose values do not fit.
    """
    own, videos = own_names(videos), with_types_of(videos, earlier)
    plans = [manifest for manifest in earlier if manifest.plan.seq not in without]
    known, moved = newest_plans(plans, "version"), _Moved(plans)
    ids, uris, sizes = (videos[name].to_pylist() for name in ("video_id", "uri", "size_bytes"))
    if moved.ids:
        taken = set(ids)
        free = {uri: one for uri, one in moved.ids.items() if one not in taken}
        ids = [
            free.get(uri, one) if one not in known and _is_absolute(path, one) else one
            for one, path, uri in zip(ids, videos["path"].to_pylist(), uris, strict=True)
        ]
        at = videos.schema.get_field_index("video_id")
        videos = videos.set_column(at, videos.schema.field(at), pa.array(ids, pa.string()))
    values = dict[str, str]()
    for manifest in plans if own else ():
        values |= zip(manifest.videos["video_id"].to_pylist(), values_of(manifest.videos, own), strict=True)
    new = [one not in known for one in ids]
    changed = [
        one in known and known[one] != version and moved.sizes.get(one) != (uri, size)
        for one, version, uri, size in zip(ids, videos["version"].to_pylist(), uris, sizes, strict=True)
    ]
    other = [values.get(one, "") != text for one, text in zip(ids, values_of(videos, own), strict=True)]
    columns = [differs and not (fresh or edited) for differs, fresh, edited in zip(other, new, changed, strict=True)]
    chosen = videos.filter(pa.array(map(any, zip(new, changed, columns, strict=True)), pa.bool_()))
    return Changes(chosen, sum(new), sum(changed), sum(columns), len(ids) - chosen.num_rows)


class _Moved:
    """The videos that have moved, as the newest plan that names each has them.

    `ids`: uri now -> id. `sizes`: id -> (uri now, size), of those of which only the size was compared.
    """

    def __init__(self, plans: Sequence[Manifest]) -> None:
        self.ids: dict[str, str] = {}
        self.sizes: dict[str, tuple[str, int]] = {}
        for manifest in plans:
            if manifest.now is manifest.videos:
                for one in manifest.videos["video_id"].to_pylist() if self.sizes else ():
                    self.sizes.pop(one, None)
                continue
            rows = (manifest.videos[name].to_pylist() for name in ("video_id", "uri", "size_bytes"))
            for one, planned, size, uri in zip(*rows, manifest.now["uri"].to_pylist(), strict=True):
                self.sizes.pop(one, None)
                if uri != planned:
                    self.ids[uri] = one
                if manifest.roots.by_size(planned, manifest.plan.seq):
                    self.sizes[one] = uri, size


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
    pending = pa.concat_tables([table.select(VideoRef.__slots__) for table in (made.videos.slice(0, 0), *rows)])
    return ToDo(made, pending, len(open_), skipped)
