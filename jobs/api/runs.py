"""Launch, resume and retry a job from Python. The command line is a client of these functions.

launch_job, resume_job, retry_job   do it, and return what is left to report (`Ran`); messages go to `say`
launch, resume, retry               the same with keyword arguments; they return the Status, and raise an error
                                    unless the job has finished
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from p3d.jobs.api.keywords import explicit, listed, path_of
from p3d.jobs.job import glance, look, manifests, read_job, refuse_damaged, refuse_other_job, refuse_strange
from p3d.jobs.monitor.status import Status, read_status
from p3d.jobs.planning.changes import rule_of_launch
from p3d.jobs.planning.job_spec import JobSpec
from p3d.jobs.planning.places import check_places
from p3d.jobs.planning.prepare import (
    Prepared,
    add_plan,
    add_retry,
    create_job,
    kind_of_device,
    prepare,
    refuse_unfit_device,
    run_options,
)
from p3d.jobs.planning.shard_size import Sample, known_sizing
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.run import COMPLETE, DAMAGED, ClaimedRun, ShowProgress, run_job
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.trust import (
    Say,
    is_trusted,
    keep_options,
    need_trust,
    origin_of,
    remember,
    skipped_plans,
    take_on_trust,
)
from p3d.pipeline.dataset.plans import load_plans
from p3d.pipeline.dataset.verify import current_failures
from p3d.pipeline.errors import (
    AlreadyRunning,
    DamagedJob,
    InputError,
    JobError,
    Reason,
    StoreError,
    Unfinished,
    check_reasons,
    counted,
)
from p3d.pipeline.recipe import (
    JobRecord,
    MaxFailures,
    PlanKeywords,
    PlanOptions,
    RecipeKeywords,
    RecipeOptions,
    RunKeywords,
    RunOptions,
    ShardSizing,
    digest,
    new_job_id,
)
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule, absolute
from p3d.pipeline.sources.listing import find, root_of
from p3d.pipeline.storage.cache import cache_folder
from p3d.pipeline.storage.store import DEFAULTS, Store, StoreOptions
from p3d.pipeline.storage.urls import open_store

if TYPE_CHECKING:
    from p3d.jobs.machine import Machines
    from p3d.jobs.scheduler.cluster import Cluster

OnProgress = Callable[[RunSnapshot], None]
REFUSED = 5  # exit code of a run that another one has taken over from


class LaunchKeywords(RecipeKeywords, PlanKeywords, RunKeywords, total=False):
    """The options of a launch as keyword arguments."""


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run has left: the exit code of its command, None if there was nothing to do."""

    store: Store
    job: JobRecord
    code: int | None = None

    def status(self) -> Status:
        """The status of the job now."""
        return read_status(self.store, self.job, over=self.code is not None)


@dataclass(frozen=True, slots=True)
class HowToRun:
    """Where and how a job runs: options of `RunOptions` that were given, and the functions that tell about the run."""

    given: dict[str, Any]
    s3: StoreOptions
    address: str | None
    takeover: bool
    trust: bool
    say: Say
    show_progress: ShowProgress


def launch_job(src: str, out: str, spec: JobSpec, plan: PlanOptions, how: HowToRun) -> Ran:
    """Embed the videos of SRC into OUT. JobError of any kind."""
    say, s3, store = how.say, how.s3, open_store(out, how.s3)
    absolute(root_of(src))  # refuses an empty text before anything is started
    with cluster_at(how.address, store, say) as cluster:
        there = cluster.machines if cluster else None
        check_places(src, store, plan, s3, say)
        options = _options(how.given, s3, there=there)
        say("loading the network ...")
        prepared = prepare(spec, s3, store)
        refuse_unfit_device(prepared.recipe, options.device, there)
        existing = refuse_other_job(store, prepared.recipe, prepared.origin)
        say(f"listing {src} ...")
        kept, column = _kept_listing(src, store, plan, s3), plan.id_column
        found = find(src, s3, id_column=column, include=plan.include, exclude=plan.exclude, tell=say, kept=kept)
        store.prove_create_once()
        earlier = load_plans(store) if existing else []
        known = known_sizing(plan.shard_videos, earlier, _kind(options, cluster))
        epoch = control.claim(store, options.to_dict(), takeover=how.takeover, say=say)
        with (
            control.Pulse(store, epoch.number) as pulse,
            Sample(found.videos, prepared.recipe.sampling, s3, known) as sample,
        ):
            job, trusted = job_of(store, prepared, existing, s3, how.trust, say)
            rule = rule_of_launch(src, found.videos, trusted)
            plans = {} if trusted else manifests(store, job)
            skipped = skipped_plans(plans, look(store, plans).todo, rule) if plans else {}
            sizing = sample.sizing(prepared.clips_per_s, options.workers)
            added = add_plan(store, job, found, sizing=sizing, limit=plan.limit, without=skipped, say=say)
            found.forget()
            if plan.shard_videos and any(one.sizing != sizing for one in earlier):
                say(f"--shard-videos {plan.shard_videos} is for new plans; shards of earlier plans stay as they are")
            if added is None:
                say("nothing in SRC is new or changed")
            else:
                planned = f"{counted(added.n_videos, 'video')} in {counted(added.n_shards, 'shard')}"
                say(f"{planned}, {counted(added.n_skipped, 'other file')} skipped")
            own_plan = added.digest if added else ""
            run = ClaimedRun(store, options, epoch, pulse, cluster, rule, own_plan)
            return Ran(store, job, run_job(out, job, run, say=say, show_progress=how.show_progress))


