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
    options_typed,
    out_store,
    recipe_options,
    run_options,
    source_option,
    source_options,
    store_options,
    store_options_of,
    trust_option,
)
from p3d.jobs.cli.progress import show_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from p3d.jobs.planning.prepare import Prepared
    from p3d.jobs.scheduler.run import ClaimedRun
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.sources.below import SourceRule
    from p3d.pipeline.storage.store import Store, StoreOptions


@click.command()
@click.argument("src")
@click.argument("out")
@recipe_options
@source_options
@run_options
@trust_option
@address_options
@store_options
def launch(
    src: str,
    out: str,
    trust: bool,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Embed the videos of SRC into OUT.

    The same command again continues where the job stopped, and adds what is new or changed in SRC. Ctrl-C stops
    cleanly. If OUT holds a job that is not yours (see `p3d trust`), only videos below SRC are read.

    With --address http://HEAD:8265 the weights are copied into OUT and everything else runs on the cluster. SRC and
    OUT must then be paths that are valid on its machines, and Ctrl-C only stops watching.
    """
    from p3d.jobs.job import look, manifests, refuse_other_job
    from p3d.jobs.planning.prepare import add_plan, prepare, refuse_unfit_device
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.run import ClaimedRun
    from p3d.jobs.trust import skipped_plans
    from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule
    from p3d.pipeline.sources.listing import find, named_in

    remote.refuse_to_detach(address, detach)
    s3 = store_options_of(typed)
    store = out_store(out, s3)
    if remote.runs_remotely(address):
        assert address is not None
        return _launch_remotely(address, detach, store, prepare(job_spec(typed), s3), s3, trust)
    root = remote.absolute(src)
    with remote.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, s3, there=there)
        prepared = prepare(job_spec(typed), s3)
        refuse_unfit_device(prepared.recipe, options.device, there)
        existing = refuse_other_job(store, prepared.recipe)
        found = find(src, s3, id_column=typed["id_column"], tell=output.say)
        store.prove_create_once()
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=output.say)
        with control.Pulse(store, epoch.number) as pulse:
            job, trusted = _job_of(store, prepared, existing, s3, trust)
            rule = EVERY_SOURCE if trusted else SourceRule(root, listed=named_in(src, found.videos))
            plans = {} if trusted else manifests(store, job)
            skipped = skipped_plans(plans, look(store, plans).todo, rule) if plans else {}
            added = add_plan(
                store, job, found, shard_videos=typed["shard_videos"], limit=typed["limit"], without=skipped
            )
            if added is None:
                output.say("nothing in SRC is new or changed")
            else:
                planned = f"{output.count(added.n_videos, 'video')} in {output.count(added.n_shards, 'shard')}"
                output.say(f"{planned}, {output.count(added.n_skipped, 'other file')} skipped")
            own_plan = added.digest if added else ""
            run = ClaimedRun(store, options, epoch, pulse, cluster, rule, own_plan)
            return run_and_report(out, job, run, as_json)


def _job_of(
    store: Store, prepared: Prepared, existing: JobRecord | None, s3: StoreOptions, trust: bool
) -> tuple[JobRecord, bool]:
    """The job of a launch, created unless it exists, and whether it is trusted. A new one is recorded as this user's.

    The record is written first, so that no kill in between leaves a job that its own user has to trust.
    """
    from p3d.jobs.cli.trust import take_on_trust
    from p3d.jobs.planning.prepare import create_job
    from p3d.jobs.trust import is_trusted, keep_options, origin_of, remember
    from p3d.pipeline.recipe import new_job_id

    job_id = new_job_id()
    if existing is None and (warning := remember(store, job_id, "launched", s3)):
        output.say(warning)
    job = create_job(store, prepared, job_id)
    if job.job_id == job_id:
        return job, True
    if trust:
        take_on_trust(store, job, s3)
        return job, True
    trusted = is_trusted(store, job)
    if warning := keep_options(store, job, s3):
        output.say(warning)
    if not trusted:
        output.say(
            f"{store.url} is not trusted: this job was launched {origin_of(store)}. Only videos of SRC are read; "
            f"`p3d trust {store.words()}` or --trust allows all that its plans name"
        )
    return job, trusted


def _launch_remotely(
    address: str, detach: bool, store: Store, prepared: Prepared, s3: StoreOptions, trust: bool
) -> int:
    """Copy the weights into OUT, from where the remote driver loads them, and start it."""
    from p3d.jobs.job import refuse_other_job, weights_key

    existing = refuse_other_job(store, prepared.recipe)
    store.prove_create_once()
    _, trusted = _job_of(store, prepared, existing, s3, trust)
    src = remote.absolute(click.get_current_context().params["src"])
    weights = f"{store.url}/{weights_key(prepared.recipe)}"
    return run_verb_remotely(address, detach, store, s3, trusted=trusted, src=src, weights=weights)


def run_verb_remotely(
    address: str, detach: bool, store: Store, s3: StoreOptions, *, trusted: bool, **changed: str | None
) -> int:
    """Run the same verb remotely; then, unless detached, show `p3d status --watch` until it ends.

    The driver gets the store options `s3` and the trust of this user, whose records it cannot read.
    """
    from p3d.jobs.cli.status import status

    ctx = click.get_current_context()
    out, as_json = ctx.params["out"], ctx.params["as_json"]
    own = options_typed(s3)
    words = remote.words_again(
        ctx, out=store.url, **changed, **own, address="auto", detach=None, as_json=None, trust=None
    )
    code = remote.run_remote_driver(address, store, out, words, detach=detach, trusted=trusted)
    if code is not None:
        return code
    reach = {name: value for name, value in ctx.params.items() if name in STORE_OPTIONS}
    found: int = ctx.invoke(status, out=out, watch=not as_json, wait=as_json, mirror=True, as_json=as_json, **reach)
    return found


@click.command()
@click.argument("out")
@source_option("Run only videos below this folder or s3://bucket/prefix, and skip other plans.")
@run_options
@trust_option
@address_options
@store_options
def resume(
    out: str,
    source: str | None,
    trust: bool,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Continue the job at OUT. Committed shards are not computed again.

    Options default to those of the last run. On a CPU, equal batch size and threads give bit-identical rows. A job that
    is not yours is refused without --trust or --source (see `p3d trust`). With --source its own options are not used.
    """
    from p3d.jobs.cli.trust import need_trust
    from p3d.jobs.job import look, manifests, read_job, refuse_damaged, refuse_strange
    from p3d.jobs.trust import is_trusted
    from p3d.pipeline.sources.below import EVERY_SOURCE, SourceRule

    remote.refuse_to_detach(address, detach)
    s3 = store_options_of(typed)
    store = out_store(out, s3)
    job = read_job(store)
    root = None if source is None else remote.absolute(source)
    trusted = trust or is_trusted(store, job)
    if trusted or root is None:
        otherwise = f"`p3d resume {store.words(out)} --source ROOT` reads only videos below ROOT"
        s3 = need_trust(store, job, s3, trust_it=trust, verb="resume", otherwise=otherwise)
    plans = manifests(store, job)
    work = look(store, plans)
    refuse_strange(store, work)
    if work.nothing_left and work.n_shards:
        refuse_damaged(store, job, plans, work.committed.values())
        output.say(f"nothing to do: all {work.n_videos} videos are accounted for")
        return report(out, store, job, as_json)
    if remote.runs_remotely(address):
        assert address is not None
        return run_verb_remotely(address, detach, store, s3, trusted=trusted, source=root)
    rule = EVERY_SOURCE if root is None else SourceRule(root)
    with next_run(out, store, job, typed, s3, address, takeover, rule=rule, trusted=trusted) as run:
        return run_and_report(out, job, run, as_json)


@contextlib.contextmanager
def next_run(
    out: str,
    store: Store,
    job: JobRecord,
    typed: dict[str, Any],
    s3: StoreOptions,
    address: str | None,
    takeover: bool,
    *,
    rule: SourceRule,
    trusted: bool = True,
) -> Iterator[ClaimedRun]:
    """Join the given cluster, determine the options, and claim the next run. Without trust nothing is inherited."""
    from p3d.jobs.planning.prepare import refuse_unfit_device
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.run import ClaimedRun

    with remote.cluster_at(address, store) as cluster:
        there = cluster.machines if cluster else None
        options = options_of_run(typed, s3, control.newest_epoch(store) if trusted else None, there)
        refuse_unfit_device(job.recipe, options.device, there)
        store = out_store(out, options.s3)
        epoch = control.claim(store, options.to_dict(), takeover=takeover, say=output.say)
        with control.Pulse(store, epoch.number) as pulse:
            yield ClaimedRun(store, options, epoch, pulse, cluster, rule)


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
            output.say(f"{output.count(now.videos_failed, 'video')} failed:  p3d failures {store.words(out)}")
    return now.exit_code or 0
