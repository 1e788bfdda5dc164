"""`p3d results report`: a report of a job as one HTML file. Needs neither torch nor Ray."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import source_option, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps


@click.command()
@click.argument("outs", nargs=-1, required=True, metavar="OUT...")
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Write to this file, such as report.html; - for stdout.",
)
@click.option(
    "--videos",
    type=click.IntRange(0, 200),
    default=24,
    show_default=True,
    metavar="N",
    help="Show N videos on the contact sheet.",
)
@click.option(
    "--queries",
    type=click.IntRange(0, 20),
    default=4,
    show_default=True,
    metavar="N",
    help="Show N clips with their neighbours.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed the samples.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object on stdout.")
@source_option("Take pictures only of videos below this folder or s3://bucket/prefix.")
@store_options
def report(
    outs: tuple[str, ...],
    file: Path,
    videos: int,
    queries: int,
    seed: int,
    as_json: bool,
    source: str | None,
    **typed: Any,
) -> int:
    """Write an HTML report of the job at OUT, during or after it: what ran, how fast, where time went, what failed.

    Several outputs of one recipe, or a folder or prefix that holds them, get one report with a line for each. It also
    has histograms of durations and resolutions, a contact sheet, and a few clips with their nearest
    neighbours. The file needs no network and runs no script; it fits screens and A4 paper. OUT may be a snapshot, for
    which the report is shorter.

    Videos, clips and neighbours are samples, drawn by --seed. With the defaults the file stays below about 1 MB,
    however large OUT is. Rows of videos/ are read once, and clips of at most 32 shards. Memory holds the samples,
    about 300 bytes per video and per shard, and one row group.

    Pictures are decoded from the sources in child processes; none starts after 5 minutes. If a source is missing,
    changed, or larger than 512 MiB on S3, a message replaces the picture. --videos 0 --queries 0 opens no source.
    """
    from p3d.jobs.cli.trust import sources_allowed
    from p3d.jobs.monitor.outputs import outputs_of
    from p3d.jobs.monitor.report import make_report
    from p3d.pipeline.results.report.render import render

    store_options = store_options_of(typed)
    to_stdout = str(file) == "-"
    if to_stdout and as_json:
        raise click.UsageError("--json and the report cannot both go to stdout: give --output a file.")
    target = Path(os.path.realpath(file)) if file.is_file() else file  # a link to a file is kept
    part = None if to_stdout else _part_of(target)
    made = make_report(
        outputs_of(outs, store_options),
        store_options,
        rule_of=lambda store: sources_allowed(store, source),
        videos=videos,
        queries=queries,
        seed=seed,
        on_step=show_steps(as_json),
    )
    page = render(made).encode()
    missing = len(made.pictures) - made.n_pictures
    if part is None:
        sys.stdout.buffer.write(page)
        sys.stdout.flush()
    else:
        _write(part, target, page)
    counts = {"pictures": made.n_pictures, "without_picture": missing}
    facts = made.facts
    if as_json:
        n = {"videos": facts.n_videos, "failed": facts.n_failed, "pending": facts.n_pending, "clips": facts.n_clips}
        output.show_json({"out": made.out, "report": str(file), "size_bytes": len(page), **n, **counts})
        return 0
    output.say(
        f"{'the report' if to_stdout else file}: {output.human_bytes(len(page))}, "
        f"{output.count(facts.n_videos, 'video')}, {facts.n_failed} failed, {output.count(made.n_pictures, 'picture')}"
    )
    if missing:
        output.say(f"{output.count(missing, 'picture')} could not be made; the report says why")
    return 0


def _part_of(path: Path) -> Path:
    """A unique temporary name in the folder of `path`. InputError, before the long work, if it is not writable.

    It is the path itself of a device or a pipe, such as /dev/stdout, which is written to and never replaced.
    """
    from p3d.pipeline.errors import InputError

    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file, such as report.html")
    if path.exists() and not path.is_file():
        return path
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    return part


def _write(part: Path, path: Path, page: bytes) -> None:
    """Write the file atomically; InputError if that fails."""
    from p3d.pipeline.errors import InputError

    try:
        part.write_bytes(page)
        if part != path:
            part.replace(path)
    except OSError as error:
        if part != path:
            part.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
