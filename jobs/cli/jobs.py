"""`p3d jobs`: look at jobs, running or finished. Reads only stores; imports neither torch nor Ray."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps


@click.command("list")
@click.argument("root")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def list_(root: str, as_json: bool, **typed: Any) -> int:
    """List the jobs and trainings whose OUT is ROOT itself or a folder directly in it, with the progress of each."""
    from p3d.jobs.cli.several import lines_of, read_all
    from p3d.jobs.monitor.outputs import outputs_below

    found = read_all(list(outputs_below(root, store_options_of(typed))), show_steps(as_json))
    if as_json:
        jobs, trainings = ([asdict(one) for one in of_kind] for of_kind in (found.jobs, found.trainings))
        output.show_json({"jobs": jobs, "trainings": trainings, "unreadable": found.broken})
    else:
        output.show(*lines_of(found))
    for sentence in found.broken:
        output.say(sentence)
    if not found.statuses and not found.broken:
        output.say(f"no job found in {root}")
    return 0


@click.command()
@click.argument("out")
@click.option(
    "--run", "number", type=click.IntRange(1), metavar="N", help="Print the log of run N. Default: the newest."
)
@click.option("--tail", type=click.IntRange(1), metavar="N", help="Print only the last N lines. Default: all.")
@store_options
def logs(out: str, number: int | None, tail: int | None, **typed: Any) -> int:
    """Print the log of a run of the job at OUT: workers that started or ended, shards, problems. Times are in UTC.

    A running job writes its log every half minute. Ray's own logs are on its nodes, in /tmp/ray; those of a run
    without --address are in /tmp/p3d-UID/ray.
    """
    from p3d.jobs.job import read_job
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.log import read_log

    store = out_store(out, store_options_of(typed))
    read_job(store)
    newest = control.newest_number(store)
    if (number or 1) > newest:
        output.say(f"{store.url} has had {output.count(newest, 'run')}" if newest else f"{store.url} was never run")
        return 2
    lines = read_log(store, number or newest).splitlines()
    if not lines:
        output.say(f"run {number or newest} has not written a log")
    output.show(*lines[-tail if tail else 0 :])
    return 0


@click.command()
@click.argument("out")
@click.option(
    "-o", "--output", "file", type=click.Path(path_type=Path), required=True, help="Write to this file; - for stdout."
)
@store_options
def trace(out: str, file: Path, **typed: Any) -> int:
    """Write the timeline of the job at OUT as a Chrome trace: each worker, its shards, and its waiting times.

    It is made from committed shards, so it also works for finished jobs. Open it in https://ui.perfetto.dev or chrome://tracing.
    """
    from p3d.jobs.job import read_job
    from p3d.jobs.monitor.trace import trace_events
    from p3d.pipeline.dataset.shard_times import shard_times
    from p3d.pipeline.storage.local import writing

    store = out_store(out, store_options_of(typed))
    read_job(store)
    shards = shard_times(store)
    text = output.json_text({"displayTimeUnit": "ms", "traceEvents": list(trace_events(shards))})
    if str(file) == "-":
        sys.stdout.write(text + "\n")
    else:
        with writing(file):
            file.write_text(text + "\n")
        workers = len({(shard.host, shard.pid) for shard in shards})
        output.say(f"{file}: {output.count(len(shards), 'shard')} of {output.count(workers, 'worker process')}")
    return 0
