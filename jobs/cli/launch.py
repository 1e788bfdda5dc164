"""`p3d launch` and `p3d resume`: turn the command line into a run, and its result into an exit code."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import (
    STORE_OPTIONS,
    address_options,
    job_spec,
    options_of_run,
    out_store,
    recipe_options,
    run_options,
    source_options,
    store_options,
    store_options_of,
)
from p3d.jobs.cli.progress import show_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p3d.jobs.planning.prepare import Prepared
    from p3d.jobs.scheduler.run import ClaimedRun
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.storage.store import Store


@click.command()
@click.argument("src")
@click.argument("out")
@recipe_options
@source_options
@run_options
@address_options
@store_options
def launch(
    src: str,
    out: str,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Embed the videos of SRC into OUT.

    The same launch again continues where it stopped, and adds what is new or changed in SRC. Ctrl-C stops cleanly.

    With --address http://HEAD:8265 the weights are copied into OUT and everything else runs on the cluster. SRC and
    OUT must then be paths that are valid on its machines, and Ctrl-C only stops watching.
    """
    from p3d.jobs.job import refuse_other_job
    from p3d.jobs.planning.prepare import add_plan, create_job, prepare, refuse_unfit_device
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.run import ClaimedRun
    from p3d.pipeline.sources.listing import find

    remote.refuse_to_detach(address, detach)
    s3 = store_options_of(typed)
    store = out_store(out, s3)
    if remote.runs_remotely(address):
        assert address is not None
        return _launch_remotely(address, detach, store, prepare(job_spec(typed), s3))
    with remote.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, there=there)
        prepared = prepare(job_spec(typed), s3)
        refuse_unfit_device(prepared.recipe, options.device, there)
        refuse_other_job(store, prepared.recipe)
        found = find(src, s3, id_column=typed["id_column"], tell=output.say)
        store.prove_create_once()
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=output.say)
        with control.Pulse(store, epoch.number) as pulse:
            job = create_job(store, prepared)
            added = add_plan(store, job, found, shard_videos=typed["shard_videos"], limit=typed["limit"])
            if added is None:
                output.say("nothing in SRC is new or changed")
            else:
                planned = f"{output.count(added.n_videos, 'video')} in {output.count(added.n_shards, 'shard')}"
                output.say(f"{planned}, {output.count(added.n_skipped, 'other file')} skipped")
            return run_and_report(out, job, ClaimedRun(store, options, epoch, pulse, cluster), as_json)


def _launch_remotely(address: str, detach: bool, store: Store, prepared: Prepared) -> int:
    """Copy the weights into OUT, from where the remote driver loads them, and start it."""
    from p3d.jobs.job import refuse_other_job, weights_key
    from p3d.jobs.planning.prepare import create_job

    refuse_other_job(store, prepared.recipe)
    store.prove_create_once()
    create_job(store, prepared)
    src = remote.absolute(click.get_current_context().params["src"])
    weights = f"{store.url}/{weights_key(prepared.recipe)}"
    return run_verb_remotely(address, detach, store, src=src, weights=weights)


def run_verb_remotely(address: str, detach: bool, store: Store, **changed: str) -> int:
    """Run the same verb remotely; then, unless detached, show `p3d status --watch` until it ends."""
    from p3d.jobs.cli.status import status

    ctx = click.get_current_context()
    out, as_json = ctx.params["out"], ctx.params["as_json"]
    words = remote.words_again(ctx, out=store.url, **changed, address="auto", detach=None, as_json=None)
    code = remote.run_remote_driver(address, store, out, words, detach=detach)
    if code is not None:
        return code
    s3 = {name: value for name, value in ctx.params.items() if name in STORE_OPTIONS}
    found: int = ctx.invoke(status, out=out, watch=not as_json, wait=as_json, mirror=True, as_json=as_json, **s3)
    return found


@click.command()
@click.argument("out")
@run_options
@address_options
@store_options
def resume(
    out: str,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Continue the job at OUT. Committed shards are not computed again.

    Options default to those of the last run. On a CPU, equal batch size and threads give bit-identical rows.
    """
    from p3d.jobs.job import look, manifests, read_job

    remote.refuse_to_detach(address, detach)
    store = out_store(out, store_options_of(typed))
    job = read_job(store)
    work = look(store, manifests(store, job))
    if work.nothing_left and work.n_shards:
        output.say(f"nothing to do: all {work.n_videos} videos are accounted for")
        return report(out, store, job, as_json)
    if remote.runs_remotely(address):
        assert address is not None
        return run_verb_remotely(address, detach, store)
    with next_run(out, store, job, typed, address, takeover) as run:
        return run_and_report(out, job, run, as_json)


@contextlib.contextmanager
def next_run(
    out: str, store: Store, job: JobRecord, typed: dict[str, Any], address: str | None, takeover: bool
) -> Iterator[ClaimedRun]:
    """Join the given cluster, determine the options, and claim the next run."""
    from p3d.jobs.planning.prepare import refuse_unfit_device
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.run import ClaimedRun

    with remote.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, control.newest_epoch(store), there)
        refuse_unfit_device(job.recipe, options.device, there)
        store = out_store(out, options.s3)
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=output.say)
        with control.Pulse(store, epoch.number) as pulse:
            yield ClaimedRun(store, options, epoch, pulse, cluster)


def run_and_report(out: str, job: JobRecord, run: ClaimedRun, as_json: bool) -> int:
    """Run the pending shards, then report."""
    from p3d.jobs.scheduler.run import run_job

    code = run_job(out, job, run, say=output.say, show_progress=show_progress)
    shown = report(out, run.store, job, as_json, over=code is not None)
    return shown if code is None else code


def report(out: str, store: Store, job: JobRecord, as_json: bool, *, over: bool = False) -> int:
    """Print what OUT holds and what to do next. `over` means that the newest run is this one, and has ended."""
    from dataclasses import asdict

    from p3d.jobs.monitor.status import read_status

    now = read_status(store, job, over=over)
    if as_json:
        output.show_json(asdict(now))
    else:
        output.show(f"{store.url}/clips/*.parquet   {now.clips_done} clip embeddings")
        output.show(f"{store.url}/videos/*.parquet  {now.videos_done - now.videos_failed} video embeddings")
        if now.videos_failed:
            output.say(f"{output.count(now.videos_failed, 'video')} failed:  p3d failures {out}")
    return now.exit_code or 0
