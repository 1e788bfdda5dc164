"""`p3d launch` and `p3d resume`: turn the command line into a run, and its result into an exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import (
    STORE_OPTIONS,
    address_options,
    job_spec,
    options_typed,
    out_store,
    plan_options,
    recipe_options,
    run_options,
    run_options_typed,
    source_option,
    source_options,
    store_options,
    store_options_of,
    trust_option,
)
from p3d.jobs.cli.progress import show_progress

if TYPE_CHECKING:
    from p3d.jobs.api.runs import HowToRun, Ran
    from p3d.jobs.planning.job_spec import JobSpec
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

    \b
      p3d launch videos/ out/ --weights p3d63.safetensors
      p3d launch 'videos/**/*.mp4' out/ --weights FILE --clips uniform:10 -q
      p3d launch s3://archive/videos s3://results/run1 --weights FILE

    The same command again continues where the job stopped, and adds what is new or changed in SRC. Ctrl-C stops
    cleanly. If OUT holds a job that is not yours (see `p3d trust`), only videos below SRC are read.

    With --address http://HEAD:8265 the weights are copied into OUT and everything else runs on the cluster. SRC and
    OUT must then be paths that are valid on its machines, and Ctrl-C only stops watching.
    """
    from p3d.jobs.scheduler.control import is_submitted

    remote.refuse_to_detach(address, detach)
    elsewhere = remote.runs_remotely(address)
    given, plan, s3 = run_options_typed(typed), plan_options(typed), store_options_of(typed)
    spec = job_spec({**typed, "trust": trust}, src, out, look=not elsewhere and not is_submitted())
    if elsewhere:
        assert address is not None
        return _launch_remotely(address, detach, out, spec, s3, trust)
    from p3d.jobs.api.runs import launch_job

    return report(out, launch_job(src, out, spec, plan, how_to_run(given, s3, address, takeover, trust)), as_json)


def how_to_run(given: dict[str, Any], s3: StoreOptions, address: str | None, takeover: bool, trust: bool) -> HowToRun:
    """Where and how a job runs, by `run_options_typed`; messages and progress are shown on stderr."""
    from p3d.jobs.api.runs import HowToRun

    return HowToRun(given, s3, address, takeover, trust, output.say, show_progress)


def _launch_remotely(address: str, detach: bool, out: str, spec: JobSpec, s3: StoreOptions, trust: bool) -> int:
    """Copy the weights into OUT, from where the remote driver loads them, and start it."""
    from p3d.jobs.api.runs import job_of
    from p3d.jobs.job import refuse_other_job, weights_key
    from p3d.jobs.planning.prepare import prepare
    from p3d.pipeline.sources.below import absolute

    store = out_store(out, s3)
    prepared = prepare(spec, s3, store)
    existing = refuse_other_job(store, prepared.recipe, prepared.origin)
    store.prove_create_once()
    _, trusted = job_of(store, prepared, existing, s3, trust, output.say)
    src = absolute(click.get_current_context().params["src"])
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
    found: int = ctx.invoke(status, outs=(out,), watch=not as_json, wait=as_json, mirror=True, as_json=as_json, **reach)
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
    """Continue the job or the training at OUT. Committed shards are not computed again.

    Options default to those of the last run. On a CPU, equal batch size and threads give bit-identical rows. A job that
    is not yours is refused without --trust or --source (see `p3d trust`). With --source its own options are not used.
    """
    from p3d.jobs.cli.train import resume_training
    from p3d.jobs.job import read_job
    from p3d.jobs.training.record import is_training
    from p3d.pipeline.sources.below import absolute

    remote.refuse_to_detach(address, detach)
    given, s3 = run_options_typed(typed), store_options_of(typed)
    if is_training(store := out_store(out, s3)):
        typed |= {"source": source, "address": address, "takeover": takeover, "detach": detach}
        return resume_training(store, s3, trust, as_json, typed)
    read_job(store)  # so that a wrong OUT is refused before torch and Ray are imported
    from p3d.jobs.api.runs import resume_job

    def elsewhere(store: Store, s3: StoreOptions, trusted: bool) -> int:
        root = None if source is None else absolute(source)
        return run_verb_remotely(str(address), detach, store, s3, trusted=trusted, source=root)

    how = how_to_run(given, s3, address, takeover, trust)
    return report(out, resume_job(out, source, how, elsewhere if remote.runs_remotely(address) else None), as_json)


def report(out: str, ran: Ran | int, as_json: bool) -> int:
    """Print what OUT holds and what to do next. Returns the exit code. A verb that ran elsewhere has printed it."""
    from dataclasses import asdict

    if isinstance(ran, int):
        return ran
    store, now = ran.store, ran.status()
    if as_json:
        output.show_json(asdict(now))
    else:
        output.show(f"{store.url}/clips/*.parquet   {output.count(now.clips_done, 'clip embedding')}")
        n_videos = now.videos_done - now.videos_failed
        output.show(f"{store.url}/videos/*.parquet  {output.count(n_videos, 'video embedding')}")
        if now.videos_failed:
            output.say(f"{output.count(now.videos_failed, 'video')} failed:  p3d failures {store.words(out)}")
    return (now.exit_code or 0) if ran.code is None else ran.code
