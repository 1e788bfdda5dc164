"""`p3d status` and `p3d cancel`: use only the store; import neither torch nor Ray."""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of, trust_option

if TYPE_CHECKING:
    from p3d.jobs.api.moves import Sources
    from p3d.jobs.monitor.status import Status
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.storage.store import Store, StoreOptions

WATCH_S = 1.0
BEGIN_S = 300.0  # how long to wait for a submitted driver to begin


@click.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("--watch", is_flag=True, help="Show a live view until the job ends; Ctrl-C only detaches.")
@click.option("--wait", is_flag=True, help="Wait silently until the job ends; exit with its code.")
@click.option("--exit-code", "mirror", is_flag=True, help="Exit with the job's code instead of 0.")
@click.option("--sources", "look", is_flag=True, help="Look for every source video, too; one request for each on S3.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def status(
    outs: tuple[str, ...],
    watch: bool,
    wait: bool,
    mirror: bool,
    look: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """Show the progress of the job or the training at OUT. Reads only the store: works from any machine, without Ray.

    With several, or if OUT is a folder or prefix with outputs directly in it, there is a line for each and a total.

    With --sources the source videos are looked for, too, where they are now (see `p3d relocate`): how many are there as
    they were planned, how many have changed, and how many are gone. That is refused if OUT is not trusted.

    Exits 0 if the status could be read; with --wait or --exit-code, with the code of the job, or the worst of several.
    """
    from rich.console import Console
    from rich.live import Live

    from p3d.jobs.job import read_job
    from p3d.jobs.monitor.outputs import outputs_of
    from p3d.jobs.monitor.status import SUBMITTED, UNDER_WAY, read_status, render
    from p3d.jobs.training.record import is_training

    if look and (watch or wait):
        raise click.UsageError("--sources goes with neither --watch nor --wait.")
    s3 = store_options_of(typed)
    stores = outputs_of(outs, s3)
    if len(stores) > 1:
        if look or watch or wait:
            raise click.UsageError("--sources, --watch and --wait take one output.")
        return _several(stores, mirror, as_json)
    store = stores[0]
    if is_training(store):
        if look:
            raise click.UsageError("--sources is for jobs, and OUT holds a training.")
        return _training(store, watch, wait, mirror, as_json)
    job = read_job(store)
    found = _sources(store, job, s3) if look else None
    now = read_status(store, job)
    until = time.monotonic() + BEGIN_S

    def under_way(status: Status) -> bool:
        return status.state in UNDER_WAY and (status.state != SUBMITTED or time.monotonic() < until)

    console = Console(file=sys.stdout, no_color="NO_COLOR" in os.environ, highlight=False)
    try:
        if wait or (watch and not console.is_terminal):
            while under_way(now):
                time.sleep(WATCH_S)
                now = read_status(store, job)
        elif watch and not as_json:
            width = shutil.get_terminal_size().columns
            with Live(render(now, width=width, escape=output.escape_all), console=console, auto_refresh=False) as live:
                while under_way(now):
                    time.sleep(WATCH_S)
                    now = read_status(store, job)
                    live.update(render(now, width=width, escape=output.escape_all), refresh=True)
            return _code(now) if mirror else 0
    except KeyboardInterrupt:
        output.say(f"detached; the job continues. `p3d cancel {store.words()}` stops it")
        return 0
    if wait and now.state == SUBMITTED:
        output.say(f"the driver did not begin within {BEGIN_S:.0f} s; `ray job logs` on the cluster shows why")
    if as_json:
        output.show_json(asdict(now) | ({"sources": asdict(found)} if found else {}))
    else:
        console.print(render(now, width=console.width, escape=output.escape_all))
        if found:
            names = f", such as {', '.join(found.examples)}" if found.gone else ""
            output.show(f"sources: {found.there} as planned, {found.changed} changed, {found.gone} gone{names}")
    return _code(now) if mirror or wait else 0


def _several(stores: list[Store], mirror: bool, as_json: bool) -> int:
    """`p3d status` of several outputs."""
    from p3d.jobs.cli.progress import show_steps
    from p3d.jobs.cli.several import lines_of, read_all

    found = read_all(stores, show_steps(as_json))
    if as_json:
        jobs, trainings = ([asdict(one) for one in of_kind] for of_kind in (found.jobs, found.trainings))
        output.show_json({"jobs": jobs, "trainings": trainings, "unreadable": found.broken})
    else:
        output.show(*lines_of(found, total=True))
    for sentence in found.broken:
        output.say(sentence)
    codes = [*map(_code, found.jobs), *(one.exit_code or 0 for one in found.trainings)] if mirror else []
    return output.worst([*found.codes, *codes])


def _training(store: Store, watch: bool, wait: bool, mirror: bool, as_json: bool) -> int:
    """`p3d status` of a training."""
    from rich.console import Console
    from rich.live import Live

    from p3d.jobs.monitor.training import read_training_status, render_training
    from p3d.jobs.training.record import read_record
    from p3d.jobs.training.snapshot import RUNNING

    record = read_record(store)
    now = read_training_status(store, record)
    console = Console(file=sys.stdout, no_color="NO_COLOR" in os.environ, highlight=False)
    width = console.width
    live = watch and console.is_terminal and not as_json
    try:
        with Live(console=console, auto_refresh=False) if live else nullcontext() as view:
            while (watch or wait) and now.state == RUNNING:
                if view:
                    view.update(render_training(now, width=width, escape=output.escape_all), refresh=True)
                time.sleep(WATCH_S)
                now = read_training_status(store, record)
            if view:
                view.update(render_training(now, width=width, escape=output.escape_all), refresh=True)
    except KeyboardInterrupt:
        output.say(f"detached; the training continues. `p3d cancel {store.words()}` stops it")
        return 0
    if as_json:
        output.show_json(asdict(now))
    elif not live:
        console.print(render_training(now, width=width, escape=output.escape_all))
    return now.exit_code or 0 if mirror or wait else 0


def _sources(store: Store, job: JobRecord, s3: StoreOptions) -> Sources:
    """Look for the source videos, with this user's own store options. Untrusted."""
    from p3d.jobs.api.moves import look_for_sources
    from p3d.jobs.cli.progress import show_steps
    from p3d.jobs.trust import is_trusted, need_trust, origin_of
    from p3d.pipeline.errors import Untrusted

    if not is_trusted(store, job):
        raise Untrusted(
            f"{store.url} is not trusted, so its source videos are not looked for: you did not launch this job from "
            f"here. It was launched {origin_of(store)}. If you trust them, run `p3d trust {store.words()}`"
        )
    s3 = need_trust(store, job, s3, trust_it=False, verb="status --sources", say=output.say)
    return look_for_sources(store, job, s3, partial(show_steps(False), "looked for"))


def _code(now: Status) -> int:
    """The exit code of the job; one that was submitted and did not begin in time is resumable (6)."""
    from p3d.jobs.monitor.status import SUBMITTED

    return 6 if now.state == SUBMITTED else now.exit_code or 0


@click.command()
@click.argument("out")
@click.option("--now", is_flag=True, help="Abandon the shards in progress; a resume computes them again.")
@trust_option
@store_options
def cancel(out: str, now: bool, trust: bool, **typed: Any) -> int:
    """Stop the run at OUT: after the shards in progress, or at once with --now. Committed shards are kept.

    A training stops after the step under way, with a checkpoint.
    """
    from p3d.jobs.job import read_job
    from p3d.jobs.scheduler import control
    from p3d.jobs.training.record import is_training, read_record
    from p3d.jobs.trust import need_trust

    s3 = store_options_of(typed)
    store = out_store(out, s3)
    training = is_training(store)
    need_trust(
        store, read_record(store) if training else read_job(store), s3, trust_it=trust, verb="cancel", say=output.say
    )
    epoch = control.newest_epoch(store)
    beat = control.heartbeat(store, epoch.number) if epoch else None
    if epoch is None or epoch.died_here() or beat is None or beat.state != control.RUNNING:
        waiting = control.not_begun(store, epoch.number if epoch else 0)
        why = f": {waiting}. Cancel again when it has" if waiting else ""
        output.say(f"nothing is running at {store.url}{why}")
        return 0
    control.ask_cancel(store, epoch.number, now=now)
    what = "stops at once" if now else "finishes its shards in progress and stops"
    what = "finishes its step and stops with a checkpoint" if training else what
    output.say(f"asked: the run on {epoch.host} {what}; it checks every {control.HEARTBEAT_S:.0f} s")
    named = store.words(out)
    output.say(f"  p3d status {named} --wait    wait until it has")
    output.say(f"  p3d resume {named}           continue later")
    return 0
