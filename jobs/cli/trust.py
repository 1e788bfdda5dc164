"""`p3d trust`, and what the other verbs do with a job that is not this user's own: see `p3d.jobs.trust`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import out_store, store_options, store_options_of

if TYPE_CHECKING:
    from p3d.jobs.trust import Owned
    from p3d.pipeline.sources.below import SourceRule
    from p3d.pipeline.storage.store import Store, StoreOptions


@click.command()
@click.argument("out")
@store_options
def trust(out: str, **typed: Any) -> int:
    """Trust the job at OUT, which somebody else launched or which was moved, as if you had launched it from here.

    First look at what is printed: who launched the job, where and when, and where its plans read videos. After that,
    `resume`, `retry`, `cancel` and `verify --repair` work as for a job of your own, and may open any path and bucket
    that OUT names, with your permissions and credentials. The store options given here are kept for later runs.

    Without trust OUT is read-only: `status`, `verify`, `failures`, `search`, `results report` and `results serve` work.
    """
    from p3d.jobs.trust import owned_at, sources_of

    s3 = store_options_of(typed)
    store = out_store(out, s3)
    job = owned_at(store)
    for seq, (n_videos, below) in sources_of(store, job).items():
        output.show(f"plan {seq}: {output.count(n_videos, 'video')} below {below}")
    return 0 if take_on_trust(store, job, s3) else 6


def take_on_trust(store: Store, job: Owned, s3: StoreOptions) -> bool:
    """Record that this user trusts a job, and say whose it is. False if the record cannot be written, which is said."""
    from p3d.jobs.trust import id_of, keep_options, origin_of, own_record, remember

    own = own_record(store, job)
    if own is not None:
        output.say(f"{store.url}: you have {own.how} this job, on {own.host} at {own.when}")
        warning = keep_options(store, job, s3.or_those_of(own.options))
    else:
        warning = remember(store, id_of(job), "trusted", s3)
        until = "trusted only for this command" if warning else "trusted from now on"
        output.say(f"{until}: {store.url}, launched {origin_of(store)}")
    if warning:
        output.say(warning)
    return own is not None or not warning


def need_trust(
    store: Store, job: Owned, s3: StoreOptions, *, trust_it: bool, verb: str, otherwise: str = ""
) -> StoreOptions:
    """Untrusted unless the job is trusted or `trust_it`. The store options of its runs: as typed, else of this user's.

    None of them comes from OUT: they decide where this user's credentials go.
    """
    from p3d.jobs.trust import keep_options, own_record, refuse_untrusted

    if trust_it:
        take_on_trust(store, job, s3)
    else:
        refuse_untrusted(store, job, verb, otherwise)
    own = own_record(store, job)
    if own is None:
        return s3
    s3 = s3.or_those_of(own.options)
    if warning := keep_options(store, job, s3):
        output.say(warning)
    return s3


def sources_allowed(store: Store, source: str | None) -> SourceRule:
    """Which source videos a page or a report may open: those below `source`, else all of a trusted OUT."""
    from p3d.jobs.trust import is_trusted, owned_at
    from p3d.pipeline.sources.below import SourceRule

    if source is not None:
        return SourceRule(remote.absolute(source))
    trusted = is_trusted(store, owned_at(store))
    if not trusted:
        output.say(f"{store.url} is not trusted: no source video is opened. --source ROOT allows those below ROOT")
    return SourceRule(others=trusted)
