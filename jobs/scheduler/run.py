"""One run of an existing job, from its first access to the store to its last. Independent of the command line.

    claim ──ClaimedRun──> run_job: sweep, look, derive missing files ──> a cluster ──RayLoop──> exit code

The caller passes functions that print a message and show progress.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from p3d.jobs.job import Work, derive_again, glance, look, manifests, refuse_damaged, refuse_strange
from p3d.jobs.scheduler import cluster as clusters
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.scheduler.control import Epoch, Pulse
from p3d.jobs.scheduler.loop import RayLoop
from p3d.jobs.scheduler.run_snapshot import RunSnapshot
from p3d.jobs.scheduler.state import Finish
from p3d.jobs.trust import skipped_plans
from p3d.pipeline.dataset.commit import clips_key
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.dataset.repair import set_orphans_aside
from p3d.pipeline.errors import DamagedJob, StoreError, counted
from p3d.pipeline.recipe import JobRecord, RunOptions
from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
from p3d.pipeline.storage.store import Store

COMPLETE = (0, 3)  # exit codes of a run that leaves no shard open
DAMAGED = 7  # of one that found damage
INTERRUPTED = 130  # of one that SIGINT ended

# called with the number of videos of the job; yields a function that takes a snapshot about once per second
OnProgress = Callable[[RunSnapshot], None]
ShowProgress = Callable[[int], contextlib.AbstractContextManager[OnProgress | None]]


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run that has claimed its output. `cluster` is the cluster that it has joined, or None to start one.

    `rule` says which videos may be read; a plan with another video in a shard to do is skipped, unless its digest is
    `own_plan`: the plan of this run.
    """

    store: Store
    options: RunOptions
    epoch: Epoch
    pulse: Pulse
    cluster: Cluster | None
    rule: SourceRule = EVERY_SOURCE
    own_plan: str = ""


def run_job(
    out: str, job: JobRecord, run: ClaimedRun, *, say: Callable[[str], None], show_progress: ShowProgress
) -> int | None:
    """Run what is left of the job. `out` is OUT as the user wrote it. The exit code, or None if nothing was left."""
    store = run.store
    store.hold_to("job.json")
    control.sweep_temps(store)
    plans = manifests(store, job)
    work = (glance(store, plans) if run.rule == EVERY_SOURCE else None) or look(store, plans, write=True)
    refuse_strange(store, work)
    if work.orphaned:
        _set_aside(run, work, say)
    for key in work.summaries.stale:
        store.delete(key)
    derive_again(store, job, plans, work.underived)
    skipped = skipped_plans(plans, work.todo, run.rule, run.own_plan)
    for seq, uri in skipped.items():
        say(f"plan {seq} is skipped: {uri} is not {run.rule}")
    work.todo = [key for key in work.todo if key.plan_seq not in skipped]
    if not work.todo:
        run.pulse.stop()
        if skipped:
            return _stopped_short(run, skipped, say)
        _refuse_damaged(run, job, plans, work)
        sentence = f"finished: nothing was left to do, all {counted(work.n_videos, 'video')} are accounted for"
        control.beat(store, run.epoch.number, RunSnapshot(counter=1, state="finished", sentence=sentence))
        return None
    shards, workers = counted(work.n_shards, "shard"), counted(run.options.workers, "worker")
    done = f"{len(work.committed)} done, " if len(work.committed) else ""
    say(f"{done}{len(work.todo)} of {shards} to do; starting {workers} ...")
    try:
        finish = _loop(job, run, plans, work, say, show_progress)
    except KeyboardInterrupt:  # while Ray starts; the loop itself handles signals
        run.pulse.stop()
        sentence = "interrupted while Ray was starting"
        with contextlib.suppress(StoreError):
            stopped = RunSnapshot(counter=1, state="stopped", exit_code=INTERRUPTED, sentence=sentence)
            control.beat(store, run.epoch.number, stopped)
        say(f"{sentence}; continue with:  p3d resume {store.words(out)}")
        return INTERRUPTED
    if finish.exit_code in COMPLETE or finish.exit_code > 128:
        # killed workers left temporary files: ours just now, or those of a dead driver since the first sweep
        with contextlib.suppress(StoreError):
            if control.newest_number(store) == run.epoch.number:  # else a run that took over may be using them
                control.sweep_temps(store)
    if skipped and finish.exit_code in COMPLETE:
        return _stopped_short(run, skipped, say)
    say(finish.sentence)
    if finish.exit_code not in COMPLETE:
        kept = "" if finish.lost or not _is_there(store) else "no committed shard is lost; "
        say(f"{kept}continue with:  p3d resume {store.words(out)}")
    return finish.exit_code


