"""`p3d failures` and `p3d verify`: what the dataset says of itself."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of

if TYPE_CHECKING:
    from p3d.pipeline.dataset.verify import Audit
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.storage.store import Store


@click.command()
@click.argument("out")
@click.option("--reason", help="Only failures with this reason.")
@click.option("--csv", "as_csv", is_flag=True, help="CSV on stdout.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@store_options
def failures(
    out: str,
    reason: str | None,
    as_csv: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """The videos of OUT that have no rows: which, why, and what to do about each reason.

    A video that a newer plan names is judged by that plan alone.
    """
    import csv
    import sys

    from p3d.jobs.job import read_job
    from p3d.pipeline.dataset.verify import current_failures
    from p3d.pipeline.errors import REASON_MEANING, REASON_REMEDY, InputError, Reason

    store = out_store(out, store_options_of(typed))
    read_job(store)
    if reason is not None and reason not in set(Reason):
        raise InputError(f"--reason {reason} is none of {', '.join(Reason)}")
    rows = [row for row in current_failures(store) if reason in (None, row["reason"])]
    if as_json:
        output.show_json({"failures": rows})
    elif as_csv:
        writer = csv.DictWriter(
            sys.stdout, ["video_id", "path", "uri", "plan_seq", "version", "reason", "detail", "attempts"]
        )
        writer.writeheader()
        writer.writerows(rows)
    elif not rows:
        output.say("no failures")
    else:
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["reason"]] = counts.get(row["reason"], 0) + 1
        for name, count in sorted(counts.items(), key=lambda item: -item[1]):
            output.show(*_wrapped(f"{count} {name}: {REASON_MEANING[Reason(name)]}", ""))
            output.show(*_wrapped(f"what to do: {REASON_REMEDY[Reason(name)]}", "  "))
            for row in (row for row in rows if row["reason"] == name):
                output.show(f"    {row['path']}", f"        {row['detail']}")
    return 0


def _wrapped(sentence: str, indent: str) -> list[str]:
    return textwrap.wrap(sentence, 80, initial_indent=indent, subsequent_indent=" " * 6, break_on_hyphens=False)


@click.command()
@click.argument("out")
@click.option("--deep", is_flag=True, help="Read every row against its checksum; compute every pooled row again.")
@click.option("--repair", "mend", is_flag=True, help="Mend what --deep finds; damaged files move to _job/damaged/.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@store_options
def verify(out: str, deep: bool, mend: bool, as_json: bool, **typed: Any) -> int:
    """Check OUT against its plans: every video accounted for once, every file whole.

    Reads the footers of all files; --deep reads everything. --repair makes damaged videos and failures files again, and
    opens a shard again whose clips are damaged: `p3d resume` then computes it.

    Of a snapshot (`p3d results snapshot`) every file is read against its sha256, and the rows are counted.

    Exits 0 when all videos are accounted for, 6 when some are still to be done, 7 when there is damage.
    """
    import sys

    from p3d.jobs.job import read_job
    from p3d.pipeline.dataset.verify import audit

    store = out_store(out, store_options_of(typed))
    if store.head("job.json") is None and store.head("snapshot.json") is not None:
        return _verify_snapshot(store, mend, as_json)
    job = read_job(store)
    talkative = sys.stderr.isatty() and not as_json

    def on_shard(done: int, count: int) -> None:
        if talkative:
            click.echo(f"\rchecked {done}/{count} shards", nl=done == count, err=True)

    deep = deep or mend
    if mend:
        return _repair(out, store, job, as_json)
    found = audit(store, job, deep=deep, on_shard=on_shard)
    classes = ("manifest", "ok", "failed", "pending", "lost", "duplicated", "unexpected", "changed")
    if as_json:
        output.show_json(_record(found))
    else:
        output.show(
            *output.table([classes, tuple(str(getattr(found, name)) for name in classes)], right=tuple(range(8)))
        )
        for sentence in found.problems:
            output.say(sentence)
        for package, shards in found.software.items():
            if len(shards) > 1:
                which = ", ".join(f"{version} ({output.count(n, 'shard')})" for version, n in sorted(shards.items()))
                output.say(f"written by more than one {package}: {which}")
        if found.damaged:
            output.say(
                f"damage found: `p3d verify {out} --repair` mends what can be mended, `p3d resume` does the rest"
            )
        elif found.pending or found.underived:
            output.say(f"not finished: `p3d resume {out}` goes on")
        else:
            rows = f"{output.count(found.clips, 'clip')} of {output.count(found.ok, 'video')}"
            how = "every row read" if deep else "footers read; --deep reads every row"
            output.say(f"clean: {rows} in {output.count(found.shards, 'shard')}, all accounted for ({how})")
    return 7 if found.damaged else 6 if found.pending or found.underived else 0


def _verify_snapshot(store: Store, mend: bool, as_json: bool) -> int:
    """A snapshot is its own record: its files against their sha256, its rows against its counts."""
    from p3d.pipeline.dataset.snapshot_record import problems_of, read_snapshot
    from p3d.pipeline.errors import InputError

    if mend:
        raise InputError(f"{store.url} is a snapshot, which nothing can repair; make it again from its source")
    record = read_snapshot(store)
    problems, counts = problems_of(store, record), asdict(record.counts)
    if as_json:
        output.show_json({"snapshot": True, **counts, "problems": problems, "damaged": bool(problems)})
        return 7 if problems else 0
    output.show(*output.table([tuple(counts), tuple(map(str, counts.values()))], right=tuple(range(len(counts)))))
    for sentence in problems:
        output.say(sentence)
    files = output.count(len(record.files), "file")
    if problems:
        output.say(f"damage found in a snapshot of {record.source}: make it again")
    else:
        output.say(f"clean: a snapshot of {record.source} in {files}, every byte as it was written {record.created_at}")
    return 7 if problems else 0


def _record(found: Audit) -> dict[str, Any]:
    """The audit for programs."""
    record = asdict(found) | {"damaged": found.damaged}
    return record | {name: sorted(record[name]) for name in ("bad_shards", "bad_derived")}


def _repair(out: str, store: Store, job: JobRecord, as_json: bool) -> int:
    """Become the epoch in charge, mend, and look again."""
    from p3d.jobs.scheduler import control
    from p3d.pipeline.dataset.repair import repair
    from p3d.pipeline.dataset.verify import audit

    last = control.newest_epoch(store)
    epoch = control.claim(store, last.options if last else {}, takeover=False, say=output.say)
    with control.Pulse(store, epoch.number):
        done = repair(store, job.recipe, audit(store, job))
    sentence = f"repaired; `p3d resume {out}` computes what was set aside"
    control.beat(store, epoch.number, {"counter": 1, "state": "stopped", "exit_code": 6, "sentence": sentence})
    found = audit(store, job)
    if as_json:
        output.show_json(_record(found) | {"repair": asdict(done)})
    else:
        for key, aside in done.moved:
            output.show(f"moved     {key} -> {aside}")
        for key in done.derived:
            output.show(f"made      {key}")
        for name in done.reopened:
            output.show(f"open now  shard {name}")
        for problem in found.problems:
            output.say(f"left as it is: {problem}")
        if found.pending:
            output.say(f"{output.count(found.pending, 'video')} to be computed:  p3d resume {out}")
        elif not found.damaged:
            output.say("clean" if done.moved or done.derived else "nothing to repair")
    return 7 if found.damaged else 6 if found.pending else 0
