"""The current rows of a job. Every row is checked as it is read, so callers get the very bytes that were checked.

A video's state is that of the newest plan that names it. Older rows and excluded ids are never returned. Reading is by
row group: memory holds one of them, and the pooled rows of one shard.

Legend: V videos of a shard, N rows of a table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import reduce

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.plans import Manifest, newest_plans, plans_of
from p3d.pipeline.dataset.roots import load_roots
from p3d.pipeline.dataset.shard_check import Problem, ShardCheck, keys_of, lost_clips, name_of, stored_files
from p3d.pipeline.dataset.user_columns import conform, own_fields
from p3d.pipeline.errors import DamagedJob, as_stored
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, VideoRef

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
        self.newest = newest_plans(manifests)
        self.unknown = leave_out - self.newest.keys()
        self.excluded = len(leave_out) - len(self.unknown)
        self.superseded = sum(manifest.plan.n_videos for manifest in manifests) - len(self.newest)
        own = own_fields([manifest.videos for manifest in manifests], job.recipe.schema_version)
        self.stored = schema.schemas_of(job.recipe, tuple(own))
        self.schemas = schema.newest_schemas(self.stored, job.recipe)
        self.pending = 0
        self._shards: list[tuple[Manifest, int]] = []
        self._find_shards(manifests)

    @property
    def n_videos(self) -> int:
        """Videos that have rows here, or a failure."""
        return len(self.newest) - self.excluded - self.pending

    @property
    def pieces(self) -> tuple[str, ...]:
        """Names of the units that rows are read in: the finished shards. A name always means the same rows."""
        return tuple(name_of(manifest, at) for manifest, at in self._shards)

    def find(self, name: str) -> tuple[str, ...]:
        """The ids of the videos that have this video_id, uri or path in the newest plan that names them.

        The uri of a video that has moved is the one that was planned, or the one that it has now.
        """
        if name in self.newest:
            return () if name in self.leave_out else (name,)
        name, found = as_stored(name), []
        for manifest in self._manifests:
            places = (manifest.videos["uri"], manifest.videos["path"], manifest.now["uri"])
            named = reduce(pc.or_, (pc.equal(place, name) for place in places))
            ids, seq = manifest.videos.select(["video_id"]).filter(named)["video_id"].to_pylist(), manifest.plan.seq
            found += [one for one in ids if self.newest[one] == seq and one not in self.leave_out]
        return tuple(found)

    def place(self, video: VideoRef) -> VideoRef:
        """A video of a row with the version that its source must have now; the uri of a row is the current one."""
        if not self.roots.records:
            return video
        return replace(video, version=self._by_seq[self.newest[video.video_id]].video(video.video_id).version)

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
        for done, (manifest, at) in enumerate(self._shards):
            keep_V = self._kept(manifest, at, only)
            if keep_V.any() and name_of(manifest, at) not in skip:
                for folder, rows in self._shard(manifest, at, clips, keep_V):
                    yield folder, rows if own_version else schema.with_newer_columns(folder, rows, self.job.recipe)
            if on_step is not None:
                on_step(done + 1, len(self._shards))

    def _find_shards(self, manifests: list[Manifest]) -> None:
        found = stored_files(self.store)
        for manifest in manifests:
            for at in range(manifest.plan.n_shards):
                name, n_kept = name_of(manifest, at), int(self._kept(manifest, at, None).sum())
                if n_kept and (problem := lost_clips(name, n_kept, found)):
                    self._refuse(problem)
                if n_kept and all(key in found for key in keys_of(name)):
                    self._shards.append((manifest, at))
                elif n_kept:
                    self.pending += n_kept

    def _kept(self, manifest: Manifest, at: int, only: frozenset[str] | None) -> BOOL:
        """Which videos of a shard are wanted, [V]."""
        ids, seq = manifest.rows(at)["video_id"].to_pylist(), manifest.plan.seq
        kept = (self.newest[one] == seq and one not in self.leave_out and (only is None or one in only) for one in ids)
        return np.fromiter(kept, bool, len(ids))

    def _shard(self, manifest: Manifest, at: int, clips: bool, keep_V: BOOL) -> Rows:
        one = ShardCheck(manifest, manifest.shard(at), self.job.recipe, self._refuse)
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
