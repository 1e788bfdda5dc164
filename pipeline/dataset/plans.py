"""A plan's immutable manifest: rows -> shards -> Parquet parts, and back.

    SourceListing ──with_shards──> rows ──write_plan──> OUT/plans/<seq>.json ──load_plans──> PlanRecord ──> Manifest

Shards are fixed ranges of rows, so the number of workers may change at any time. A plan's record is created last, so
the plan exists whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import threading
import warnings
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate, count, repeat
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from p3d.pipeline.dataset import columns, schema
from p3d.pipeline.dataset.files import UNREADABLE, sha256_of
from p3d.pipeline.dataset.roots import Roots
from p3d.pipeline.dataset.schema import own_columns, write_parquet
from p3d.pipeline.dataset.sorted_ids import SortedIds, last_of_its_id
from p3d.pipeline.errors import AlreadyRunning, DamagedJob, InputError, StoreMissing, StrayFile
from p3d.pipeline.recipe import PART, PART_ROWS, PartRecord, PlanRecord, Recipe, ShardSizing, part_name
from p3d.pipeline.storage.store import EXISTS, Store
from p3d.pipeline.types import BOOL, INT64, ShardPlan, VideoRef
from p3d.pipeline.types.versions import names_in

ROW_BYTES = 2  # of a part, at least, per row; with the shortest names that still differ a row has 8
KEPT_BYTES = 256 * 1024**2  # of parts of manifests in memory
PLAN_KEY = re.compile(r"plans/[0-9]{4,}\.json")
PART_KEY = re.compile(rf"plans/[0-9]{{4,}}-[0-9a-f]{{8}}/{PART}")


def plan_digest(recipe_digest: str, seq: int, *parts: pa.Table) -> str:
    """sha256 over the recipe's digest, the plan's number and the rows in order, in a canonical encoding of values.

    Shards are named by this digest. It includes the number so that the same videos planned again are other shards.
    """
    hasher = _hasher(recipe_digest, seq)
    for videos in parts:
        _hash_rows(hasher, videos)
    return hasher.hexdigest()


def _hasher(recipe_digest: str, seq: int) -> hashlib._Hash:
    return hashlib.sha256(f"{recipe_digest} {seq}\n".encode())


def _hash_rows(hasher: hashlib._Hash, videos: pa.Table) -> None:
    """Add the rows to a plan's digest."""
    kinds = set(videos.schema.types)
    if not kinds <= {pa.string(), pa.int64(), pa.int32()}:
        for row in rows_of(videos):
            hasher.update(json.dumps(row, sort_keys=True, separators=(",", ":"), default=str).encode() + b"\n")
        return
    # the same text, 3.6 times as fast: plans of folders have columns of these types only
    names = sorted(videos.column_names)
    line = "{" + ",".join(json.dumps(name).replace("%", "%%") + ":%s" for name in names) + "}\n"
    for batch in videos.select(names).to_batches(max_chunksize=8192):
        columns = [_texts(column) for column in batch.columns]
        hasher.update("".join(map(line.__mod__, zip(*columns, strict=True))).encode())


