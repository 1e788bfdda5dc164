"""The current rows of a job. Every row is checked as it is read, so callers get the very bytes that were checked.

A video's state is that of the newest plan that names it. Older rows and excluded ids are never returned. Reading is by
row group: memory holds one of them, and the pooled rows of one shard.

Legend: R clip rows of a shard, V its videos, D feature dimension, K classes (0 without scores).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p3d.pipeline.dataset import schema
from p3d.pipeline.dataset.commit import clips_key, failures_key, pooled, vector_columns, videos_key
from p3d.pipeline.dataset.files import FOLDERS, check, local_path, reading, sha256_of
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.dataset.user_columns import conform, own_fields
from p3d.pipeline.errors import DamagedJob, as_stored
from p3d.pipeline.recipe import JobRecord, Recipe
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import BOOL, FLOAT32, INT64, VideoOutcome, shard_name

Rows = Iterator[tuple[str, pa.Table]]  # (folder, rows)


class NewestRows:
    """The newest rows of a job, without the ids of `leave_out`.

    `unknown` are the ids of `leave_out` that no plan names. `pending` counts videos that are not computed yet in their
    newest plan, or whose derived files are missing because a process was killed. They have no rows here, not even old
    ones. `superseded` counts the manifest rows that a newer plan replaced. Raises DamagedJob if the plans cannot be
    trusted or a committed shard is gone.
    """

    with_clips = True  # a job always has clips/, unlike a snapshot

    def __init__(self, store: Store, job: JobRecord, leave_out: frozenset[str] = frozenset()) -> None:
        self.store, self.job, self.leave_out = store, job, leave_out
        manifests = [Manifest(store, plan) for plan in load_plans(store)]
        self.plans = {str(manifest.plan.seq): manifest.plan.digest for manifest in manifests}
        self._manifests = manifests
        self.newest: dict[str, int] = {}  # video_id -> plan_seq
        for manifest in manifests:
            if manifest.plan.recipe_digest != job.recipe.digest:
                raise DamagedJob(f"{store.url}/{manifest.plan.folder} was made for another recipe than job.json holds")
            self.newest.update(dict.fromkeys(manifest.videos["video_id"].to_pylist(), manifest.plan.seq))
        self.unknown = leave_out - self.newest.keys()
        self.excluded = len(leave_out) - len(self.unknown)
        self.superseded = sum(manifest.plan.n_videos for manifest in manifests) - len(self.newest)
        version = job.recipe.schema_version
        self._videos = schema.videos_schema(job.recipe)
        self.schemas = {
            "clips": schema.clips_schema(job.recipe),
            "videos": pa.schema([*self._videos, *own_fields([manifest.videos for manifest in manifests], version)]),
            "failures": schema.failures_schema(version),
        }
        self._remedy = f"`p3d verify {store.words()} --repair` repairs what can be repaired"
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
        return tuple(_name(manifest, at) for manifest, at in self._shards)

    def find(self, name: str) -> tuple[str, ...]:
        """The ids of the videos that have this video_id, uri or path in the newest plan that names them."""
        if name in self.newest:
            return () if name in self.leave_out else (name,)
        name, found = as_stored(name), []
        for manifest in self._manifests:
            named = pc.or_(pc.equal(manifest.videos["uri"], name), pc.equal(manifest.videos["path"], name))
            ids, seq = manifest.videos.select(["video_id"]).filter(named)["video_id"].to_pylist(), manifest.plan.seq
            found += [one for one in ids if self.newest[one] == seq and one not in self.leave_out]
        return tuple(found)

    def rows(
        self,
        *,
        clips: bool = True,
        only: frozenset[str] | None = None,
        skip: frozenset[str] = frozenset(),
        on_step: Callable[[int, int], None] | None = None,
    ) -> Rows:
        """All rows in plan order, each table with its folder. Raises DamagedJob, which names the damaged file.

        With `clips`, every page of the three files is read and the pooled rows are computed again. Without it, only
        the footers of the clips files are read. With `only`, just the rows of these ids: a shard without any of them
        is not read. `skip` are pieces that are not read. `on_step(done, all)` counts shards.
        """
        for done, (manifest, at) in enumerate(self._shards):
            keep_V = self._kept(manifest, at, only)
            if keep_V.any() and _name(manifest, at) not in skip:
                yield from self._shard(manifest, at, clips, keep_V)
            if on_step is not None:
                on_step(done + 1, len(self._shards))

    def _find_shards(self, manifests: list[Manifest]) -> None:
        # derived files first: of a shard that is committed meanwhile, the clips file is then seen in any case
        found = {info.key for folder in reversed(FOLDERS) for info in self.store.list(f"{folder}/")}
        for manifest in manifests:
            for at in range(manifest.plan.n_shards):
                name, n_kept = _name(manifest, at), int(self._kept(manifest, at, None).sum())
                there = [key(name) in found for key in (clips_key, videos_key, failures_key)]
                if n_kept and any(there) and not there[0]:
                    gone = f"{self.store.url}/{clips_key(name)} is gone"
                    raise DamagedJob(f"{gone}. {self._remedy}, `p3d resume` does the rest")
                if n_kept and all(there):
                    self._shards.append((manifest, at))
                elif n_kept:
                    self.pending += n_kept

    def _kept(self, manifest: Manifest, at: int, only: frozenset[str] | None) -> BOOL:
        """Which videos of a shard are wanted, [V]."""
        ids, seq = manifest.rows(at)["video_id"].to_pylist(), manifest.plan.seq
        kept = (self.newest[one] == seq and one not in self.leave_out and (only is None or one in only) for one in ids)
        return np.fromiter(kept, bool, len(ids))

    def _shard(self, manifest: Manifest, at: int, clips: bool, keep_V: BOOL) -> Rows:
        shard, version = manifest.shard(at), self.job.recipe.schema_version
        key, vectors = clips_key(shard.name), None
        with reading(self.store, key, self._remedy), contextlib.ExitStack() as stack:
            if clips:
                path = stack.enter_context(local_path(self.store, key))
                made_from = {"sha256": sha256_of(path), "size_bytes": path.stat().st_size}
                file = stack.enter_context(schema.open_parquet(path))
            else:
                content = stack.enter_context(self.store.open(key))
                made_from = {"size_bytes": content.seek(0, io.SEEK_END)}
                file = stack.enter_context(schema.open_parquet(content))
            outcomes = schema.parse_outcomes(schema.read_footer(file)[schema.OUTCOMES_KEY], version)
            check([o.video for o in outcomes] == list(shard.videos), "its outcomes are not those of its plan")
            check(file.schema_arrow.equals(self.schemas["clips"]), "it has other columns than this job writes")
            check(file.metadata.num_rows == sum(o.n_clips for o in outcomes), "its outcomes count other clips")
            if clips:
                vectors = yield from self._clips(file, shard.plan_seq, outcomes, keep_V)
        key, ok_V = videos_key(shard.name), np.array([o.failure is None for o in outcomes], bool)
        with reading(self.store, key, self._remedy):
            videos = self._derived(key, made_from).select(self._videos.names)
            self._check_videos(videos, outcomes, shard.plan_seq, vectors)
            own = manifest.user_columns(at).drop_columns(["video_id"]).filter(pa.array(ok_V))
            whole = pa.table([*videos.columns, *own.columns], [*videos.column_names, *own.column_names])
            videos = conform(whole, self.schemas["videos"]).filter(pa.array(keep_V[ok_V]))
        yield "videos", videos
        key = failures_key(shard.name)
        with reading(self.store, key, self._remedy):
            failures = self._derived(key, made_from)
            same = failures.equals(schema.failures_table(outcomes, shard.plan_seq, version))
            check(same, "it does not hold what its clips say")
            failures = failures.filter(pa.array(keep_V[~ok_V]))
        yield "failures", failures

    def _clips(
        self, file: pq.ParquetFile, plan_seq: int, outcomes: tuple[VideoOutcome, ...], keep_V: BOOL
    ) -> Generator[tuple[str, pa.Table], None, list[list[FLOAT32]]]:
        """The wanted clips; every row is checked. Returns the pooled vectors of each video that has rows."""
        n_V = np.array([o.n_clips for o in outcomes])
        video_R = np.repeat(np.arange(len(outcomes)), n_V)
        index_R = np.arange(len(video_R)) - np.repeat(np.cumsum(n_V) - n_V, n_V)
        ids_V = np.array([o.video.video_id for o in outcomes], object)
        recipe = self.job.recipe
        pooling, first = _Pooling(recipe), 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            table.validate(full=True)  # of text that is not UTF-8
            at = slice(first, first + table.num_rows)
            same = table["video_id"].to_pylist() == ids_V[video_R[at]].tolist()
            same &= np.array_equal(table["clip_index"].to_numpy(), index_R[at])
            same &= bool((table["plan_seq"].to_numpy() == plan_seq).all())
            check(same, f"rows {at.start} to {at.stop} are not those of its outcomes")
            features_RD = schema.features_of(table["embedding"], recipe.feature_dim)
            probs_RK = schema.probs_of(table, recipe.n_scores)
            sane = np.isfinite(features_RD).all() and (features_RD != 0).any(axis=1).all()
            sane = sane and schema.sound_probs(probs_RK).all()
            for start, end in (("start_frame", "end_frame"), ("start_s", "end_s")):
                sane = sane and (table[start].to_numpy() < table[end].to_numpy()).all()
            check(bool(sane), f"rows {at.start} to {at.stop} hold impossible values")
            pooling.add(video_R[at], features_RD, probs_RK)
            keep_R = keep_V[video_R[at]]
            if keep_R.any():  # filter() copies, so the kept rows do not keep the others in memory
                yield "clips", table if keep_R.all() else table.filter(pa.array(keep_R))
            first = at.stop
        return pooling.end()

    def _derived(self, key: str, made_from: dict[str, Any]) -> pa.Table:
        """The rows of a videos or failures file. Raises ValueError unless its footer names these clips as source."""
        with local_path(self.store, key) as path, schema.open_parquet(path) as file:
            stated = json.loads(schema.read_footer(file)[schema.SOURCE_KEY])
            check(made_from.items() <= stated.items(), "it was made from other clips than those that are stored now")
            return file.read(use_threads=False).combine_chunks()

    def _check_videos(
        self, videos: pa.Table, outcomes: tuple[VideoOutcome, ...], plan_seq: int, vectors: list[list[FLOAT32]] | None
    ) -> None:
        """Check a shard's videos rows against its outcomes, and their vectors against the pooled clips."""
        columns = schema.video_columns(outcomes, plan_seq, self.job.recipe.schema_version)
        check(videos.schema.equals(self._videos), "it has other columns than this job writes")
        expected = pa.table(columns, schema=pa.schema(list(self._videos)[: len(columns)]))
        check(videos.select(expected.column_names).equals(expected), "it does not hold what its clips say")
        if vectors is not None:
            names = self._videos.names[len(columns) :]
            for name, made in zip(names, vector_columns(vectors, self._videos), strict=True):
                check(pa.chunked_array([made]).equals(videos[name]), f"column {name} is not the pool of its clips")


