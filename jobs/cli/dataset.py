"""`p3d failures` and `p3d verify`: what failed, and whether the dataset is complete and undamaged."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output, remote
from p3d.jobs.cli.options import out_store, store_options, store_options_of, trust_option
from p3d.jobs.cli.progress import show_steps
from p3d.pipeline.errors import JobError

if TYPE_CHECKING:
    from p3d.jobs.cli.recompute import Asked
    from p3d.pipeline.dataset.verify import Audit, CheckPieces
    from p3d.pipeline.recipe import JobRecord
    from p3d.pipeline.storage.store import Store, StoreOptions


@click.command()
@click.argument("out")
@click.option("--reason", help="List only failures with this reason. Default: all.")
@click.option(
    "--all", "every", is_flag=True, help="List every video. Default: one for each sentence, and how many more."
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@store_options
def failures(
    out: str,
    reason: str | None,
    every: bool,
    as_csv: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """List the videos of OUT that have no rows, why, and what to do about each reason.

    Of videos with the same reason and the same sentence, one is an example for all. --csv and --json have every video.
    If a newer plan contains a video, only the result of that plan counts.
    """
    import csv
    import sys

    from p3d.jobs.job import read_job
    from p3d.pipeline.dataset.verify import current_failures
    from p3d.pipeline.errors import check_reasons

    check_reasons([] if reason is None else [reason])
    store = out_store(out, store_options_of(typed))
    read_job(store)
    rows = [row for row in current_failures(store) if reason in (None, row["reason"])]
    if as_json:
        output.show_json({"failures": rows})
    elif as_csv:
        writer = csv.DictWriter(
            sys.stdout, ["video_id", "path", "uri", "plan_seq", "version", "reason", "detail", "attempts"]
        )
        writer.writeheader()
        writer.writerows(map(output.escape_all, rows))
    elif not rows:
        output.say("no failures")
    else:
        _show_failures(rows, every)
    return 0


def _show_failures(rows: list[dict[str, Any]], every: bool) -> None:
    """Reasons, the most frequent first, with the videos of each: all, or one for each sentence."""
    from p3d.pipeline.errors import meaning_of

    groups: dict[str, dict[str, list[dict[str, Any]]]] = {}  # reason -> sentence -> rows
    for at, row in enumerate(rows):
        sentence = f"{at}" if every else row["detail"]
        groups.setdefault(row["reason"], {}).setdefault(sentence, []).append(row)
    for name, sentences in sorted(groups.items(), key=lambda item: -sum(map(len, item[1].values()))):
        meaning, remedy = meaning_of(name)
        output.show(*_wrapped(f"{sum(map(len, sentences.values()))} {name}: {meaning}", ""))
        output.show(*_wrapped(f"what to do: {remedy}", "  "))
        for alike in sorted(sentences.values(), key=len, reverse=True):
            more = f" and {len(alike) - 1} more" if len(alike) > 1 else ""
            output.show(f"    {alike[0]['path']}{more}", f"        {alike[0]['detail']}")
    if any(len(alike) > 1 for sentences in groups.values() for alike in sentences.values()):
        output.say("--all lists every video")


def _wrapped(sentence: str, indent: str) -> list[str]:
    return textwrap.wrap(sentence, 80, initial_indent=indent, subsequent_indent=" " * 6, break_on_hyphens=False)


@click.command()
@click.argument("outs", metavar="OUT...", nargs=-1, required=True)
@click.option("--deep", is_flag=True, help="Verify the checksum of every row, and pool the clips of every video again.")
@click.option(
    "--repair", "repair_it", is_flag=True, help="Repair what --deep finds; move damaged files to _job/damaged/."
)
@click.option(
    "--recompute",
    type=click.IntRange(1),
    metavar="N",
    help="Embed N clips again, drawn at random, and compare; all if there are fewer. Default: none.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, metavar="N", help="Draw the clips by this seed."
)
@click.option(
    "--source",
    metavar="ROOT",
    help="Open only videos below this folder or s3://bucket/prefix; needed if OUT is not trusted. Default: all.",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="Embed with these weights, which must be of the same network. Default: those in OUT.",
)
@click.option(
    "--address",
    metavar="WHERE",
    help="Verify on this Ray cluster: auto, HOST:PORT or ray://HOST:PORT. Default: on this machine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@trust_option
@store_options
def verify(
    outs: tuple[str, ...],
    deep: bool,
    repair_it: bool,
    recompute: int | None,
    seed: int,
    source: str | None,
    weights: str | None,
    address: str | None,
    as_json: bool,
    trust: bool,
    **typed: Any,
) -> int:
    """Check OUT against its plans: every video is accounted for once, and every file is complete.

    \b
      p3d verify out/
      p3d verify out/ --repair
      p3d verify out/ --recompute 100 --seed 7

    Reads the footers of all files; --deep reads everything. --repair writes damaged videos and failures files again. A
    shard whose clips are damaged becomes pending, and `p3d resume` computes it again.

    Shards that were made with different versions, devices, batch sizes or threads are listed. They are not damage, but
    the last bits of their vectors may differ.

    With --recompute, N of the newest clips are decoded and embedded again by the recipe of OUT. A row must be the same
    bit for bit where all that decides the bits is as the footer of its shard says, and otherwise nearly the same, by
    cosine. The answer says how many agree, how many wrong rows there are at most among all with 95 % confidence, and
    why a row differs. A row whose source is missing or has changed is not checked. The draw follows from --seed and the
    number of rows, so choose a seed of your own for an OUT from somebody else.

    With --address, every core of a cluster reads some of the files. All nodes must be able to read OUT.

    For a snapshot (`p3d results snapshot`), every file is checked against its sha256, and the rows are counted.

    Several outputs, and the outputs directly in a folder or prefix OUT, are checked one after the other. A table shows
    the result of each, and one that cannot be read does not keep the others from being checked.

    Exits 0 when all videos are accounted for, 6 when some are pending or none of the drawn clips could be checked, 7
    when there is damage or a wrong row; with several outputs, with the worst code.
    """
    from p3d.jobs.cli.recompute import Asked
    from p3d.jobs.monitor.outputs import outputs_of

    if recompute is None and (source is not None or weights is not None or seed):
        raise click.UsageError("--seed, --source and --weights belong to --recompute N.")
    if recompute is not None and repair_it:
        raise click.UsageError("--repair and --recompute cannot be combined: repair first.")
    if address is not None:
        _refuse_elsewhere(address, repair=repair_it, recompute=recompute is not None)
    asked = None if recompute is None else Asked(recompute, seed, source, weights)
    how = _How(deep or repair_it, repair_it, asked, address, as_json, trust)
    s3 = store_options_of(typed)
    stores = outputs_of(outs, s3)
    named = outs[0] if [out_store(one, s3).url for one in outs] == [stores[0].url] else ""
    if len(stores) == 1:
        code, record = _verify(stores[0], named, how, s3)
        if as_json:
            output.show_json(record)
        return code
    results: list[tuple[Store, int, dict[str, Any]]] = []
    for store in stores:
        if not as_json:
            output.show(store.url)
        try:
            results.append((store, *_verify(store, "", how, s3)))
        except JobError as error:
            results.append((store, output.exit_code(error), {"error": str(error)}))
            output.say(f"error: {error}")
    if as_json:
        found = [{"out": store.url, "exit_code": code, **record} for store, code, record in results]
        output.show_json({"outputs": found})
    else:
        output.show("", *_summary(results))
    return output.worst([code for _, code, _ in results])


@dataclass(frozen=True, slots=True)
class _How:
    """The options of `verify`, other than the outputs and their store options."""

    deep: bool
    repair: bool
    asked: Asked | None  # of --recompute
    address: str | None  # of the cluster that checks
    as_json: bool
    trust: bool


OUTCOMES = {0: "clean", 6: "not finished", 7: "damaged"}


def _summary(results: list[tuple[Store, int, dict[str, Any]]]) -> list[str]:
    """A table of several outputs, with a line for each and a total."""
    from p3d.pipeline.storage.urls import short_names

    names = short_names([store.url for store, _, _ in results])
    counts = [
        (
            record.get("ok", record.get("videos", 0)),
            record.get("failed", record.get("failures", 0)),
            record.get("pending", 0),
        )
        for _, _, record in results
    ]
    rows = [
        (names[store.url], _outcome(code, record), *(["-"] * 3 if "error" in record else map(str, count)))
        for (store, code, record), count in zip(results, counts, strict=True)
    ]
    total = ("total", "", *(str(sum(column)) for column in zip(*counts, strict=True)))
    return output.table([("output", "outcome", "ok", "failed", "pending"), *rows, total], right=(2, 3, 4))


def _outcome(code: int, record: dict[str, Any]) -> str:
    """In a word or two, what was found. Rows that were computed again count where nothing else is wrong."""
    again = record.get("recompute")
    if again and again["wrong"]:
        return f"{again['wrong']} wrong"
    if again and code == 6 and not record["pending"]:
        return "not checked"
    return OUTCOMES.get(code, "error")


def _verify(store: Store, named: str, how: _How, s3: StoreOptions) -> tuple[int, dict[str, Any]]:
    """Check one output. Returns the exit code and the result as a JSON record, which is shown unless `how.as_json`.

    `named` is the output as typed, for messages.
    """
    from p3d.jobs.cli.recompute import allowed, recomputed, record, tell, weights_for
    from p3d.jobs.job import read_job
    from p3d.pipeline.dataset.verify import audit
    from p3d.pipeline.errors import InputError

    asked = how.asked
    if store.head("job.json") is None and store.head("snapshot.json") is not None:
        if asked is not None:
            raise InputError(f"{store.url} is a snapshot; --recompute needs the output of the job")
        if how.address is not None:
            raise InputError(f"{store.url} is a snapshot; --address needs the output of a job")
        return _verify_snapshot(store, how.repair, how.as_json)
    job = read_job(store)
    on_shard = partial(show_steps(how.as_json), "checked")
    if asked is not None:
        rule, s3, trusted = allowed(named, store, job, asked, s3, how.trust)
        given = weights_for(store, job, asked, s3)
    if how.repair:
        from p3d.jobs.trust import need_trust

        need_trust(store, job, s3, trust_it=how.trust, verb="verify --repair", say=output.say)
        return _repair(named, store, job, how.as_json)
    with _elsewhere(store, job, how, s3) as elsewhere:
        found = audit(store, job, deep=how.deep, on_shard=on_shard, elsewhere=elsewhere)
    if not how.as_json:
        _show_audit(named, store, found, how.deep)
    code, result = 7 if found.damaged else 6 if found.pending or found.underived else 0, _record(found)
    if asked is not None and found.damaged:
        output.say("no clip was computed again, because of the damage")
        result |= {"recompute": None}
    elif asked is not None:
        again = recomputed(store, job, asked, given, rule, s3, quiet=how.as_json)
        code, result = max(code, again.exit_code), result | {"recompute": record(again)}
        if not how.as_json:
            tell(again, asked, trusted)
    return code, result


def _refuse_elsewhere(address: str, *, repair: bool, recompute: bool) -> None:
    """UsageError for an address where a verification cannot run, and for what runs on this machine only."""
    if remote.runs_remotely(address):
        raise click.UsageError(
            f"--address {address}: files are verified from inside the cluster. Run `p3d verify OUT --address auto` on "
            "the head (`ray exec`, `kubectl exec`), or give ray://HEAD:10001"
        )
    if repair or recompute:
        option = "--repair" if repair else "--recompute"
        raise click.UsageError(f"{option} runs on this machine: give it without --address.")


@contextlib.contextmanager
def _elsewhere(store: Store, job: JobRecord, how: _How, s3: StoreOptions) -> Iterator[CheckPieces | None]:
    """What checks the files on a cluster; None for this process."""
    if how.address is None:
        yield None
        return
    from p3d.jobs.scheduler.cluster_audit import checked_on  # which imports Ray

    with checked_on(how.address, store.url, job.recipe, s3, deep=how.deep, say=output.say) as check:
        yield check


def _show_audit(out: str, store: Store, found: Audit, deep: bool) -> None:
    """Print the counts of an audit, what it found, and what to do."""
    classes = ("manifest", "ok", "failed", "pending", "lost", "duplicated", "unexpected", "changed")
    output.show(*output.table([classes, tuple(str(getattr(found, name)) for name in classes)], right=tuple(range(8))))
    if found.superseded:
        n_videos = output.count(found.manifest - found.superseded, "video")
        rows = "rows of older plans for videos that a newer plan names"
        output.say(f"{found.superseded} superseded: {rows}; `p3d status` counts the {n_videos} once each")
    if found.roots:
        output.say(f"{output.count(found.roots, 'record')} of moved videos in roots/")
    for sentence in found.problems:
        output.say(sentence)
    for name, shards in (found.software | found.settings).items():
        if len(shards) > 1:
            which = ", ".join(
                f"{value} ({output.count(n, 'shard')}, such as {found.examples[name][value]})"
                for value, n in sorted(shards.items())
            )
            output.say(f"made with different values of {name}: {which}")
    if found.damaged:
        repair = f"`p3d verify {store.words(out)} --repair`"
        output.say(f"damage found: {repair} repairs what it can, `p3d resume` computes the rest")
    elif found.pending or found.underived:
        if found.underived:
            output.say(f"not made yet: {output.count(found.underived, 'file')} of videos/ and failures/")
        output.say(f"not finished: `p3d resume {store.words(out)}` continues")
    else:
        rows = f"{output.count(found.clips, 'clip')} of {output.count(found.ok, 'video')}"
        how = "every row checked" if deep else "footers checked; --deep checks every row"
        output.say(f"clean: {rows} in {output.count(found.shards, 'shard')}, all accounted for ({how})")


def _verify_snapshot(store: Store, repair_it: bool, as_json: bool) -> tuple[int, dict[str, Any]]:
    """Check a snapshot against its own record: files against their sha256, rows against the counts."""
    from p3d.pipeline.dataset.snapshot_record import problems_of, read_snapshot
    from p3d.pipeline.errors import InputError

    if repair_it:
        raise InputError(f"{store.url} is a snapshot, which cannot be repaired; make it again from its source")
    record = read_snapshot(store)
    on_step = partial(show_steps(as_json), "checked")
    problems, counts = problems_of(store, record, on_step), asdict(record.counts)
    code, found = 7 if problems else 0, {"snapshot": True, **counts, "problems": problems, "damaged": bool(problems)}
    if as_json:
        return code, found
    output.show(*output.table([tuple(counts), tuple(map(str, counts.values()))], right=tuple(range(len(counts)))))
    for sentence in problems:
        output.say(sentence)
    files = output.count(len(record.files), "file")
    if problems:
        output.say(f"damage found in a snapshot of {record.source}: make it again")
    else:
        output.say(f"clean: a snapshot of {record.source} in {files}, all bytes unchanged since {record.created_at}")
    return code, found


def _record(found: Audit) -> dict[str, Any]:
    """The audit as a JSON record."""
    record = asdict(found) | {"damaged": found.damaged}
    return record | {name: sorted(record[name]) for name in ("bad_shards", "bad_derived")}


def _repair(named: str, store: Store, job: JobRecord, as_json: bool) -> tuple[int, dict[str, Any]]:
    """Claim the output as a new run, repair it, and audit it again."""
    from p3d.jobs.scheduler import control
    from p3d.jobs.scheduler.run_snapshot import RunSnapshot
    from p3d.pipeline.dataset.repair import repair
    from p3d.pipeline.dataset.verify import audit

    last = control.newest_epoch(store)
    epoch = control.claim(store, last.options if last else {}, takeover=False, say=output.say)
    with control.Pulse(store, epoch.number):
        done = repair(store, job.recipe, audit(store, job, on_shard=partial(show_steps(as_json), "checked")))
    sentence = "repaired; `p3d resume` computes what was set aside"
    control.beat(store, epoch.number, RunSnapshot(counter=1, state="stopped", exit_code=6, sentence=sentence))
    found = audit(store, job, on_shard=partial(show_steps(as_json), "checked again"))
    if not as_json:
        for key, aside in done.moved:
            output.show(f"moved     {key} -> {aside}")
        for key in done.derived:
            output.show(f"made      {key}")
        for name in done.reopened:
            output.show(f"open now  shard {name}")
        for problem in found.problems:
            output.say(f"left as it is: {problem}")
        if found.pending:
            output.say(f"{output.count(found.pending, 'video')} to be computed:  p3d resume {store.words(named)}")
        elif not found.damaged:
            output.say("clean" if done.moved or done.derived else "nothing to repair")
    return 7 if found.damaged else 6 if found.pending else 0, _record(found) | {"repair": asdict(done)}
