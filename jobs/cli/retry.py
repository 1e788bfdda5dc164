"""`p3d retry`: retry the failed videos, as a new plan on the same output."""

from __future__ import annotations

from typing import Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.launch import next_run, report, run_and_report, run_verb_remotely
from p3d.jobs.cli.options import (
    address_options,
    out_store,
    run_options,
    shard_videos_option,
    store_options,
    store_options_of,
    trust_option,
)


@click.command()
@click.argument("out")
@click.option(
    "--reason",
    "reasons",
    multiple=True,
    metavar="REASON",
    help="Retry only this reason; may be repeated. Default: all.",
)
@shard_videos_option
@run_options
@trust_option
@address_options
@store_options
def retry(
    out: str,
    reasons: tuple[str, ...],
    shard_videos: int,
    trust: bool,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Retry the failed videos of OUT, all of them or those with a --reason.

    They become a new plan, and each file is read as it is now. No committed object changes: the state of a video is
    that of the newest plan that contains it. After an interruption, `p3d resume` continues.
    """
    from p3d.jobs.cli.trust import need_trust
    from p3d.jobs.job import read_job
    from p3d.jobs.planning.prepare import add_retry
    from p3d.pipeline.dataset.verify import current_failures
    from p3d.pipeline.errors import InputError, Reason
    from p3d.pipeline.sources.below import EVERY_SOURCE

    unknown = sorted(set(reasons) - set(Reason))
    if unknown:
        raise InputError(f"--reason {unknown[0]} is not one of {', '.join(Reason)}")
    remote.refuse_to_detach(address, detach)
    s3 = store_options_of(typed)
    store = out_store(out, s3)
    job = read_job(store)
    s3 = need_trust(store, job, s3, trust_it=trust, verb="retry")
    if not any(not reasons or row["reason"] in reasons for row in current_failures(store)):
        output.say("nothing to retry: no video of this output has failed" + (" for these reasons" if reasons else ""))
        return report(out, store, job, as_json)
    if remote.runs_remotely(address):
        assert address is not None
        return run_verb_remotely(address, detach, store, s3, trusted=True)
    with next_run(out, store, job, typed, s3, address, takeover, rule=EVERY_SOURCE) as run:
        added = add_retry(run.store, job, frozenset(reasons), run.options.s3, shard_videos=shard_videos)
        if added is not None:
            output.say(f"{output.count(added.n_videos, 'video')} to retry, in {output.count(added.n_shards, 'shard')}")
        return run_and_report(out, job, run, as_json)
