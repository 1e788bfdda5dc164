"""`p3d retry`: the failed videos once more, as a new plan on the same output."""

from __future__ import annotations

from typing import Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.launch import next_run, report, run_and_report, run_verb_remotely
from p3d.jobs.cli.options import address_options, out_store, run_options, store_options, store_options_of


@click.command()
@click.argument("out")
@click.option("--reason", "reasons", multiple=True, metavar="REASON", help="Only these failures; may be repeated.")
@click.option("--shard-videos", type=click.IntRange(1, 100_000), default=64, show_default=True, help="As of `launch`.")
@run_options
@address_options
@store_options
def retry(
    out: str,
    reasons: tuple[str, ...],
    shard_videos: int,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Try the failed videos of OUT once more, all of them or those with a --reason.

    They become a new plan; each file is taken as it is now. Nothing that is committed changes: a video's state is that
    of the newest plan that names it. Interrupted, `p3d resume` goes on.
    """
    from p3d.jobs.job import read_job
    from p3d.jobs.planning.prepare import add_retry
    from p3d.pipeline.dataset.verify import current_failures
    from p3d.pipeline.errors import InputError, Reason

    unknown = sorted(set(reasons) - set(Reason))
    if unknown:
        raise InputError(f"--reason {unknown[0]} is none of {', '.join(Reason)}")
    remote.refuse_to_detach(address, detach)
    store = out_store(out, store_options_of(typed))
    job = read_job(store)
    if not any(not reasons or row["reason"] in reasons for row in current_failures(store)):
        output.say("nothing to retry: no video of this output has failed" + (" for these reasons" if reasons else ""))
        return report(out, store, job, as_json)
    if remote.runs_remotely(address):
        assert address is not None
        return run_verb_remotely(address, detach, store)
    with next_run(out, store, job, typed, address, takeover) as run:
        added = add_retry(run.store, job, frozenset(reasons), run.options.s3, shard_videos=shard_videos)
        if added is not None:
            output.say(f"{output.count(added.n_videos, 'video')} once more, in {output.count(added.n_shards, 'shard')}")
        return run_and_report(out, job, run, as_json)