def _name(manifest: Manifest, at: int) -> str:
    return shard_name(manifest.plan.plan8, at)


@dataclass(slots=True)
class _Pooling:
    """Pools each video's clips as they are read; the clips of one video may arrive in several pieces."""

    recipe: Recipe
    vectors: list[list[FLOAT32]] = field(default_factory=list)
    _video: int = -1
    _pieces: list[tuple[FLOAT32, FLOAT32]] = field(default_factory=list)

    def add(self, video_R: INT64, features_RD: FLOAT32, probs_RK: FLOAT32) -> None:
        """Add rows in order, each with the number of its video."""
        edges = [0, *(np.flatnonzero(np.diff(video_R)) + 1).tolist(), len(video_R)]
        for start, end in pairwise(edges if len(video_R) else ()):
            if video_R[start] != self._video:
                self.end()
                self._video = int(video_R[start])
            self._pieces.append((features_RD[start:end], probs_RK[start:end]))

    def end(self) -> list[list[FLOAT32]]:
        """Finish the last video. Returns the vectors of all videos so far."""
        if self._pieces:
            features_ND, probs_NK = (np.concatenate(pieces) for pieces in zip(*self._pieces, strict=True))
            self.vectors.append(pooled(features_ND, probs_NK, self.recipe))
            self._pieces = []
        return self.vectors
