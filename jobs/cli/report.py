"""`p3d results report`: what a job did, as one HTML file. Needs neither torch nor Ray."""

from __future__ import annotations

import sys
import uuid
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.results import progress


@click.command()
@click.argument("out")
@click.option(
    "-o",
    "--output",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The file to write, such as report.html; - for stdout.",
)
@click.option(
    "--videos", type=click.IntRange(0, 200), default=24, show_default=True, metavar="N", help="On the contact sheet."
)
@click.option(
    "--queries", type=click.IntRange(0, 20), default=4, show_default=True, metavar="N", help="Clips with neighbours."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the samples.")
@click.option("--json", "as_json", is_flag=True, help="What was written, as one JSON object on stdout.")
@store_options
def report(out: str, file: Path, videos: int, queries: int, seed: int, as_json: bool, **typed: Any) -> int:
    """One HTML file about the job at OUT, during it or after: what ran, how fast, where the time went, what failed.

    It also has histograms of durations and resolutions, a contact sheet, and a few clips with their nearest
    neighbours. The file needs no network and runs no script; it is made for screens and for A4 paper. OUT may be a
    snapshot, of which there is less to say.

    Videos, clips and neighbours are samples, drawn by --seed, so that the file stays below about 1 MB with the
    defaults, however large OUT is. Rows of videos/ are read once, and clips of at most 32 shards. Memory holds those
    samples, some 300 bytes a video and a shard, and one group of rows.

    Pictures are decoded from the sources, in processes of their own, none begun after 5 minutes. A source that is gone,
    changed, or on S3 and larger than 512 MiB, has a sentence in its place. --videos 0 --queries 0 opens no source.
    """
    from p3d.jobs.monitor.report import make_report
    from p3d.pipeline.results.report.render import render

    store_options = store_options_of(typed)
    to_stdout = str(file) == "-"
    if to_stdout and as_json:
        raise click.UsageError("--json and the report cannot both go to stdout: give --output a file.")
    part = None if to_stdout else _beside(file)
    made = make_report(
        out_store(out, store_options),
        store_options,
        videos=videos,
        queries=queries,
        seed=seed,
        on_step=progress if sys.stderr.isatty() and not as_json else None,
    )
    page = render(made).encode()
    missing = len(made.pictures) - made.n_pictures
    if part is None:
        sys.stdout.buffer.write(page)
        sys.stdout.flush()
    else:
        _write(part, file, page)
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


def _beside(path: Path) -> Path:
    """A name of its own beside the file to come. InputError where none can be written: said before the pictures."""
    from p3d.pipeline.errors import InputError

    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        part.touch(exist_ok=False)
        part.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    return part


def _write(part: Path, path: Path, page: bytes) -> None:
    """The whole file or none; InputError where it cannot be written."""
    from p3d.pipeline.errors import InputError

    try:
        part.write_bytes(page)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
