"""Audit an output against its plans, from the store alone (invariants I1 to I7 of docs/reliability.md).

The classes are Jepsen's. A video of the manifest is ok, failed with a reason, or pending (its shard is not committed
yet; a resume computes it). Everything else is damage: lost, duplicated, unexpected, changed.

    quick  listings and footers: every video accounted for, every file complete and made from the stored clips
    deep   also every page against its checksum, and every pooled row computed again: finds a flipped bit
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p3d.pipeline.dataset import columns, schema
from p3d.pipeline.dataset.commit import clips_key, data_files, derived, failures_key, videos_key
from p3d.pipeline.dataset.files import UNREADABLE, check, reading
from p3d.pipeline.dataset.plans import Manifest, load_plans
from p3d.pipeline.errors import DamagedJob, StoreMissing
from p3d.pipeline.recipe import JobRecord, Recipe
from p3d.pipeline.storage.local import scratch_folder, writing
from p3d.pipeline.storage.store import Store
from p3d.pipeline.types import ShardPlan, VideoOutcome
from p3d.pipeline.types.versions import SCHEMA_VERSION

FOLDERS = ("clips/", "videos/", "failures/")
MAX_PROBLEMS = 1000  # messages kept; all problems are counted
READERS = 16  # threads that read footers
FEW_SHARDS = 256  # up to which the footers of local files are read by one thread
AHEAD = 128  # shards whose footers are in memory
# of a footer: what is no part of the recipe, and may still change the last bits of a vector. Versions do, too
SETTINGS = ("device", "batch_size", "threads")
SHOWN = 100  # characters of a value of a footer


@dataclass(slots=True)
class Audit:
    """Counts of videos, and a message for each problem found. `unexpected` also counts files of no plan.

    `underived` counts missing videos and failures files, as after a kill. A resume makes them, as it does `pending`.
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


def audit(
    store: Store, job: JobRecord, *, deep: bool = True, on_shard: Callable[[int, int], None] | None = None
) -> Audit:
    """Check everything under clips/, videos/ and failures/. `on_shard(done, all)` is called after each shard.

    Raises DamagedJob if the plans themselves cannot be trusted.
    """
    found, result, expected = _listed(store), Audit(), set[str]()
    plans = load_plans(store)
    n_shards, done = sum(plan.n_shards for plan in plans), 0
    for plan in plans:
        if plan.recipe_digest != job.recipe.digest:
            raise DamagedJob(f"{store.url}/{plan.folder} was made for another recipe than job.json holds")
        manifest = Manifest(store, plan)
        shards = [(manifest, at) for at in range(plan.n_shards)]
        for shard, footers in _with_footers(store, shards, {} if deep else found):
            expected.update(_keys(shard.name))
            if not _absent(shard, found, result):
                if deep:
                    _audit_rows(store, job.recipe, manifest, shard, result)
                else:
                    _audit_footers(job.recipe, shard, footers, found, result)
            done += 1
            if on_shard is not None:
                on_shard(done, n_shards)
    for key in sorted(found.keys() - expected):
        result.unexpected += 1
        result.problem(f"{key} belongs to no plan of this output")
    return result


def audit_shards(store: Store, recipe: Recipe, shards: Iterable[tuple[Manifest, int]]) -> Audit:
    """The quick audit of these shards alone, each given by its manifest and its number. Needs three small reads each.

    A run makes it of the shards that were committed, so that it finishes no output which `verify` rejects.
    """
    found, result = _listed(store), Audit()
    for shard, footers in _with_footers(store, list(shards), found):
        if not _absent(shard, found, result):
            _audit_footers(recipe, shard, footers, found, result)
    return result


def _listed(store: Store) -> dict[str, int]:
    """key -> bytes of every data file. Derived files are listed first: of a shard that is committed meanwhile, the
    clips file is then seen in any case.
    """
    return {info.key: info.size_bytes for folder in reversed(FOLDERS) for info in data_files(store, folder)}


