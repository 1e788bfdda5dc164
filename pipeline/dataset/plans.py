"""A plan's immutable manifest: rows -> shards -> Parquet parts, and back.

    SourceListing ──with_shards──> rows ──write_plan──> OUT/plans/<seq>.json ──load_plans──> PlanRecord ──> Manifest

Shards are fixed ranges of rows, so the number of workers may change at any time. A plan's record is created last, so
the plan exists whole or not at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import columns, schema
from p3d.pipeline.dataset.files import UNREADABLE
from p3d.pipeline.dataset.roots import Roots
from p3d.pipeline.dataset.schema import own_columns, write_parquet
from p3d.pipeline.errors import AlreadyRunning, DamagedJob, InputError, StoreMissing, StrayFile
from p3d.pipeline.recipe import PART, PART_ROWS, PartRecord, PlanRecord, Recipe, ShardSizing, part_name
from p3d.pipeline.storage.store import EXISTS, Store
from p3d.pipeline.types import INT64, ShardPlan, VideoRef
from p3d.pipeline.types.versions import names_in

ROW_BYTES = 2  # of a part, at least, per row; with the shortest names that still differ a row has 8
PLAN_KEY = re.compile(r"plans/[0-9]{4,}\.json")
PART_KEY = re.compile(rf"plans/[0-9]{{4,}}-[0-9a-f]{{8}}/{PART}")


def plan_digest(recipe_digest: str, seq: int, videos: pa.Table) -> str:
    """sha256 over the recipe's digest, the plan's number and the rows in order, in a canonical encoding of values.

    Shards are named by this digest. It includes the number so that the same videos planned again are other shards.
    """
    hasher = hashlib.sha256(f"{recipe_digest} {seq}\n".encode())
    for row in rows_of(videos):
        hasher.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
    return hasher.hexdigest()


def _in_version(videos: pa.Table, version: int) -> pa.Table:
    """Rows without the columns that came after a schema version. Ours end with `shard`, the user's own follow."""
    newer = {one.name for one in columns.MANIFEST if one.since > version}
    n_ours = videos.column_names.index("shard")
    return videos.select([at for at, name in enumerate(videos.column_names) if at > n_ours or name not in newer])


def rows_of(videos: pa.Table) -> Iterator[dict[str, Any]]:
    """The rows as values of Python. InputError for a value that Python cannot hold."""
    try:
        for batch in _as_numbers(videos).to_batches(max_chunksize=8192):
            yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:
        raise InputError(f"a column of the list cannot be kept ({error}); cast nanoseconds to microseconds") from None


def _as_numbers(videos: pa.Table) -> pa.Table:
    """Nanosecond columns of the user as integers, because Python's own types have microsecond precision."""
    for at, field in enumerate(videos.schema):
        if pa.types.is_temporal(field.type) and getattr(field.type, "unit", "") == "ns":
            videos = videos.set_column(at, field.name, videos[field.name].cast(pa.int64()))
    return videos


def write_plan(
    store: Store, seq: int, recipe: Recipe, videos: pa.Table, n_skipped: int, sizing: ShardSizing
) -> PlanRecord:
    """Create the parts in OUT/plans/<seq>-<plan8>/, then OUT/plans/<seq>.json. Idempotent. In the recipe's version.

    `sizing` is what the shards of the rows were made by, which a later plan may use.

    The record is created once for each number. If two runs plan at the same moment, one gets AlreadyRunning, and its
    plan does not count.
    """
    version = recipe.schema_version
    videos = _in_version(videos, version)
    whole = plan_digest(recipe.digest, seq, videos)
    folder = f"plans/{seq:04d}-{whole[:8]}"
    parts = []
    for at, part in enumerate(_parts(videos)):
        name = part_name(at)
        with store.temp_file() as path:
            write_parquet(path, part, {})
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            if store.create(f"{folder}/{name}", path) == EXISTS:
                sha256 = hashlib.sha256(store.read(f"{folder}/{name}")).hexdigest()
        shards = part["shard"]
        parts.append(PartRecord(name, sha256, part.num_rows, shards[0].as_py(), shards[-1].as_py() + 1))
    size_bytes = total_bytes(videos["size_bytes"].to_numpy())
    plan = PlanRecord(
        seq,
        whole,
        recipe.digest,
        videos.num_rows,
        parts[-1].end_shard,
        size_bytes,
        n_skipped,
        tuple(parts),
        sizing,
        version,
    )
    if store.create(plan.key, plan.to_json()) == EXISTS:
        theirs = PlanRecord.from_json(store.read(plan.key), f"{store.url}/{plan.key}")
        if theirs.digest != plan.digest:
            raise AlreadyRunning(f"another run of {store.url} planned at this moment; give the same command again")
        return theirs
    return plan


