"""`p3d failures` and `p3d verify`: what the dataset says of itself."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from jobs.cli import talk


@click.command()
@click.argument("out")
@click.option("--reason", help="Only failures with this reason.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on stdout.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@talk.store_options
def failures(
    out: str,
    reason: str | None,
    as_csv: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """The videos of OUT that have no rows: which, why, and how often they were tried.

    A video that a newer plan names is judged by that plan alone.
    """
    import csv
    import sys

    from jobs.job import read_job
    from pipeline.errors import REASON_MEANING, InputError, Reason
    from pipeline.verify import current_failures

    store = talk.out_store(out, talk.options_of(typed))
    read_job(store)
    if reason is not None and reason not in set(Reason):
        raise InputError(f"--reason {reason} is none of {', '.join(Reason)}")
    rows = [row for row in current_failures(store) if reason in (None, row["reason"])]
    if as_json:
        talk.show_json({"failures": rows})
    elif as_csv:
        writer = csv.DictWriter(
            sys.stdout, ["video_id", "path", "uri", "plan_seq", "version", "reason", "detail", "attempts"]
        )
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        talk.say("no failures")
    else:
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            talk.show(f"{count} {name}: {REASON_MEANING[Reason(name)]}")
            for row in (row for row in rows if row["reason"] == name):
                talk.show(f"    {row['path']}\n        {row['detail']}")
    return 0


@click.command()
@click.argument("out")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@talk.store_options
def verify(out: str, as_json: bool, **typed: Any) -> int:
    """Check every file of OUT against its plans and its checksums, and every pooled row against its clips.

    Exits 0 when all videos are accounted for, 6 when some are still to be done, 7 when there is damage.
    """
    import sys

    from jobs.job import read_job
    from pipeline.verify import audit

    store = talk.out_store(out, talk.options_of(typed))
    job = read_job(store)
    talkative = sys.stderr.isatty() and not as_json

    def on_shard(done: int, count: int) -> None:
        if talkative:
            click.echo(f"\rchecked {done}/{count} shards", nl=done == count, err=True)

    found = audit(store, job, on_shard=on_shard)
    classes = ("manifest", "ok", "failed", "pending", "lost", "duplicated", "unexpected", "changed")
    if as_json:
        talk.show_json({**asdict(found), "damaged": found.damaged})
    else:
        talk.show(talk.table([classes, tuple(str(getattr(found, name)) for name in classes)], right=tuple(range(8))))
        for sentence in found.problems:
            talk.say(sentence)
        if found.damaged:
            talk.say("damage found: what is lost or changed must be computed again, or restored from a copy")
        elif found.pending or found.underived:
            talk.say(f"not finished: `p3d resume {out}` goes on")
        else:
            rows = f"{talk.count(found.clips, 'clip')} of {talk.count(found.ok, 'video')}"
            talk.say(f"clean: {rows} in {talk.count(found.shards, 'shard')}, all accounted for")
    return 7 if found.damaged else 6 if found.pending or found.underived else 0