def _texts(column: pa.Array) -> list[str]:
    """The JSON of the values of a column of texts or integers."""
    values = column.to_pylist()
    if pa.types.is_string(column.type):
        return ["null" if one is None else encode_basestring_ascii(one) for one in values]
    return ["null" if one is None else str(one) for one in values]


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
    store: Store, seq: int, recipe: Recipe, videos: pa.Table | Iterable[pa.Table], n_skipped: int, sizing: ShardSizing
) -> PlanRecord:
    """Create the parts in OUT/plans/<seq>-<plan8>/, then OUT/plans/<seq>.json. Idempotent. In the recipe's version.

    `videos` are the rows in order, with their shards, in one table or several that follow each other: then one part of
    them is in memory at a time. `sizing` is what the
    shards were made by, which a later plan may use.

    The record is created once for each number. If two runs plan at the same moment, one gets AlreadyRunning, and its
    plan does not count.
    """
    version = recipe.schema_version
    hasher, size_bytes, parts = _hasher(recipe.digest, seq), 0, list[PartRecord]()
    with contextlib.ExitStack() as stack:
        paths = []
        tables = [videos] if isinstance(videos, pa.Table) else videos
        for part in _parts(_in_version(rows, version) for rows in tables):
            _hash_rows(hasher, part)
            size_bytes += total_bytes(part["size_bytes"].to_numpy())
            path = stack.enter_context(store.temp_file())
            write_parquet(path, part, {})
            shards = part["shard"]
            first, end = shards[0].as_py(), shards[-1].as_py() + 1
            parts.append(PartRecord(part_name(len(parts)), sha256_of(path), part.num_rows, first, end))
            paths.append(path)
        whole = hasher.hexdigest()
        folder = f"plans/{seq:04d}-{whole[:8]}"
        for at, path in enumerate(paths):
            if store.create(f"{folder}/{parts[at].name}", path) == EXISTS:
                theirs = hashlib.sha256(store.read(f"{folder}/{parts[at].name}")).hexdigest()
                parts[at] = replace(parts[at], sha256=theirs)
    plan = PlanRecord(
        seq,
        whole,
        recipe.digest,
        sum(part.n_videos for part in parts),
        parts[-1].end_shard,
        size_bytes,
        n_skipped,
        tuple(parts),
        sizing,
        version,
    )
    if store.create(plan.key, plan.to_json()) == EXISTS:
        other = PlanRecord.from_json(store.read(plan.key), f"{store.url}/{plan.key}")
        if other.digest != plan.digest:
            raise AlreadyRunning(f"another run of {store.url} planned at this moment; give the same command again")
        return other
    return plan


def total_bytes(sizes_N: INT64) -> int:
    """The sum of all sizes, exact beyond 64 bits: a sparse file may claim 8 EiB. Sizes below 0 are of missing files."""
    sizes_N = np.maximum(sizes_N, 0)
    return (int((sizes_N >> 32).sum()) << 32) + int((sizes_N & 0xFFFFFFFF).sum())