def total_bytes(sizes_N: INT64) -> int:
    """The sum of all sizes, exact beyond 64 bits: a sparse file may claim 8 EiB. Sizes below 0 are of missing files."""
    sizes_N = np.maximum(sizes_N, 0)
    return (int((sizes_N >> 32).sum()) << 32) + int((sizes_N & 0xFFFFFFFF).sum())


def _parts(videos: pa.Table) -> Iterator[pa.Table]:
    """Consecutive parts of at most PART_ROWS rows, each of which ends where a shard ends."""
    start = 0
    shards = videos["shard"].to_numpy()
    while start < len(shards):
        end = min(start + PART_ROWS, len(shards))
        while end < len(shards) and shards[end] == shards[end - 1]:
            end -= 1
        yield videos.slice(start, end - start)
        start = end


def load_plans(store: Store) -> list[PlanRecord]:
    """Every plan of an output, ordered by seq. DamagedJob if one was edited. Other files are named once (StrayFile)."""
    plans, sizes = list[PlanRecord](), dict[str, int]()
    for info in store.list("plans/"):
        if not PLAN_KEY.fullmatch(info.key):
            if PART_KEY.fullmatch(info.key):
                sizes[info.key] = info.size_bytes
            else:
                warnings.warn(f"{store.url}/{info.key} is not part of a plan and is skipped", StrayFile, stacklevel=2)
            continue
        plan = PlanRecord.from_json(store.read(info.key), f"{store.url}/{info.key}")
        if info.key != plan.key:
            raise DamagedJob(f"{store.url}/{info.key} is not the record of that number; restore it")
        plans.append(plan)
    plans.sort(key=lambda plan: plan.seq)
    for plan in plans:
        _refuse_claims(store, plan, sizes)
    return plans


def plans_of(store: Store, recipe: Recipe) -> list[PlanRecord]:
    """Every plan of the job with this recipe, as `load_plans`. DamagedJob if one was made for another recipe, too."""
    plans = load_plans(store)
    for plan in plans:
        if plan.recipe_digest != recipe.digest:
            raise DamagedJob(
                f"{store.url}/{plan.key} was made for another recipe than that of job.json; restore whichever changed"
            )
    return plans


def _refuse_claims(store: Store, plan: PlanRecord, sizes: dict[str, int]) -> None:
    """DamagedJob if a record claims more rows than fit into its parts. Costs nothing where these were just listed.

    `status` counts and names the shards of a record without reading its parts, so a record alone may not claim many.
    """
    for part in plan.parts:
        key = f"{plan.folder}/{part.name}"
        if key not in sizes:
            head = store.head(key)  # on S3 a listing may have passed this key before the part was created
            sizes[key] = head.size_bytes if head is not None else 0
        if part.n_videos * ROW_BYTES > sizes[key]:
            missing = "is missing" if not sizes[key] else f"has {sizes[key]} bytes, too few for that"
            raise DamagedJob(
                f"{store.url}/{plan.key} claims {part.n_videos} videos in {part.name}, which {missing}; restore it"
            )


def read_part(store: Store, plan: PlanRecord, part: PartRecord) -> pa.Table:
    """One manifest part, verified against its digest in the plan's record."""
    key = f"{plan.folder}/{part.name}"
    try:
        content = store.read(key)
    except StoreMissing:
        raise DamagedJob(f"{store.url}/{key} is missing; restore it, or start at another output") from None
    if hashlib.sha256(content).hexdigest() != part.sha256:
        raise DamagedJob(f"{store.url}/{key} is not the file that was planned; restore it, or start at another output")
    try:
        with schema.open_parquet(io.BytesIO(content)) as file:
            if file.metadata.num_rows != part.n_videos:  # before they are read: a few bytes may claim any number
                raise ValueError(f"it has {file.metadata.num_rows} rows and not {part.n_videos}")
            table = file.read(use_threads=False)
        names = table.schema.names
        ours = columns.schema(columns.MANIFEST, plan.schema_version)
        same = names[: len(ours)] == ours.names and len(set(names)) == len(names)
        same = same and all(table.schema.field(name).type == ours.field(name).type for name in ours.names)
        if not same or table["shard"].null_count or table["video_id"].null_count:
            raise ValueError("it has other columns or rows than a manifest")
        _check_shards(part, table["shard"].to_numpy())
    except UNREADABLE as error:
        raise DamagedJob(f"{store.url}/{key} is no manifest ({error}); restore it") from None
    return table