def _refuse_damaged(run: ClaimedRun, job: JobRecord, plans: dict[int, Manifest], work: Work) -> None:
    """Before a run without any work says so. DamagedJob, which its last heartbeat keeps for `status`."""
    try:
        refuse_damaged(run.store, job, plans, work.unsummarised)
    except DamagedJob as error:
        stopped = RunSnapshot(counter=1, state="stopped", exit_code=DAMAGED, sentence=str(error))
        control.beat(run.store, run.epoch.number, stopped)
        raise


def _is_there(store: Store) -> bool:
    try:
        return store.head("job.json") is not None
    except StoreError:
        return False


def _set_aside(run: ClaimedRun, work: Work, say: Callable[[str], None]) -> None:
    """Move the files aside that were made from lost clips files: those of the clips computed next have other bytes.

    DamagedJob if the run may not, because it only reads the videos below a folder, as in an output that is not trusted.
    """
    lost = f"{len(work.orphaned)} of the shards have lost their clips files, such as {clips_key(work.orphaned[0])}"
    if run.rule != EVERY_SOURCE:
        words = run.store.words()
        raise DamagedJob(
            f"{lost}. If you trust this output, run `p3d trust {words}`, then `p3d verify {words} --repair`, and then "
            "this command again"
        )
    n_moved = set_orphans_aside(run.store, work.orphaned)
    say(f"{lost}: they are computed again. {n_moved} files that were made from them are now in _job/damaged/")


def _stopped_short(run: ClaimedRun, skipped: dict[int, str], say: Callable[[str], None]) -> int:
    """The end of a run that has done all it may do: the exit code, and a heartbeat that says what it has skipped."""
    plans = ", ".join(map(str, skipped))
    sentence = f"stopped: the videos {run.rule} are done; skipped plans: {plans}"
    before = control.heartbeat(run.store, run.epoch.number) or RunSnapshot(counter=1, state="stopped")
    control.beat(run.store, run.epoch.number, replace(before, state="stopped", exit_code=6, sentence=sentence))
    say(sentence)
    return 6


def _loop(
    job: JobRecord,
    run: ClaimedRun,
    plans: dict[int, Manifest],
    work: Work,
    say: Callable[[str], None],
    show_progress: ShowProgress,
) -> Finish:
    """Run the Ray loop, on the joined cluster or on one that is started for this run."""
    needed = clusters.store_of_job(job.recipe, run.options)
    if run.cluster:
        clusters.refuse_small_stores(job.recipe, run.options)
    elif warning := clusters.little_shared_memory(needed, clusters.free_shared_memory()):
        say(f"warning: {warning}")
    joined = contextlib.nullcontext(run.cluster) if run.cluster else clusters.local_cluster(frames_bytes=needed)
    with joined as cluster, _shown(show_progress, work.n_videos, say) as on_progress:
        first = plans[work.todo[0].plan_seq].shard(work.todo[0].shard).videos[0]
        uri = plans[work.todo[0].plan_seq].roots.now(first.uri, work.todo[0].plan_seq)
        source = uri if uri.startswith("s3://") else ""
        nvdec = job.recipe.decoder == "nvdec"
        clusters.refuse_unfit(run.store.url, "job.json", source, run.options.s3, nvdec=nvdec)
        loop = RayLoop(run.store, job, plans, work, cluster, run.epoch, run.options, say=say, on_progress=on_progress)
        run.pulse.stop()
        return loop.loop()


@contextlib.contextmanager
def _shown(show_progress: ShowProgress, n_videos: int, say: Callable[[str], None]) -> Iterator[OnProgress | None]:
    """The progress of a run; None if it cannot be shown, which is said and ends no run."""
    with contextlib.ExitStack() as stack:
        on_progress = None
        try:
            on_progress = stack.enter_context(show_progress(n_videos))
        except Exception as error:  # noqa: BLE001 - the boundary of a sink, as in the loop
            say(f"warning: the progress of this run cannot be shown ({type(error).__name__}: {error}); the run goes on")
        yield on_progress
        closing = stack.pop_all()
        with contextlib.suppress(Exception):  # what was shown no longer matters
            closing.close()
