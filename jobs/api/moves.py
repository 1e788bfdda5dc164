"""Record that source videos have moved, and look for them: `p3d relocate` and `p3d status --sources`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from p3d.jobs.api.keywords import path_of
from p3d.jobs.job import manifests, read_job
from p3d.jobs.trust import Say, need_trust
from p3d.pipeline.dataset.plans import Manifest, NewestPlans
from p3d.pipeline.dataset.roots import Compared, RootRecord, add_root, load_roots
from p3d.pipeline.dataset.schema import MANIFEST
from p3d.pipeline.dataset.snapshot_record import SNAPSHOT_KEY
from p3d.pipeline.errors import InputError, counted
from p3d.pipeline.recipe import JobRecord
from p3d.pipeline.sources.below import place_of_videos
from p3d.pipeline.sources.listing import look_again
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import VideoRef, size_version

SAMPLE = 500  # videos that are looked at, drawn with a fixed seed
BATCH = 2000  # videos that are looked at together
SHOWN = 3  # in a message
FIELDS_ONLY = pa.schema([MANIFEST.field(name) for name in VideoRef.__slots__])


@dataclass(frozen=True, slots=True)
class Relocated:
    """What `relocate` found and recorded.

    `videos` of the output are below the old place. `looked_at` of them were looked for at the new one: `same` have what
    was `compared` (their version, or only their size), `gone` are not there, and `changed` have another size. `key` is
    that of the record in the output.
    """

    out: str
    old: str
    new: str
    key: str
    compared: Compared
    videos: int
    looked_at: int
    same: int
    gone: int
    changed: int


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the videos of an output are now: `there` as they were planned, `changed`, or `gone`.

    A video is gone if it cannot be found, or may not be reached.
    """

    there: int
    changed: int
    gone: int
    examples: tuple[str, ...] = ()


def relocate(
    out: str | os.PathLike[str],
    old: str | os.PathLike[str],
    new: str | os.PathLike[str],
    *,
    allow_changed: bool = False,
    trust: bool = False,
    say: Say | None = None,
    s3: StoreOptions = DEFAULTS,
) -> Relocated:
    """Record that the source videos of `out` below `old` are now below `new`, as `p3d relocate` does.

    `old` and `new` are folders or `s3://bucket/prefix`. A sample of the videos is looked for at `new`. If the version
    of one differs, as after a copy that did not keep the times, the sizes are compared. Nothing in `out` is changed: a
    record is added, which retries, reports, pages, searches and later plans use.

    InputError if no video of `out` is below `old`, if the sample is not at `new`, or if a video there has another size
    and not `allow_changed`. Untrusted, NoSuchJob, DamagedJob, AlreadyRunning, StoreError.
    """
    store = open_store(path_of(out, "out"), s3)
    was, now = (place_of_videos(path_of(place, name)) for place, name in ((old, "old"), (new, "new")))
    if was == now:
        raise InputError(f"the old and the new place are the same: {was}")
    if store.head("job.json") is None and store.head(SNAPSHOT_KEY) is not None:
        raise InputError(f"{store.url} is a snapshot; relocate its job, and make the snapshot again")
    job = read_job(store)
    s3 = need_trust(store, job, s3, trust_it=trust, verb="relocate", say=say or (lambda _: None))
    records, plans = load_roots(store).records, manifests(store, job)
    record = RootRecord(
        len(records) + 1,
        was,
        now,
        max(plans, default=1),
        "version",
        time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        job.recipe.schema_version,
    )
    videos = _newest(plans, lambda uri: record.moved(uri) is not None)
    if not videos.num_rows:
        if records and (records[-1].old, records[-1].new) == (was, now):
            raise InputError(f"{store.url} already says that {was} is now {now}, in {records[-1].key}")
        raise InputError(f"no video of {store.url} is below {was}; `p3d trust {store.words()}` shows where they are")
    looked = videos.filter(np.greater_equal(videos["size_bytes"].to_numpy(), 0))
    chosen = np.random.default_rng(0).permutation(looked.num_rows)[:SAMPLE]
    looked = looked.take(np.sort(chosen))
    uris = [record.moved(uri) for uri in looked["uri"].to_pylist()]
    at = looked.schema.get_field_index("uri")
    again = look_again(looked.set_column(at, looked.schema.field(at), pa.array(uris, pa.string())), s3)
    planned, found = _refs(looked), _refs(again)
    gone = [one for one in found if one.size_bytes < 0]
    changed = [pair for pair in zip(planned, found, strict=True) if 0 <= pair[1].size_bytes != pair[0].size_bytes]
    if not found:
        raise InputError(f"no video below {was} existed when it was planned, so there is nothing to compare")
    if len(gone) == len(found):
        raise InputError(f"none of the {counted(len(found), 'video')} looked for is below {now}, such as {gone[0].uri}")
    if changed and not allow_changed:
        shown = ", ".join(f"{a.path} ({b.size_bytes} bytes, not {a.size_bytes})" for a, b in changed[:SHOWN])
        raise InputError(
            f"{len(changed)} of {counted(len(found), 'video')} looked at have another size below {now}: {shown}. Check "
            "the place; with --allow-changed they count as changed, and a launch embeds them again"
        )
    same_size = [pair for pair in zip(planned, found, strict=True) if pair[0].size_bytes == pair[1].size_bytes]
    if any(a.version != b.version for a, b in same_size):
        record = replace(record, compared="size")
    store.prove_create_once()
    add_root(store, record)
    return Relocated(
        store.url,
        was,
        now,
        record.key,
        record.compared,
        videos.num_rows,
        len(found),
        len(same_size),
        len(gone),
        len(changed),
    )


