"""Collect the data of `p3d results report`: rows and sources by `p3d.pipeline.results.report`, runs in this module.

Reads only the store, even of a running job; needs neither torch nor Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np

from p3d.jobs.job import rows_of
from p3d.jobs.monitor.status import read_status
from p3d.jobs.scheduler import control
from p3d.pipeline.dataset.newest_rows import NewestRows
from p3d.pipeline.dataset.several import refuse_other_recipes
from p3d.pipeline.dataset.shard_times import ShardTime, shard_times
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.results.report.facts import Rows, gather, name_of
from p3d.pipeline.results.report.neighbours import find_neighbours
from p3d.pipeline.results.report.pictures import take_pictures
from p3d.pipeline.results.report.render import Report
from p3d.pipeline.results.report.throughput import RunFacts, RunRecord, timeline
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.store import Store, StoreOptions
from p3d.pipeline.storage.urls import short_names

SHOWN_OUTPUTS = 3  # in the title
RUNS = 12  # the newest ones are shown
OPTIONS = 100  # of a run that are shown
DEPTH = 3  # of records inside records in its options
NEIGHBOURS = 4  # of each query


def make_report(
    stores: Sequence[Store],
    options: StoreOptions,
    *,
    videos: int = 24,
    queries: int = 4,
    seed: int = 0,
    rule_of: Callable[[Store], SourceRule] = lambda _: EVERY_SOURCE,
    on_step: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Everything that a report shows of the jobs or snapshots at these stores: bounded samples, drawn by `seed`.

    `videos` is the number on the contact sheet, `queries` the number of clips whose neighbours are shown. If both are
    0, no source is opened, and else none that the rule of its output does not allow. NoSuchJob, DamagedJob; OtherRecipe
    if the rows of the outputs are not comparable.
    """

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if on_step is None else lambda done, count: on_step(what, done, count)

    sources = [rows_of(store) for store in stores]
    refuse_other_recipes(sources)
    rng = np.random.default_rng(seed)
    facts = gather(sources, sample=videos, rng=rng, on_step=told("rows"))
    like = find_neighbours(sources, queries=queries, top=NEIGHBOURS, rng=rng, on_step=told("clips"))
    wanted = [(one, one.duration_s / 2) for one in facts.sample]
    wanted += [(clip.video, clip.middle_s) for query, others in like.found for clip in (query, *others)]
    (first, *more), urls = sources, [name_of(one) for one in sources]
    return Report(
        out=", ".join(urls[:SHOWN_OUTPUTS]) + (f" and {len(urls) - SHOWN_OUTPUTS} more" * (len(urls) > SHOWN_OUTPUTS)),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        job=first.job,
        plans=() if more else tuple(first.plans.items()),
        run=None if more else _run(first),
        facts=facts,
        neighbours=like,
        pictures=take_pictures(wanted, options, {name_of(one): (rule_of(one.store), one.place) for one in sources}),
        seed=seed,
        states=tuple(map(_state, sources)) if more else (),
        names=short_names(urls),
    )


def _state(source: Rows) -> str:
    return read_status(source.store, source.job).state if isinstance(source, NewestRows) else "snapshot"


def _run(source: Rows) -> RunFacts | None:
    """The runs of a job; None for a snapshot, which does not record them."""
    if not isinstance(source, NewestRows):
        return None
    store = source.store
    status = read_status(store, source.job)
    trouble, shards = "", list[ShardTime]()
    try:
        shards = shard_times(store)
    except DamagedJob as error:
        trouble = str(error)
    return RunFacts(
        state=status.state,
        sentence=status.sentence,
        runs=tuple(_runs(store)),
        software=tuple(sorted(source.job.versions.items())),
        timeline=timeline(shards),
        trouble=trouble,
    )


def _runs(store: Store) -> list[RunRecord]:
    """The newest runs, oldest first."""
    found = []
    for number in control.epoch_numbers(store)[-RUNS:]:
        if (epoch := control.read_epoch(store, number)) is None:
            found.append(RunRecord(number, "", "", "its record cannot be read", ()))
            continue
        beat = control.heartbeat(store, epoch.number)
        state = beat.state if beat else "unknown"
        state = "dead" if state == control.RUNNING and epoch.died_here() else state
        found.append(RunRecord(epoch.number, epoch.started, epoch.host, state, tuple(_flat(epoch.options)[:OPTIONS])))
    return found


def _flat(options: dict[str, Any], before: str = "", depth: int = 1) -> list[tuple[str, str]]:
    """(name, value) of all options that are set, as text; nested names are joined by dots."""
    found: list[tuple[str, str]] = []
    for name, value in options.items():
        if isinstance(value, list) or (isinstance(value, dict) and depth == DEPTH):
            found.append((before + name, "..."))
        elif isinstance(value, dict):
            found += _flat(value, f"{before}{name}.", depth + 1)
        elif value is not None and value is not False:
            found.append((before + name, f"{value:g}" if isinstance(value, float) else str(value)))
    return found