def _keys(name: str) -> tuple[str, str, str]:
    return clips_key(name), videos_key(name), failures_key(name)


# of a data file: the entries of its footer, its number of rows and its columns; or why they cannot be read
_Footer = tuple[dict[str, str], int, pa.Schema] | Exception


def _with_footers(
    store: Store, shards: list[tuple[Manifest, int]], found: dict[str, int]
) -> Iterator[tuple[ShardPlan, dict[str, _Footer]]]:
    """Each shard with the footers of those of its files that are in `found`, which threads read ahead."""

    def read(name: str) -> dict[str, _Footer]:
        return {key: _footer(store, key) for key in _keys(name) if key in found}

    with ExitStack() as stack:
        each: Callable[..., Iterator[dict[str, _Footer]]] = map  # threads cost more than they save on few local files
        if len(shards) > FEW_SHARDS or store.url.startswith("s3://"):
            each = stack.enter_context(ThreadPoolExecutor(READERS)).map
        for first in range(0, len(shards), AHEAD):
            some = [manifest.shard(at) for manifest, at in shards[first : first + AHEAD]]
            yield from zip(some, each(read, (shard.name for shard in some)), strict=True)


def _footer(store: Store, key: str) -> _Footer:
    try:
        with store.open(key) as content, schema.open_parquet(content) as file:
            return schema.read_footer(file), file.metadata.num_rows, file.schema_arrow
    except UNREADABLE as error:
        return error


def _absent(shard: ShardPlan, found: dict[str, int], result: Audit) -> bool:
    """True if the shard has no clips file. It is lost if files that were made from it exist, else pending."""
    result.manifest += len(shard.videos)
    made = [key for key in (videos_key(shard.name), failures_key(shard.name)) if key in found]
    if clips_key(shard.name) not in found:
        if made:
            result.lost += len(shard.videos)
            result.problem(f"{clips_key(shard.name)} is gone, but {' and '.join(made)} were made from it")
            result.bad_shards.add(shard.name)
        else:
            result.pending += len(shard.videos)
        return True
    result.shards += 1
    return False


def _audit_footers(
    recipe: Recipe, shard: ShardPlan, footers: dict[str, _Footer], found: dict[str, int], result: Audit
) -> None:
    """Check the footers of a shard's three files against the plan, the listing and each other."""
    key = clips_key(shard.name)
    try:
        footer, n_clips, columns = _sound(footers[key])
        outcomes = schema.parse_outcomes(footer[schema.OUTCOMES_KEY], recipe.schema_version)
        _note_settings(shard.name, footer, result)
    except UNREADABLE as error:
        return _bad_shard(shard, f"{key} is damaged: {error}", result)
    if not columns.equals(schema.clips_schema(recipe)):
        return _bad_shard(shard, f"{key} has other columns than this job writes", result)
    _check_ids(shard, outcomes, result)
    result.clips += n_clips
    if n_clips != sum(outcome.n_clips for outcome in outcomes):
        _bad_shard(shard, f"{key} has {n_clips} rows, and its outcomes have another number", result)
    n_failed = sum(outcome.failure is not None for outcome in outcomes)
    for other, n_rows in ((videos_key(shard.name), len(outcomes) - n_failed), (failures_key(shard.name), n_failed)):
        if other not in found:
            result.underived += 1
            result.bad_derived.add(other)
            continue
        try:
            footer, rows, _ = _sound(footers[other])
            stated = json.loads(footer[schema.SOURCE_KEY])["size_bytes"]
        except UNREADABLE as error:
            _bad_derived(other, n_rows, f"{other} is damaged: {error}", result)
            continue
        if (rows, stated) != (n_rows, found[key]):
            _bad_derived(other, n_rows, f"{other} does not belong to the clips that are stored now", result)
    return None


def _sound(footer: _Footer) -> tuple[dict[str, str], int, pa.Schema]:
    if isinstance(footer, Exception):
        raise footer
    return footer


