"""`p3d trust`, and what the other verbs do with a job that is not this user's own: see `p3d.jobs.trust`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of

if TYPE_CHECKING:
    from p3d.pipeline.sources.below import SourceRule
    from p3d.pipeline.storage.store import Store


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
    from p3d.jobs.training.record import is_training, read_record, read_samples
    from p3d.jobs.trust import owned_at, sources_of, take_on_trust
    from p3d.pipeline.dataset.roots import load_roots

    s3 = store_options_of(typed)
    store = out_store(out, s3)
    if is_training(store):
        training = read_record(store)
        uris = read_samples(store, training)["uri"].to_pylist()
        shared = os.path.commonprefix(uris)  # noqa: RUF071 - of texts, and cut at a `/` below
        below = shared[: shared.rfind("/") + 1]
        output.show(f"training: {output.count(len(uris), 'video')} below {below}, in {training.samples_key}")
        return 0 if take_on_trust(store, training, s3, output.say) else 6
    job = owned_at(store)
    for seq, (n_videos, below) in sources_of(store, job).items():
        output.show(f"plan {seq}: {output.count(n_videos, 'video')} below {below}")
    for record in load_roots(store).records:
        output.show(f"moved: {record.old} is now {record.new}, for plans up to {record.plans}")
    return 0 if take_on_trust(store, job, s3, output.say) else 6


def sources_allowed(store: Store, source: str | None) -> SourceRule:
    """Which source videos a page or a report may open: those below `source`, else all of a trusted OUT."""
    from p3d.jobs.trust import is_trusted, owned_at
    from p3d.pipeline.sources.below import SourceRule, absolute

    if source is not None:
        return SourceRule(absolute(source))
    trusted = is_trusted(store, owned_at(store))
    if not trusted:
        output.say(f"{store.url} is not trusted: no source video is opened. --source ROOT allows those below ROOT")
    return SourceRule(others=trusted)
