"""The current rows of a job. Every row is checked as it is read, so callers get the very bytes that were checked.

A video's state is that of the newest plan that names it. Older rows and excluded ids are never returned. Reading is by
row group: memory holds one of them, and the pooled rows of one shard.

Legend: V videos of a shard, N rows of a table.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.finding import shards_with
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, plans_of
from p3d.pipeline.dataset.read_ahead import read_ahead
from p3d.pipeline.dataset.roots import load_roots
from p3d.pipeline.dataset.shard_check import Problem, ShardCheck, lost_clips, name_of
from p3d.pipeline.dataset.sorted_ids import is_one_of
from p3d.pipeline.dataset.stored_files import StoredFiles
from p3d.pipeline.dataset.user_columns import conform, own_fields
from p3d.pipeline.errors import DamagedJob, as_stored
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, INT64, VideoRef

Rows = Iterator[tuple[str, pa.Table]]  # (folder, rows)


class NewestRows:
    """The newest rows of a job, without the ids of `leave_out`. Their `uri` says where the video is now.

    `unknown` are the ids of `leave_out` that no plan names. `pending` counts videos that are not computed yet in their
    newest plan, or whose derived files are missing because a process was killed. They have no rows here, not even old
    ones. `superseded` counts the manifest rows that a newer plan replaced. Raises DamagedJob if the plans cannot be
    trusted or a committed shard is gone.
    """

    with_clips = True  # a job always has clips/, unlike a snapshot

    def __init__(self, store: Store, job: JobRecord, leave_out: frozenset[str] = frozenset()) -> None:
        self.store, self.job, self.leave_out = store, job, leave_out
        self.roots = load_roots(store)
        manifests = [Manifest(store, plan, self.roots) for plan in plans_of(store, job.recipe)]
        self.plans = {str(manifest.plan.seq): manifest.plan.digest for manifest in manifests}
        self._manifests = manifests
        self._by_seq = {manifest.plan.seq: manifest for manifest in manifests}
        self.newest = NewestPlans(manifests)
        self.unknown = frozenset(one for one, seq in self._plans_of(leave_out).items() if seq < 0)
        self.excluded = len(leave_out) - len(self.unknown)
        self.superseded = self.newest.n_superseded
        self.stored = schema.schemas_of(job.recipe, tuple(own_fields(manifests)))
        self.schemas = schema.newest_schemas(self.stored, job.recipe)
        self.pending = 0
        self._shards: list[tuple[Manifest, int]] = []
        self._find_shards(manifests)

    @property
    def n_videos(self) -> int:
        """Videos that have rows here, or a failure."""
        return self.newest.n_videos - self.excluded - self.pending

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the units that rows are read in: the finished shards. A name always means the same rows."""
        return tuple(name_of(manifest, at) for manifest, at in self._shards)

    def find(self, name: str) -> tuple[str, ...]:
        """The ids of the videos that have this video_id, uri or path in the newest plan that names them.

        The uri of a video that has moved is the one that was planned, or the one that it has now.
        """
        if self._plans_of({name})[name] >= 0:
            return () if name in self.leave_out else (name,)
        name, found = as_stored(name), list[str]()
        for manifest in self._manifests:
            for first, videos in manifest.numbered_parts():
                places = [videos["uri"], videos["path"]]
                if (moved := self.roots.table(videos, manifest.plan.seq)) is not videos:
                    places.append(moved["uri"])
                named = reduce(pc.or_, (pc.fill_null(pc.equal(place, name), False) for place in places))
                named_N = named.to_numpy() & self.newest.current(manifest.plan.seq, first, first + videos.num_rows)
                found += videos["video_id"].filter(pa.array(named_N)).to_pylist()
        return tuple(one for one in found if one not in self.leave_out)

    def _plans_of(self, ids: Collection[str]) -> dict[str, int]:
        """The newest plan that names each id; -1 if no plan does."""
        names = [name for name in ids if name == name.encode(errors="replace").decode()]  # others are not UTF-8
        seqs = self.newest.find(pa.array(names, pa.string()))[0].tolist() if names else []
        return dict.fromkeys(ids, -1) | dict(zip(names, seqs, strict=True))

    def place(self, video: VideoRef) -> VideoRef:
        """A video of a row with the version that its source must have now; the uri of a row is the current one."""
        if not self.roots.records:
            return video
        (seq,), (row,) = self.newest.find(pa.array([video.video_id]))
        return replace(video, version=self._by_seq[seq].video(row).version)

    def rows(
        self,
        *,
        clips: bool = True,
        only: frozenset[str] | None = None,
        skip: frozenset[str] = frozenset(),
        on_step: Callable[[int, int], None] | None = None,
        own_version: bool = False,
    ) -> Rows:
        """All rows in plan order, each table with its folder. Raises DamagedJob, which names the damaged file.

        Rows of an older schema version get the columns that came later, unless `own_version`.

        With `clips`, every page of the three files is read and the pooled rows are computed again. Without it, only
        the footers of the clips files are read. With `only`, just the rows of these ids: a shard without any of them
        is not read. `skip` are pieces that are not read. `on_step(done, all)` counts shards.
        """
        numbers, done = deque[int](), 0

        def wanted() -> Iterator[Rows]:
            has = {one.plan.seq: shards_with(one, only) for one in self._manifests} if only is not None else {}
            for number, (manifest, at) in enumerate(self._shards, 1):
                if only is not None and at not in has[manifest.plan.seq]:
                    continue
                keep_V = self._kept(manifest, at, only)
                if keep_V.any() and name_of(manifest, at) not in skip:
                    numbers.append(number)
                    yield self._shard(manifest, at, clips, keep_V)

        for tables in read_ahead(wanted()):
            for folder, rows in tables:
                yield folder, rows if own_version else schema.with_newer_columns(folder, rows, self.job.recipe)
            done = numbers.popleft()
            if on_step is not None:
                on_step(done, len(self._shards))
        if on_step is not None and done < len(self._shards):
            on_step(len(self._shards), len(self._shards))

    def _find_shards(self, manifests: list[Manifest]) -> None:
        found = StoredFiles(self.store, [manifest.plan for manifest in manifests])
        for manifest in manifests:
            whole_S, orphaned_S = found.whole(manifest.plan), found.orphaned(manifest.plan)
            if not (self.newest.n_superseded or self.leave_out or orphaned_S.any()) and whole_S.all():
                self._shards += [(manifest, at) for at in range(manifest.plan.n_shards)]
                continue  # without reading a row
            kept_S = self._kept_counts(manifest)
            for at in np.flatnonzero((kept_S > 0) & orphaned_S)[:1].tolist():
                problem = lost_clips(name_of(manifest, at), int(kept_S[at]), found)
                assert problem is not None
                self._refuse(problem)
            self._shards += [(manifest, at) for at in np.flatnonzero((kept_S > 0) & whole_S).tolist()]
            self.pending += int(kept_S[~whole_S].sum())

    def _kept_counts(self, manifest: Manifest) -> INT64:
        """How many videos of each shard are current and not left out, [shards]."""
        counts = []
        for at, part in enumerate(manifest.plan.parts):
            edges, first = manifest.part(at).edges, manifest.span(part.first_shard)[0]
            kept_N = self.newest.current(manifest.plan.seq, first, first + part.n_videos)
            if self.leave_out:
                kept_N &= ~is_one_of(manifest.part(at).videos["video_id"], self.leave_out)
            counts.append(np.add.reduceat(kept_N, edges[:-1], dtype=np.int64))
        return np.concatenate(counts)

    def _kept(self, manifest: Manifest, at: int, only: frozenset[str] | None) -> BOOL:
        """Which videos of a shard are wanted, [V]."""
        kept_V, ids = self.newest.of_shard(manifest, at), manifest.rows(at)["video_id"]
        if self.leave_out:
            kept_V &= ~is_one_of(ids, self.leave_out)
        return kept_V if only is None else kept_V & is_one_of(ids, only)

    def _shard(self, manifest: Manifest, at: int, clips: bool, keep_V: BOOL) -> Rows:
        one = ShardCheck(manifest, at, self.job.recipe, self._refuse)
        for folder, rows, video_N in one.rows(self.store, clips=clips):
            keep_N = keep_V[video_N]
            if folder == "videos":
                rows = conform(rows, self.stored[folder])
            if folder != "clips":
                rows = self.roots.table(rows, manifest.plan.seq)
            if folder != "clips" or keep_N.any():  # filter() copies, so the kept rows do not keep the others in memory
                yield folder, rows if keep_N.all() else rows.filter(pa.array(keep_N))

    def _refuse(self, problem: Problem) -> None:
        remedy = f"`p3d verify {self.store.words()} --repair` repairs what can be repaired"
        raise DamagedJob(f"{self.store.url}/{problem.key} {problem.text}. {remedy}, `p3d resume` does the rest")