def _kept_listing(src: str, store: Store, plan: PlanOptions, s3: StoreOptions) -> Path | None:
    """A folder in this user's cache for the listing of a launch, so that a kill does not start it again."""
    named = [src, store.url, s3.endpoint_url, s3.profile, list(plan.include), list(plan.exclude)]
    with contextlib.suppress(InputError):
        return cache_folder() / "listing" / digest(named)[:32]
    return None


def job_of(
    store: Store, prepared: Prepared, existing: JobRecord | None, s3: StoreOptions, trust: bool, say: Say
) -> tuple[JobRecord, bool]:
    """The job of a launch, created unless it exists, and whether it is trusted. A new one is recorded as this user's.

    The record is written first, so that no kill in between leaves a job that its own user has to trust.
    """
    job_id = new_job_id()
    if existing is None and (warning := remember(store, job_id, "launched", s3)):
        say(warning)
    job = create_job(store, prepared, job_id)
    if job.job_id == job_id:
        return job, True
    if trust:
        take_on_trust(store, job, s3, say)
        return job, True
    trusted = is_trusted(store, job)
    if warning := keep_options(store, job, s3):
        say(warning)
    if not trusted:
        say(
            f"{store.url} is not trusted: this job was launched {origin_of(store)}. Only videos of SRC are read; "
            f"`p3d trust {store.words()}` or --trust allows all that its plans name"
        )
    return job, trusted


def resume_job(out: str, source: str | None, how: HowToRun, elsewhere: Elsewhere | None = None) -> Ran | int:
    """Continue the job at OUT. `elsewhere` runs what is left on another machine, and returns its exit code."""
    say, store = how.say, open_store(out, how.s3)
    job = read_job(store)
    root = None if source is None else absolute(source)
    trusted, s3 = how.trust or is_trusted(store, job), how.s3
    if trusted or root is None:
        otherwise = f"`p3d resume {store.words(out)} --source ROOT` reads only videos below ROOT"
        s3 = need_trust(store, job, s3, trust_it=how.trust, verb="resume", say=say, otherwise=otherwise)
    plans = manifests(store, job)
    work = glance(store, plans) or look(store, plans)
    refuse_strange(store, work)
    if work.nothing_left and work.n_shards:
        refuse_damaged(store, job, plans, work.unsummarised)
        say(f"nothing to do: all {work.n_videos} videos are accounted for")
        return Ran(store, job)
    if elsewhere is not None:
        return elsewhere(store, s3, trusted)
    rule = EVERY_SOURCE if root is None else SourceRule(root)
    with _next_run(out, store, job, how, s3, rule, trusted=trusted) as run:
        return Ran(run.store, job, run_job(out, job, run, say=say, show_progress=how.show_progress))


def retry_job(
    out: str, reasons: Sequence[str], plan: PlanOptions, how: HowToRun, elsewhere: Elsewhere | None = None
) -> Ran | int:
    """Retry the failed videos of OUT, all of them or those with one of the reasons. `elsewhere` as in `resume_job`."""
    check_reasons(reasons)
    say, store = how.say, open_store(out, how.s3)
    job = read_job(store)
    s3 = need_trust(store, job, how.s3, trust_it=how.trust, verb="retry", say=say)
    failed = {row["video_id"] for row in current_failures(store) if not reasons or row["reason"] in reasons}
    if not failed:
        say("nothing to retry: no video of this output has failed" + (" for these reasons" if reasons else ""))
        return Ran(store, job)
    if elsewhere is not None:
        return elsewhere(store, s3, True)
    with _next_run(out, store, job, how, s3, EVERY_SOURCE) as run:
        known = known_sizing(plan.shard_videos, load_plans(run.store), _kind(run.options, run.cluster))
        added = add_retry(run.store, job, frozenset(reasons), run.options.s3, sizing=known or ShardSizing())
        if added is not None:
            say(f"{counted(added.n_videos, 'video')} to retry, in {counted(added.n_shards, 'shard')}")
        code = run_job(out, job, run, say=say, show_progress=how.show_progress)
        if code in COMPLETE:
            failed_again = [row for row in current_failures(run.store) if row["video_id"] in failed]
            again, reasons_now = len(failed_again), {row["reason"] for row in failed_again}
            say(f"{len(failed) - again} of {counted(len(failed), 'retried video')} recovered, {again} failed again")
            if again and reasons_now == {Reason.SOURCE_MISSING}:
                say(f"none of their files exists: if they have moved, see `p3d relocate {store.words(out)} --help`")
        return Ran(run.store, job, code)