def _check_shards(part: PartRecord, shards_N: INT64) -> None:
    """ValueError unless the rows are in the shards that the record claims, in order, each of which has a row."""
    edges = np.concatenate(([part.first_shard - 1], shards_N, [part.end_shard])).astype(np.int64)
    steps = np.diff(edges)
    if not (steps[0] == steps[-1] == 1 and ((steps == 0) | (steps == 1)).all()):
        raise ValueError(f"its rows are not those of shards {part.first_shard} to {part.end_shard - 1}, in order")


def check_digest(plan: PlanRecord, videos: pa.Table) -> None:
    """DamagedJob unless the rows of all parts give the plan's digest."""
    if plan_digest(plan.recipe_digest, plan.seq, videos) != plan.digest:
        raise DamagedJob(f"{plan.folder}: the manifest does not match the digest in {plan.key}; restore it")


class Manifest:
    """The rows of one plan, read part by part and kept as Arrow (about 200 bytes per video).

    `roots` say where the videos are now. The rows are as they were planned.
    """

    def __init__(self, store: Store, plan: PlanRecord, roots: Roots = Roots()) -> None:  # noqa: B008 - frozen
        self.plan, self.roots = plan, roots
        self.videos = pa.concat_tables([read_part(store, plan, part) for part in plan.parts])
        check_digest(plan, self.videos)
        steps = np.flatnonzero(np.diff(self.videos["shard"].to_numpy())) + 1
        self._first_rows: list[int] = [0, *steps.tolist(), self.videos.num_rows]
        if len(self._first_rows) - 1 != plan.n_shards:
            raise DamagedJob(f"{plan.folder}: the manifest has {len(self._first_rows) - 1} shards, not {plan.n_shards}")

    def rows(self, shard: int) -> pa.Table:
        """The shard's rows, all columns."""
        first, end = self._first_rows[shard], self._first_rows[shard + 1]
        return self.videos.slice(first, end - first)

    def user_columns(self, shard: int) -> pa.Table:
        """The shard's rows, the user's own columns and `video_id` only.

        Copied, because a slice is pickled with the buffers of its whole part: for a part of a million rows, 52 MB per
        shard sent to a worker.
        """
        ours = own_columns(self.plan.schema_version) - {"video_id"}
        own = [name for name in self.videos.column_names if name not in ours]
        rows = self.rows(shard).select(own)
        return rows.take(np.arange(rows.num_rows))

    @cached_property
    def own_fields(self) -> tuple[pa.Field, ...]:
        """The user's own columns."""
        return tuple(field for field in self.user_columns(0).schema if field.name != "video_id")

    @cached_property
    def now(self) -> pa.Table:
        """All rows, each with the uri at which its video is now."""
        return self.roots.table(self.videos, self.plan.seq)

    def uris(self, shard: int) -> list[Any]:
        """Where the videos of the shard are now."""
        return [uri and self.roots.now(uri, self.plan.seq) for uri in self.rows(shard)["uri"].to_pylist()]

    def video(self, video_id: str) -> VideoRef:
        """A video of this plan as it is to be opened now."""
        at = pc.index(self.videos["video_id"], video_id).as_py()
        (row,) = self.videos.slice(at, 1).select(VideoRef.__slots__).to_pylist()
        return self.roots.video(VideoRef(**row), self.plan.seq)

    def moved(self, shard: ShardPlan) -> ShardPlan | None:
        """The shard with its videos as they are to be opened now; None if none of them has moved."""
        videos = tuple(self.roots.video(video, self.plan.seq) for video in shard.videos)
        return None if videos == shard.videos else replace(shard, videos=videos)

    def n_videos(self, shard: int) -> int:
        return self._first_rows[shard + 1] - self._first_rows[shard]

    def shard(self, shard: int) -> ShardPlan:
        rows = self.rows(shard)
        known = names_in(VideoRef, self.plan.schema_version)
        names = [field.name for field in fields(VideoRef) if field.name in known]
        values = zip(*(rows[name].to_pylist() for name in names), strict=True)
        videos = tuple(VideoRef(**dict(zip(names, row, strict=True))) for row in values)
        return ShardPlan(self.plan.seq, self.plan.plan8, shard, videos)


def newest_plans(manifests: Iterable[Manifest], column: str = "") -> dict[str, Any]:
    """video_id -> the number of the newest plan that names it, or what that plan has in a column.

    That plan alone decides the state of the video.
    """
    newest: dict[str, Any] = {}
    for manifest in sorted(manifests, key=lambda one: one.plan.seq):
        values = manifest.videos[column].to_pylist() if column else repeat(manifest.plan.seq)
        newest.update(zip(manifest.videos["video_id"].to_pylist(), values, strict=False))
    return newest