def look_for_sources(
    store: Store, job: JobRecord, s3: StoreOptions, on_step: Callable[[int, int], None] | None = None
) -> Sources:
    """Look for every video of a job where it is now. One request for each video on S3. The job must be trusted."""
    plans = manifests(store, job)
    newest = NewestPlans(plans.values())
    there = changed = done = 0
    gone: list[str] = []
    for manifest, videos in _batches(plans, newest):
        seq = manifest.plan.seq
        planned = [manifest.roots.video(video, seq) for video in _refs(videos)]
        for now, found in zip(planned, _refs(look_again(manifest.roots.table(videos, seq), s3)), strict=True):
            same = now.version in (found.version, size_version(found.size_bytes))
            if found.size_bytes < 0:
                gone.append(found.path)
            else:
                there, changed = there + same, changed + (not same)
        done += videos.num_rows
        if on_step is not None:
            on_step(done, newest.n_videos)
    return Sources(there, changed, len(gone), tuple(gone[:SHOWN]))


def _newest(plans: dict[int, Manifest], chosen: Callable[[str], bool]) -> pa.Table:
    """The rows of the newest plans whose current uri is chosen, each with that uri; FIELDS only."""
    tables = [FIELDS_ONLY.empty_table()]
    for manifest, videos in _batches(plans, NewestPlans(plans.values())):
        now = manifest.roots.table(videos, manifest.plan.seq)
        tables.append(now.filter([uri is not None and chosen(uri) for uri in now["uri"].to_pylist()]))
    return pa.concat_tables(tables)


def _batches(plans: dict[int, Manifest], newest: NewestPlans) -> Iterator[tuple[Manifest, pa.Table]]:
    """The rows whose videos no newer plan names, with their plan; FIELDS only."""
    for manifest in plans.values():
        for first, videos in manifest.numbered_parts():
            current_N = newest.current(manifest.plan.seq, first, first + videos.num_rows)
            rows = videos.select(FIELDS_ONLY.names).filter(pa.array(current_N))
            for at in range(0, rows.num_rows, BATCH):
                yield manifest, rows.slice(at, BATCH)


def _refs(rows: pa.Table) -> list[VideoRef]:
    return [VideoRef(**row) for row in rows.select(list(VideoRef.__slots__)).to_pylist()]