# runs the rest of a job on another machine, with the store options and the trust of this user; returns the exit code
Elsewhere = Callable[[Store, StoreOptions, bool], int]


@contextlib.contextmanager
def _next_run(
    out: str, store: Store, job: JobRecord, how: HowToRun, s3: StoreOptions, rule: SourceRule, *, trusted: bool = True
) -> Iterator[ClaimedRun]:
    """Join the given cluster, determine the options, and claim the next run. Without trust nothing is inherited."""
    with cluster_at(how.address, store, how.say) as cluster:
        there = cluster.machines if cluster else None
        last = control.newest_epoch(store) if trusted else None
        options = _options(how.given, s3, last.options if last else {}, there)
        refuse_unfit_device(job.recipe, options.device, there)
        store = open_store(out, options.s3)
        epoch = control.claim(store, options.to_dict(), takeover=how.takeover, say=how.say)
        with control.Pulse(store, epoch.number) as pulse:
            yield ClaimedRun(store, options, epoch, pulse, cluster, rule)


def _kind(options: RunOptions, cluster: Cluster | None) -> str:
    """The kind of device whose speed decides the size of shards; empty for machines of a cluster, which may differ."""
    return "" if cluster else kind_of_device(options.device)


def _options(
    given: dict[str, Any], s3: StoreOptions, last: dict[str, Any] | None = None, there: Machines | None = None
) -> RunOptions:
    """The options of speed and fault tolerance. A resume inherits those of the last run, `last`, but not `s3`."""
    limit = given.get("max_failures")
    return run_options(last or {}, there=there, **given | {"max_failures": MaxFailures.parse(limit), "s3": s3})


@contextlib.contextmanager
def cluster_at(address: str | None, store: Store, say: Say) -> Iterator[Cluster | None]:
    """Join the given cluster; None for this machine, whose own cluster is started later.

    If a submitted driver is refused or fails before it claims `store`, the note that announces it is removed.
    """
    if address is None:
        yield None
        return
    from p3d.jobs.scheduler.cluster import joined_cluster  # which imports Ray

    try:
        with joined_cluster(address) as cluster:
            there = cluster.machines
            say(f"joined {address}: {counted(there.cpus, 'core')}, {counted(there.gpus, 'GPU')}")
            yield cluster
    finally:
        if control.is_submitted():
            with contextlib.suppress(StoreError):  # then `status` shows "submitted" until the next run
                control.forget_submitted(store)


# ---- from Python ----------------------------------------------------------------------------------------------------


@explicit(LaunchKeywords, RecipeOptions, PlanOptions)
def launch(
    src: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    model: str | None = None,
    graph: str | None = None,
    on_progress: OnProgress | None = None,
    say: Say | None = None,
    address: str | None = None,
    takeover: bool = False,
    trust: bool = False,
    s3: StoreOptions = DEFAULTS,
    **options: Unpack[LaunchKeywords],
) -> Status:
    """Embed the videos of `src` into `out`, as `p3d launch` does, and return the status of the finished job.

    `src` is a folder, a video, a list or `s3://bucket/prefix`, `out` a folder or `s3://bucket/prefix`. `weights` is a
    file, or "random:SEED" with `model`; by default, those of the job at `out`. The other options and their defaults are
    those of `p3d launch` (docs/reference/cli.md); None means the default. The same call again continues where the job
    stopped, and adds what is new or changed in `src`.

    `on_progress` is called about once per second with a record of the run's progress. `say` is called with each message
    that the command line would print; by default they go to the logger "p3d". An
    error in either is logged there once, with its traceback, and the run goes on. `address` is that of a Ray cluster to
    join: "auto", HOST:PORT or ray://HOST:PORT.

    Videos that cannot be read are counted in the status (`p3d.open_dataset(out).failures()` has them). Raises an error
    unless all videos are accounted for: Unfinished for a job that stopped and can be resumed, InputError, OtherRecipe,
    OtherVersion, AlreadyRunning, ClusterError, DamagedJob or StoreError, all of them `p3d.JobError`. Ctrl-C stops the
    run cleanly, and then raises KeyboardInterrupt.
    """
    recipe, plan, run = (_only(options, of) for of in (RecipeKeywords, PlanKeywords, RunKeywords))
    spec = JobSpec(model, weights if weights is None else path_of(weights, "weights"), graph, **recipe)
    how = _how(run, s3, address, takeover, trust, on_progress, say)
    return _ended(launch_job(path_of(src, "src"), path_of(out, "out"), spec, PlanOptions(**plan), how))