def _parts(videos: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Consecutive parts of at most PART_ROWS rows, each of which ends where a shard ends."""
    held = None
    for rows in videos:
        held = rows if held is None else pa.concat_tables([held, rows])
        while held.num_rows > PART_ROWS:
            shards = held["shard"].to_numpy()
            end = int(np.searchsorted(shards, shards[PART_ROWS]))  # where the shard of the first row too many begins
            yield held.slice(0, end).combine_chunks()
            held = held.slice(end)
    if held is not None and held.num_rows:
        yield held.combine_chunks()


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
    by_name: dict[str, PlanRecord] = {}
    for plan in plans:
        _refuse_claims(store, plan, sizes)
        if by_name.setdefault(plan.plan8, plan) is not plan:
            other = by_name[plan.plan8].key
            raise DamagedJob(f"{store.url}/{plan.key} has shards of the same names as {other}; restore both")
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


def check_digest(plan: PlanRecord, parts: Iterable[pa.Table]) -> None:
    """DamagedJob unless the rows of all parts give the plan's digest."""
    hasher = _hasher(plan.recipe_digest, plan.seq)
    for videos in parts:
        _hash_rows(hasher, videos)
    if hasher.hexdigest() != plan.digest:
        raise DamagedJob(f"{plan.folder}: the manifest does not match the digest in {plan.key}; restore it")


@dataclass(frozen=True, slots=True)
class ManifestPart:
    """One part that was read: its rows, and where in them each of its shards begins, with their end."""

    videos: pa.Table
    edges: INT64


class _KeptParts:
    """Parts of manifests that were read last, up to a size in memory. Thread-safe."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[tuple[int, int], ManifestPart] = OrderedDict()
        self._lock = threading.RLock()  # the end of a manifest may come in the middle of `get`

    def get(self, key: tuple[int, int], read: Callable[[], ManifestPart]) -> ManifestPart:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        part = read()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = part
                self._bytes += part.videos.nbytes
            while self._bytes > self._most and len(self._kept) > 2:  # two threads read different parts
                self._bytes -= self._kept.popitem(last=False)[1].videos.nbytes
        return part

    def forget(self, manifest: int) -> None:
        with self._lock:
            for key in [key for key in self._kept if key[0] == manifest]:
                self._bytes -= self._kept.pop(key).videos.nbytes


_KEPT, _NUMBERS = _KeptParts(KEPT_BYTES), count()


class Manifest:
    """The rows of one plan. A part is read and checked when its rows are needed, and few are kept in memory.

    A plan of one part is checked at once. `roots` say where the videos are now. The rows are as they were planned.
    DamagedJob from any method if a part is missing or is not the one that was planned.
    """

    def __init__(self, store: Store, plan: PlanRecord, roots: Roots = Roots()) -> None:  # noqa: B008 - frozen
        self.store, self.plan, self.roots = store, plan, roots
        self._ends = [part.end_shard for part in plan.parts]
        self._first_rows = [0, *accumulate(part.n_videos for part in plan.parts)]
        self._number = next(_NUMBERS)
        weakref.finalize(self, _KEPT.forget, self._number)
        if len(plan.parts) == 1:
            check_digest(plan, self.parts())

    def part(self, at: int) -> ManifestPart:
        """The part number `at`."""
        return _KEPT.get((self._number, at), lambda: self._read(at))

    def _read(self, at: int) -> ManifestPart:
        record = self.plan.parts[at]
        videos = read_part(self.store, self.plan, record)
        if at and not videos.schema.equals(self.part(0).videos.schema):
            raise DamagedJob(f"{self.plan.folder}/{record.name} has other columns than the first part; restore it")
        edges = np.concatenate(([0], np.flatnonzero(np.diff(videos["shard"].to_numpy())) + 1, [videos.num_rows]))
        return ManifestPart(videos, edges)

    def parts(self) -> Iterator[pa.Table]:
        """The rows, part by part."""
        return (self.part(at).videos for at in range(len(self.plan.parts)))

    def numbered_parts(self) -> Iterator[tuple[int, pa.Table]]:
        """The rows, part by part, with the number of the first row of each in the plan."""
        return zip(self._first_rows, self.parts(), strict=False)

    @property
    def videos(self) -> pa.Table:
        """All rows in one table, in memory: about 200 bytes per video."""
        return pa.concat_tables(self.parts())

    def _find(self, shard: int) -> tuple[int, int, int]:
        """The part of a shard, and the first of its rows in that part, and their end."""
        at = bisect_right(self._ends, shard)
        edges, first = self.part(at).edges, self.plan.parts[at].first_shard
        return at, int(edges[shard - first]), int(edges[shard - first + 1])

    def span(self, shard: int) -> tuple[int, int]:
        """The numbers in the plan of the shard's rows: the first, and their end."""
        at, first, end = self._find(shard)
        return self._first_rows[at] + first, self._first_rows[at] + end

    def edges(self) -> INT64:
        """The number in the plan of the first row of each shard, and of all rows, [shards + 1]. Reads all parts."""
        starts = [self.part(at).edges[:-1] + self._first_rows[at] for at in range(len(self.plan.parts))]
        return np.concatenate([*starts, [self.plan.n_videos]])

    def rows(self, shard: int) -> pa.Table:
        """The shard's rows, all columns."""
        at, first, end = self._find(shard)
        return self.part(at).videos.slice(first, end - first)

    def user_columns(self, shard: int) -> pa.Table:
        """The shard's rows, the user's own columns and `video_id` only.

        Copied, because a slice is pickled with the buffers of its whole part: for a part of a million rows, 52 MB per
        shard sent to a worker.
        """
        ours = own_columns(self.plan.schema_version) - {"video_id"}
        rows = self.rows(shard)
        rows = rows.select([name for name in rows.column_names if name not in ours])
        return rows.take(np.arange(rows.num_rows))

    @cached_property
    def own_fields(self) -> tuple[pa.Field, ...]:
        """The user's own columns."""
        return tuple(field for field in self.user_columns(0).schema if field.name != "video_id")

    def uris(self, shard: int) -> list[Any]:
        """Where the videos of the shard are now."""
        return [uri and self.roots.now(uri, self.plan.seq) for uri in self.rows(shard)["uri"].to_pylist()]

    def video(self, row: int) -> VideoRef:
        """The video of a row of this plan as it is to be opened now."""
        at = bisect_right(self._first_rows, row) - 1
        (found,) = self.part(at).videos.slice(row - self._first_rows[at], 1).select(VideoRef.__slots__).to_pylist()
        return self.roots.video(VideoRef(**found), self.plan.seq)

    def moved(self, shard: ShardPlan) -> ShardPlan | None:
        """The shard with its videos as they are to be opened now; None if none of them has moved."""
        videos = tuple(self.roots.video(video, self.plan.seq) for video in shard.videos)
        return None if videos == shard.videos else replace(shard, videos=videos)

    def n_videos(self, shard: int) -> int:
        first, end = self.span(shard)
        return end - first

    def shard(self, shard: int) -> ShardPlan:
        rows, known = self.rows(shard), names_in(VideoRef, self.plan.schema_version)
        # by position: a driver does this for every video, and by name it takes twice as long
        values = (
            rows[field.name].to_pylist() if field.name in known else repeat(field.default) for field in fields(VideoRef)
        )
        return ShardPlan(self.plan.seq, self.plan.plan8, shard, tuple(map(VideoRef, *values)))


class NewestPlans:
    """Which rows of the plans of a job are current: those of videos that no newer plan names. One bit for each row.

    The newest plan that names a video alone decides its state. `n_videos` counts each video once. `superseded` are the
    bits of another object for the same plans; without them all ids are sorted.
    """

    def __init__(self, manifests: Iterable[Manifest], superseded: npt.NDArray[np.uint8] | None = None) -> None:
        self._plans = sorted(manifests, key=lambda one: one.plan.seq)
        self._edges = [0, *accumulate(manifest.plan.n_videos for manifest in self._plans)]
        self._first_rows = {manifest.plan.seq: first for manifest, first in zip(self._plans, self._edges, strict=False)}
        self.n_rows = self.n_videos = self._edges[-1]
        self._old: npt.NDArray[np.uint8] | None = None  # one bit for each row, set if a newer plan has its video
        if superseded is not None:
            self._hold(np.unpackbits(superseded, count=self.n_rows).astype(bool))
        elif len(self._plans) > 1:
            old_N, ids = np.zeros(self.n_rows, bool), self._sorted()
            for run in ids.runs():
                row_N, last_N = run["row"].astype(np.int64), last_of_its_id(run)
                plan_N = np.searchsorted(self._edges, row_N, side="right")
                old_N[row_N[plan_N < plan_N[last_N]]] = True
            self._hold(old_N)
            if ids.in_memory:
                self._ids = ids
            else:
                ids.close()

    def _hold(self, old_N: BOOL) -> None:
        n_old = int(np.count_nonzero(old_N))
        self.n_videos -= n_old
        self._old = np.packbits(old_N) if n_old else None

    @property
    def superseded(self) -> npt.NDArray[np.uint8]:
        """One bit for each row of all plans, in their order: set if a newer plan names its video, [rows / 8]."""
        return np.zeros(-(-self.n_rows // 8), np.uint8) if self._old is None else self._old

    @cached_property
    def _ids(self) -> SortedIds:
        return self._sorted()

    def _sorted(self) -> SortedIds:
        """The ids of all rows, numbered through all plans."""
        ids = SortedIds(self.n_rows)
        for manifest, first in zip(self._plans, self._edges, strict=False):
            for at, videos in manifest.numbered_parts():
                ids.add(videos["video_id"], range(first + at, first + at + videos.num_rows))
        return ids

    @property
    def n_superseded(self) -> int:
        """The rows that are not current."""
        return self.n_rows - self.n_videos

    def current(self, plan_seq: int, first: int, end: int) -> BOOL:
        """Whether the rows [first, end) of a plan are current."""
        if self._old is None:
            return np.ones(end - first, bool)
        first, end = first + self._first_rows[plan_seq], end + self._first_rows[plan_seq]
        bits = np.unpackbits(self._old[first // 8 : -(-end // 8)])
        current: BOOL = bits[first % 8 : first % 8 + end - first] == 0
        return current

    def of_shard(self, manifest: Manifest, shard: int) -> BOOL:
        """Whether the rows of a shard are current."""
        if self._old is None:
            return np.ones(manifest.n_videos(shard), bool)
        return self.current(manifest.plan.seq, *manifest.span(shard))

    def find(self, ids: pa.ChunkedArray | pa.Array) -> tuple[INT64, INT64]:
        """The newest plan that names each id, and the row in it, [N] each; -1 if no plan does."""
        row_N = self._ids.find(ids)
        at_N = np.searchsorted(self._edges, row_N, side="right") - 1
        seqs = np.array([*(manifest.plan.seq for manifest in self._plans), -1])
        return np.where(row_N < 0, -1, seqs[at_N]), np.where(row_N < 0, -1, row_N - np.array(self._edges)[at_N])
