"""`p3d retry`: retry the failed videos, as a new plan on the same output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import remote
from p3d.jobs.cli.launch import how_to_run, report, run_verb_remotely
from p3d.jobs.cli.options import (
    address_options,
    out_store,
    run_options,
    run_options_typed,
    shard_videos_option,
    store_options,
    store_options_of,
    trust_option,
)

if TYPE_CHECKING:
    from p3d.pipeline.storage.store import Store, StoreOptions


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
    shard_videos: int | None,
    trust: bool,
    takeover: bool,
    as_json: bool,
    address: str | None,
    detach: bool,
    **typed: Any,
) -> int:
    """Retry the failed videos of OUT, all of them or those with a --reason.

    \b
      p3d retry out/
      p3d retry out/ --reason decode_timeout --video-timeout 900

    They become a new plan, and each file is read as it is now. No committed object changes: the state of a video is
    that of the newest plan that contains it. After an interruption, `p3d resume` continues.
    """
    from p3d.jobs.job import read_job
    from p3d.pipeline.errors import check_reasons
    from p3d.pipeline.recipe import PlanOptions

    remote.refuse_to_detach(address, detach)
    check_reasons(reasons)
    given, s3 = run_options_typed(typed), store_options_of(typed)
    read_job(out_store(out, s3))  # so that a wrong OUT is refused before torch and Ray are imported
    from p3d.jobs.api.runs import retry_job

    def elsewhere(store: Store, s3: StoreOptions, trusted: bool) -> int:
        return run_verb_remotely(str(address), detach, store, s3, trusted=trusted)

    plan = PlanOptions(shard_videos=shard_videos)
    how = how_to_run(given, s3, address, takeover, trust)
    ran = retry_job(out, reasons, plan, how, elsewhere if remote.runs_remotely(address) else None)
    return report(out, ran, as_json)