@explicit(RunKeywords)
def resume(
    out: str | os.PathLike[str],
    *,
    source: str | None = None,
    on_progress: OnProgress | None = None,
    say: Say | None = None,
    address: str | None = None,
    takeover: bool = False,
    trust: bool = False,
    s3: StoreOptions = DEFAULTS,
    **options: Unpack[RunKeywords],
) -> Status:
    """Continue the job at `out`, as `p3d resume` does. Committed shards are not computed again.

    Options that are not given are those of the last run. A job of somebody else is refused (Untrusted) without `trust`
    or `source`, the folder or prefix below which videos may be read. Returns and raises what `p3d.launch` does.
    """
    how = _how({**options}, s3, address, takeover, trust, on_progress, say)
    return _ended(resume_job(path_of(out, "out"), source if source is None else path_of(source, "source"), how))


@explicit(RunKeywords)
def retry(
    out: str | os.PathLike[str],
    *,
    reasons: str | Sequence[str] = (),
    shard_videos: int | None = None,
    on_progress: OnProgress | None = None,
    say: Say | None = None,
    address: str | None = None,
    takeover: bool = False,
    trust: bool = False,
    s3: StoreOptions = DEFAULTS,
    **options: Unpack[RunKeywords],
) -> Status:
    """Retry the failed videos of `out`, as `p3d retry` does: all of them, or those that failed for one of `reasons`.

    Each file is read as it is now. Returns and raises what `p3d.launch` does.
    """
    how = _how({**options}, s3, address, takeover, trust, on_progress, say)
    return _ended(retry_job(path_of(out, "out"), listed(reasons), PlanOptions(shard_videos=shard_videos), how))


def _only(options: Any, keywords: type) -> dict[str, Any]:
    return {name: options[name] for name in keywords.__annotations__ if name in options}


def _how(
    given: dict[str, Any],
    s3: StoreOptions,
    address: str | None,
    takeover: bool,
    trust: bool,
    on_progress: OnProgress | None,
    say: Say | None,
) -> HowToRun:
    if address is not None and address.startswith(("http://", "https://")):
        raise InputError(
            f"{address}: `p3d launch --address` submits a job there; from Python, join a cluster with ray://"
        )

    for what, value in (("takeover", takeover), ("trust", trust)):
        if type(value) is not bool:
            raise InputError(f"{what} must be True or False, not {value!r}")

    def show_progress(n_videos: int) -> contextlib.AbstractContextManager[OnProgress | None]:
        return contextlib.nullcontext(on_progress and _heard(on_progress))

    return HowToRun(given, s3, address, takeover, trust, _heard(say or _log), show_progress)


def _log(message: str) -> None:
    level = logging.WARNING if message.startswith("warning") else logging.INFO
    logging.getLogger("p3d").log(level, message)


def _heard(call: Callable[[Any], object]) -> Callable[[Any], None]:
    """A user's function that is told about a run. Its first error is logged with its traceback, and the run goes on."""
    failed = False

    def told(what: Any) -> None:
        nonlocal failed
        try:
            call(what)
        except Exception:
            if not failed:
                logging.getLogger("p3d").exception("on_progress or say failed; the run goes on without it")
            failed = True

    return told


def _ended(ran: Ran | int) -> Status:
    """The status of a job that has finished; an error for one that has not."""
    assert isinstance(ran, Ran), "nothing runs elsewhere"
    status = ran.status()
    code = status.exit_code if ran.code is None else ran.code
    if code in (0, 1, 3):
        return status
    if code is not None and code > 128:
        raise KeyboardInterrupt(status.sentence)
    kinds: dict[int | None, type[JobError]] = {REFUSED: AlreadyRunning, DAMAGED: DamagedJob}
    raise kinds.get(code, Unfinished)(status.sentence)