def _note_settings(shard: str, footer: dict[str, str], result: Audit) -> None:
    """Count the shard for each version and setting it was made with. `threads` has a meaning on a CPU only."""
    stats = json.loads(footer[schema.STATS_KEY])
    found = {name: stats[name] for name in SETTINGS if name in stats}
    if found.get("device") != "cpu":
        found.pop("threads", None)
    for counts, values in ((result.software, stats.get("software", {})), (result.settings, found)):
        for name, value in values.items():
            shards, value = counts.setdefault(name, {}), str(value)[:SHOWN]
            shards[value] = shards.get(value, 0) + 1
            result.examples.setdefault(name, {}).setdefault(value, shard)


def _bad_shard(shard: ShardPlan, message: str, result: Audit) -> None:
    result.changed += len(shard.videos)
    result.bad_shards.add(shard.name)
    result.problem(message)


def _bad_derived(key: str, n_rows: int, message: str, result: Audit) -> None:
    result.changed += n_rows or 1
    result.bad_derived.add(key)
    result.problem(message)


def _audit_rows(store: Store, recipe: Recipe, manifest: Manifest, shard: ShardPlan, result: Audit) -> None:
    """Check every page of a shard's three files, and that the derived files follow from its clips."""
    content = store.read(clips_key(shard.name))
    try:
        file = schema.open_parquet(io.BytesIO(content))
        footer = schema.read_footer(file)
        outcomes = schema.parse_outcomes(footer[schema.OUTCOMES_KEY], recipe.schema_version)
        table = file.read(use_threads=False)
        _note_settings(shard.name, footer, result)
    except UNREADABLE as error:
        return _bad_shard(shard, f"{clips_key(shard.name)} is damaged: {error}", result)
    if not table.schema.equals(schema.clips_schema(recipe)):
        return _bad_shard(shard, f"{clips_key(shard.name)} has other columns than this job writes", result)
    _check_ids(shard, outcomes, result)
    _check_clips(shard, outcomes, table, recipe, result)
    if shard.name in result.bad_shards:
        return None
    features_RD = schema.features_of(table["embedding"], recipe.feature_dim)
    probs_RK, own = schema.probs_of(table, recipe.n_scores), manifest.user_columns(shard.shard)
    from_these: list[bool | None] = []
    for key, rows, footer in derived(shard, content, outcomes, features_RD, probs_RK, recipe, own):
        from_these.append(_check_derived(store, key, rows, footer, result))
    if False in from_these and True not in from_these:  # nothing confirms that these bytes are the committed ones
        result.bad_shards.add(shard.name)
    return None


def _check_ids(shard: ShardPlan, outcomes: tuple[VideoOutcome, ...], result: Audit) -> None:
    """I1: the outcomes name exactly the manifest's videos."""
    planned = {video.video_id for video in shard.videos}
    seen = Counter(outcome.video.video_id for outcome in outcomes)
    for outcome in outcomes:
        if outcome.failure is not None:
            result.failed += 1
            reason = str(outcome.failure.reason)
            result.reasons[reason] = result.reasons.get(reason, 0) + 1
        else:
            result.ok += 1
    for name, count, ids in (
        ("lost", "lost", planned - seen.keys()),
        ("unexpected", "unexpected", seen.keys() - planned),
        ("twice in its shard", "duplicated", {video_id for video_id, n in seen.items() if n > 1}),
    ):
        if ids:
            setattr(result, count, getattr(result, count) + len(ids))
            result.bad_shards.add(shard.name)
            result.problem(f"{clips_key(shard.name)}: {len(ids)} videos are {name}, such as {sorted(ids)[0]}")


