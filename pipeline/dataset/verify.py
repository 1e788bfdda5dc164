"""Audit an output against its plans, from the store alone (the promise of docs/explanation/reliability.md).

The classes are Jepsen's. A video of the manifest is ok, failed with a reason, or pending (its shard is not committed
yet; a resume computes it). Everything else is damage: lost, duplicated, unexpected, changed.

    quick  listings and footers: every video accounted for, every file complete and made from the stored clips
    deep   also every page against its checksum, and every pooled row computed again: finds a flipped bit
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from threading import get_ident
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import columns, schema
from p3d.pipeline.dataset.commit import clips_key, data_files
from p3d.pipeline.dataset.files import check, reading
from p3d.pipeline.dataset.outcomes import Outcomes
from p3d.pipeline.dataset.plans import Manifest, NewestPlans, check_digest, load_plans, plans_of
from p3d.pipeline.dataset.read_ahead import THREADS
from p3d.pipeline.dataset.roots import load_roots
from p3d.pipeline.dataset.shard_check import Footer, ShardCheck, keys_of, lost_clips, name_of, read_footer
from p3d.pipeline.dataset.stored_files import DATA_KEY, StoredFiles
from p3d.pipeline.recipe import JobRecord, PlanRecord, Recipe
from p3d.pipeline.storage.local import scratch_folder
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import shard_name
from p3d.pipeline.types.versions import SCHEMA_VERSION

MAX_PROBLEMS = 1000  # messages kept; all problems are counted
READERS = 16  # threads that read footers
FEW_SHARDS = 256  # up to which the footers of local files are read by one thread
AHEAD = 128  # shards whose footers, or whose outcomes, are in memory
# of a footer: what is no part of the recipe, and may still change the last bits of a vector. Versions do, too
SETTINGS = ("device", "batch_size", "threads")
SHOWN = 100  # characters of a value of a footer
PIECE_SHARDS = 256  # that are checked together on a node of a cluster


@dataclass(slots=True)
class Audit:
    """Counts of the rows of all plans, and a message for each problem found. `unexpected` also counts files of no plan.

    `superseded` counts those of older plans for videos that a newer plan names, which `status` leaves out. `roots`
    counts the records of moved videos. `underived` counts missing videos and failures files, as after a kill. A resume
    makes them, as it does `pending`.
    """

    manifest: int = 0
    ok: int = 0
    failed: int = 0
    pending: int = 0
    underived: int = 0
    lost: int = 0
    duplicated: int = 0
    unexpected: int = 0
    changed: int = 0
    clips: int = 0
    shards: int = 0
    plans: int = 0
    roots: int = 0
    superseded: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    software: dict[str, dict[str, int]] = field(default_factory=dict)  # package -> version -> shards it wrote
    settings: dict[str, dict[str, int]] = field(default_factory=dict)  # one of SETTINGS -> value -> shards made with it
    examples: dict[str, dict[str, str]] = field(default_factory=dict)  # package or setting -> value -> one such shard
    bad_shards: set[str] = field(default_factory=set)  # names of shards whose clips file cannot be trusted
    bad_derived: set[str] = field(default_factory=set)  # keys of videos and failures files that are wrong or missing

    @property
    def damaged(self) -> bool:
        return bool(self.lost or self.duplicated or self.unexpected or self.changed or self.problems)

    def problem(self, message: str) -> None:
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(message)

    def add(self, other: Audit) -> None:
        """Add what was found in other shards."""
        for name in (one.name for one in fields(self) if one.type == "int"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        for ours, theirs in ((self.software, other.software), (self.settings, other.settings)):
            for name, shards in theirs.items():
                sums = ours.setdefault(name, {})
                sums.update({value: sums.get(value, 0) + count for value, count in shards.items()})
        for name, shown in other.examples.items():
            self.examples[name] = shown | self.examples.get(name, {})
        for message in other.problems:
            self.problem(message)
        self.bad_shards |= other.bad_shards
        self.bad_derived |= other.bad_derived


@dataclass(frozen=True, slots=True)
class Piece:
    """Some shards of a plan, and the bytes of each of their files, by key."""

    plan: PlanRecord
    shards: range
    sizes: dict[str, int]


# checks the pieces elsewhere, and returns the audit of each, in their order
CheckPieces = Callable[[Iterator[Piece]], Iterator[Audit]]


def audit(
    store: Store,
    job: JobRecord,
    *,
    deep: bool = True,
    on_shard: Callable[[int, int], None] | None = None,
    elsewhere: CheckPieces | None = None,
) -> Audit:
    """Check everything under clips/, videos/ and failures/. `on_shard(done, all)` counts the shards that are done.

    Files are read by threads of this process, or by `elsewhere`. Raises DamagedJob if the plans themselves, or the
    records of moved videos, cannot be trusted.
    """
    plans = plans_of(store, job.recipe)
    found = StoredFiles(store, plans)
    result = Audit(plans=len(plans), roots=len(load_roots(store).records))
    n_shards, done = sum(plan.n_shards for plan in plans), 0
    manifests = [Manifest(store, plan) for plan in plans]
    for plan, manifest in zip(plans, manifests, strict=True):
        if len(plan.parts) > 1:  # others have been checked
            check_digest(plan, manifest.parts())
    if elsewhere is not None:
        sent = deque[int]()
        for one in elsewhere(_pieces(plans, found, sent)):
            result.add(one)
            done += sent.popleft()
            if on_shard is not None:
                on_shard(done, n_shards)
    else:
        shards = ((manifest, at) for manifest in manifests for at in range(manifest.plan.n_shards))
        for checked in _checked(store, job.recipe, shards, found, deep=deep, n_shards=n_shards):
            _count_shard(checked, found, result)
            done += 1
            if on_shard is not None:
                on_shard(done, n_shards)
    result.superseded = NewestPlans(manifests).n_superseded
    for key in found.strange:
        result.unexpected += 1
        result.problem(f"{key} belongs to no plan of this output")
    return result


def _pieces(plans: Iterable[PlanRecord], found: StoredFiles, sent: deque[int]) -> Iterator[Piece]:
    """All shards, in order. `sent` gets the number of shards of each piece."""
    for plan in plans:
        for first in range(0, plan.n_shards, PIECE_SHARDS):
            shards = range(first, min(first + PIECE_SHARDS, plan.n_shards))
            keys = (key for at in shards for key in keys_of(shard_name(plan.plan8, at)))
            sent.append(len(shards))
            yield Piece(plan, shards, {key: found.get(key) for key in keys if key in found})


def audit_piece(store: Store, recipe: Recipe, manifest: Manifest, piece: Piece, *, deep: bool) -> Audit:
    """The audit of these shards alone, by the manifest of their plan."""
    result, shards = Audit(), ((manifest, at) for at in piece.shards)
    for one in _checked(store, recipe, shards, piece.sizes, deep=deep, n_shards=len(piece.shards)):
        _count_shard(one, piece.sizes, result)
    return result


def audit_shards(store: Store, recipe: Recipe, shards: Iterable[tuple[Manifest, int]]) -> Audit:
    """The quick audit of these shards alone, each given by its manifest and its number. Needs three small reads each.

    A run makes it of the shards that were committed, so that it finishes no output which `verify` rejects.
    """
    wanted, result = list(shards), Audit()
    found = StoredFiles(store, {manifest.plan.seq: manifest.plan for manifest, _ in wanted}.values())
    for one in _checked(store, recipe, iter(wanted), found, deep=False, n_shards=len(wanted)):
        _count_shard(one, found, result)
    return result


def _checked(
    store: Store,
    recipe: Recipe,
    shards: Iterator[tuple[Manifest, int]],
    found: Container[str],
    *,
    deep: bool,
    n_shards: int,
) -> Iterator[ShardCheck]:
    """The check of each shard, made if its clips file is in `found`. Threads read ahead."""

    def read(given: tuple[Manifest, int]) -> dict[str, Footer]:
        clips, *others = keys_of(name_of(*given))
        return {key: read_footer(store, key) for key in (clips, *others) if clips in found}

    def read_all(folder: Path, given: tuple[Manifest, int]) -> ShardCheck:
        one, again = ShardCheck(*given, recipe), folder / f"again-{get_ident()}.parquet"
        if clips_key(one.name) in found:
            deque(one.rows(store, clips=True, again=again), maxlen=0)  # reads to the end and keeps nothing
        return one

    with ExitStack() as stack:
        if deep:
            folder = stack.enter_context(scratch_folder("p3d-"))
            pool = stack.enter_context(ThreadPoolExecutor(THREADS))
            while some := list(islice(shards, AHEAD)):
                yield from pool.map(partial(read_all, folder), some)
            return
        each: Callable[..., Iterator[dict[str, Footer]]] = map  # threads cost more than they save on few local files
        if n_shards > FEW_SHARDS or store.url.startswith("s3://"):
            each = stack.enter_context(ThreadPoolExecutor(READERS)).map
        while some := list(islice(shards, AHEAD)):
            for (manifest, at), footers in zip(some, each(read, some), strict=True):
                one = ShardCheck(manifest, at, recipe)
                if footers:
                    one.footers(footers)
                yield one


def _count_shard(one: ShardCheck, found: Container[str], result: Audit) -> None:
    """Count a shard. One without any files is pending; of one without its clips file alone, all videos are lost."""
    name, n_videos = one.name, one.n_videos
    result.manifest += n_videos
    if clips_key(name) in found:
        result.shards += 1
    elif problem := lost_clips(name, n_videos, found):
        one.problems.append(problem)
    else:
        result.pending += n_videos
    for problem in one.problems:
        setattr(result, problem.kind, getattr(result, problem.kind) + problem.count)
        if problem.kind != "underived":
            result.problem(f"{problem.key} {problem.text}")
        if problem.key == clips_key(name):
            result.bad_shards.add(name)
        else:
            result.bad_derived.add(problem.key)
    if False in one.confirmed and True not in one.confirmed:  # nothing confirms that the clips are the committed ones
        result.bad_shards.add(name)
    if one.outcomes is not None:
        _count_outcomes(one, one.outcomes, result)


def _count_outcomes(one: ShardCheck, outcomes: Outcomes, result: Audit) -> None:
    """Count the videos and clips of a shard, and the shard for each version and setting that it was made with."""
    result.clips += one.n_clips
    for failure in outcomes.failures:
        if failure is None:
            result.ok += 1
        else:
            result.failed += 1
            reason = str(failure["reason"])
            result.reasons[reason] = result.reasons.get(reason, 0) + 1
    found = {name: one.stats[name] for name in SETTINGS if name in one.stats}
    if found.get("device") != "cpu":
        found.pop("threads", None)  # they have a meaning on a CPU only
    for counts, values in ((result.software, one.stats.get("software", {})), (result.settings, found)):
        for name, value in values.items():
            shown = "a record" if isinstance(value, dict | list) else str(value)[:SHOWN]
            shards = counts.setdefault(name, {})
            shards[shown] = shards.get(shown, 0) + 1
            result.examples.setdefault(name, {}).setdefault(shown, one.name)


def current_failures(store: Store) -> list[dict[str, Any]]:
    """The current rows of failures/: a video's state is that of the newest plan that names it. DamagedJob."""
    plans, roots = load_plans(store), load_roots(store)
    version = plans[0].schema_version if plans else SCHEMA_VERSION
    manifests = {plan.plan8: Manifest(store, plan) for plan in plans} if len(plans) > 1 else {}
    newest = NewestPlans(manifests.values())
    rows: list[dict[str, Any]] = []
    for info in data_files(store, "failures/"):
        with reading(store, info.key, f"`p3d verify {store.words()} --repair` repairs what can be repaired"):
            table = schema.read_parquet(io.BytesIO(store.read(info.key)))
            check(table.schema.equals(schema.failures_schema(version)), "it has other columns than p3d writes")
            if (old := _superseded(manifests, newest, info.key)) is not None:
                table = table.filter(pc.invert(pc.is_in(table["video_id"], old)))
            rows += columns.with_newer(table, columns.FAILURES, version).to_pylist()
    return [row | {"uri": row["uri"] and roots.now(row["uri"], row["plan_seq"])} for row in rows]


def _superseded(manifests: dict[str, Manifest], newest: NewestPlans, key: str) -> pa.ChunkedArray | None:
    """The ids of a data file's shard that a newer plan names; None if its shard is not one of these plans.

    The sorted ids would have to be read again for each file.
    """
    found = DATA_KEY.fullmatch(key)
    manifest = manifests.get(found[2]) if found else None
    if found is None or manifest is None or not newest.n_superseded or int(found[3]) >= manifest.plan.n_shards:
        return None
    shard = int(found[3])
    return manifest.rows(shard)["video_id"].filter(pa.array(~newest.of_shard(manifest, shard)))
