"""One run of an existing job, from its first access to the store to its last. Independent of the command line.

    claim ──ClaimedRun──> run_job: sweep, look, derive missing files ──> a cluster ──RayLoop──> exit code

The caller passes functions that print a message and show progress.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from p3d.jobs.job import Work, derive_again, look, manifests
from p3d.jobs.scheduler import cluster as clusters
from p3d.jobs.scheduler import control
from p3d.jobs.scheduler.cluster import Cluster
from p3d.jobs.scheduler.control import Epoch, Pulse
from p3d.jobs.scheduler.loop import RayLoop
from p3d.jobs.scheduler.state import Finish
from p3d.pipeline.dataset.plans import Manifest
from p3d.pipeline.errors import StoreError
from p3d.pipeline.recipe import JobRecord, RunOptions
from p3d.pipeline.storage.store import Store

COMPLETE = (0, 3)  # exit codes of a run that leaves no shard open

# called with the number of videos of the job; yields a function that takes a snapshot about once per second
ShowProgress = Callable[[int], contextlib.AbstractContextManager[Callable[[dict[str, Any]], None] | None]]


@dataclass(frozen=True, slots=True)
class ClaimedRun:
    """A run that has claimed its output. `cluster` is the cluster that it has joined, or None to start one."""

    store: Store
    options: RunOptions
    epoch: Epoch
    pulse: Pulse
    cluster: Cluster | None


def run_job(
    out: str, job: JobRecord, run: ClaimedRun, *, say: Callable[[str], None], show_progress: ShowProgress
) -> int | None:
    """Run what is left of the job. `out` is OUT as the user wrote it. The exit code, or None if nothing was left."""
    store = run.store
    control.sweep_temps(store)
    plans = manifests(store, job)
    work = look(store, plans)
    derive_again(store, job, plans, work.underived)
    if not work.todo:
        run.pulse.stop()
        control.beat(store, run.epoch.number, {"counter": 1, "state": "finished"})
        return None
    workers = f"{run.options.workers} worker" + ("s" if run.options.workers > 1 else "")
    say(f"{len(work.todo)} of {work.n_shards} shards to do; starting {workers} ...")
    finish = _loop(job, run, plans, work, show_progress)
    if finish.exit_code in COMPLETE or finish.exit_code > 128:
        # killed workers left temporary files: ours just now, or those of a dead driver since the first sweep
        with contextlib.suppress(StoreError):
            if control.newest_number(store) == run.epoch.number:  # else a run that took over may be using them
                control.sweep_temps(store)
    say(finish.sentence)
    if finish.exit_code not in COMPLETE:
        say(f"no committed shard is lost; continue with:  p3d resume {out}")
    return finish.exit_code


def _loop(
    job: JobRecord, run: ClaimedRun, plans: dict[int, Manifest], work: Work, show_progress: ShowProgress
) -> Finish:
    """Run the Ray loop, on the joined cluster or on one that is started for this run."""
    joined = contextlib.nullcontext(run.cluster) if run.cluster else clusters.local_cluster()
    with joined as cluster, show_progress(work.n_videos) as on_progress:
        first = plans[work.todo[0].plan_seq].shard(work.todo[0].shard).videos[0]
        source = first.uri if first.uri.startswith("s3://") else ""
        clusters.refuse_unfit(run.store.url, "job.json", source, run.options.s3)
        loop = RayLoop(run.store, job, plans, work, cluster, run.epoch, run.options, on_progress=on_progress)
        run.pulse.stop()
        return loop.loop()