def _check_clips(
    shard: ShardPlan, outcomes: tuple[VideoOutcome, ...], table: pa.Table, recipe: Recipe, result: Audit
) -> None:
    """I2 and I6: clip indices 0 .. n - 1 of each video, each once and in order; times increase; vectors are usable."""
    rows = list(zip(table["video_id"].to_pylist(), table["clip_index"].to_pylist(), strict=True))
    expected = [(o.video.video_id, at) for o in outcomes for at in range(o.n_clips)]
    result.clips += len(rows)
    if rows != expected:
        twice = len(rows) - len(set(rows))
        result.duplicated += twice
        result.lost += len({video for video, _ in set(expected) - set(rows)})
        result.unexpected += len({video for video, _ in set(rows) - set(expected)})
        result.bad_shards.add(shard.name)
        result.problem(f"{clips_key(shard.name)}: clip rows are not those of its outcomes ({twice} twice)")
    features_RD = schema.features_of(table["embedding"], recipe.feature_dim)
    usable = bool(np.isfinite(features_RD).all() and (features_RD != 0).any(axis=1).all())
    usable = usable and bool(schema.sound_probs(schema.probs_of(table, recipe.n_scores)).all())
    times = all(
        pc.all(pc.less(table[start], table[end])).as_py() is not False
        for start, end in (("start_frame", "end_frame"), ("start_s", "end_s"))
    )
    if not (usable and times):
        result.changed += 1
        result.bad_shards.add(shard.name)
        result.problem(f"{clips_key(shard.name)}: {usable = }, {times = }: rows hold impossible values")


def _check_derived(store: Store, key: str, rows: pa.Table, footer: dict[str, str], result: Audit) -> bool | None:
    """I5: a derived file names the clips object it was made from, and equals what is made from that object now.

    A file written by this version of Arrow must be the same to the byte. One written by another version must have the
    same schema and values. Returns whether it was made from these very clips, None if that cannot be read.
    """
    try:
        content = store.read(key)
        file = schema.open_parquet(io.BytesIO(content))
        stated = json.loads(schema.read_footer(file)[schema.SOURCE_KEY])
        table, writer = file.read(use_threads=False), stated["writer"]
    except StoreMissing:
        result.underived += 1
        result.bad_derived.add(key)
        return None
    except UNREADABLE as error:
        _bad_derived(key, rows.num_rows, f"{key} is damaged: {error}", result)
        return None
    if stated != json.loads(footer[schema.SOURCE_KEY]) | {"writer": writer}:
        _bad_derived(key, rows.num_rows, f"{key} was made from other clips than those that are stored now", result)
        return False
    same = table.schema.equals(rows.schema) and table.combine_chunks().equals(rows.combine_chunks())
    if writer == pa.cpp_version:
        with scratch_folder("p3d-") as folder, writing(path := folder / "again"):
            schema.write_parquet(path, rows, footer)
            same = path.read_bytes() == content
    if not (same and file.metadata.created_by.endswith(f" {writer}")):
        _bad_derived(key, rows.num_rows, f"{key} does not hold what its clips give", result)
    return True


def current_failures(store: Store) -> list[dict[str, Any]]:
    """The current rows of failures/: a video's state is that of the newest plan that names it. DamagedJob."""
    plans = load_plans(store)
    version = plans[0].schema_version if plans else SCHEMA_VERSION
    newest: dict[str, int] = {}
    if len(plans) > 1:
        for plan in plans:
            newest.update(dict.fromkeys(Manifest(store, plan).videos["video_id"].to_pylist(), plan.seq))
    rows: list[dict[str, Any]] = []
    for info in data_files(store, "failures/"):
        with reading(store, info.key, f"`p3d verify {store.words()} --repair` repairs what can be repaired"):
            table = schema.read_parquet(io.BytesIO(store.read(info.key)))
            check(table.schema.equals(schema.failures_schema(version)), "it has other columns than p3d writes")
            rows += columns.with_newer(table, columns.FAILURES, version).to_pylist()
    return [row for row in rows if newest.get(row["video_id"], row["plan_seq"]) == row["plan_seq"]]
