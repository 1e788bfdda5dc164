"""`p3d results`: what is made from the rows of OUT. Reads the dataset alone; neither torch nor Ray is imported."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of


@click.command()
@click.argument("out")
@click.argument("dest")
@click.option(
    "--exclude",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Ids to leave out: one a line, or column video_id of a .csv or .parquet.",
)
@click.option("--allow-unknown", is_flag=True, help="Ids to exclude may be none of OUT's.")
@click.option("--clips/--no-clips", default=True, show_default=True, help="With the rows of clips/.")
@click.option("--skip-pending", is_flag=True, help="Leave out videos that are still to be done.")
@click.option("--json", "as_json", is_flag=True, help="snapshot.json on stdout.")
@store_options
def snapshot(
    out: str,
    dest: str,
    exclude: Path | None,
    allow_unknown: bool,
    clips: bool,
    skip_pending: bool,
    as_json: bool,
    **typed: Any,
) -> int:
    """Write a clean copy of the dataset at OUT to DEST: for takedown, compaction, or to give remote.

    DEST gets the newest row of each video, in plan order, in few large files; with --exclude, nothing of the videos
    named there but how many they are. OUT may be a snapshot, too. DEST is a folder or s3://bucket/prefix and must be
    empty or absent.

    Every row is checked as it is read, every file is read back from DEST, and DEST/snapshot.json is created last: a
    DEST without it is unfinished and may be removed. `p3d verify DEST` checks it again. OUT is not changed: after a
    takedown, remove it yourself.

    Exits 0 when done, 2 when --exclude names ids that OUT does not have, 5 when DEST is not empty, 6 when videos are
    still to be done (`p3d resume OUT`, or --skip-pending; a video that a retry has not come to is one of them, and its
    older row is not used in its place), 7 when OUT is damaged.
    """
    from p3d.jobs.job import rows_of
    from p3d.pipeline.dataset.snapshot import snapshot as write_snapshot
    from p3d.pipeline.sources.lists import read_ids

    s3 = store_options_of(typed)
    leave_out = frozenset[str]() if exclude is None else read_ids(str(exclude), exclude.read_bytes(), "video_id")
    source, target = rows_of(out_store(out, s3), leave_out), out_store(dest, s3)
    record = write_snapshot(
        source,
        target,
        clips=clips,
        allow_unknown=allow_unknown,
        skip_pending=skip_pending,
        on_step=progress if sys.stderr.isatty() and not as_json else None,
    )
    counts = record.counts
    if as_json:
        output.show_json({**record.to_dict(), "dest": target.url, "n_unknown": len(source.unknown)})
        return 0
    size = output.human_bytes(sum(one.size_bytes for one in record.files))
    rows = [("videos", str(counts.videos)), ("clips", str(counts.clips)), ("failures", str(counts.failures))]
    output.show(*output.table([*rows, ("files", f"{len(record.files)} ({size})")]))
    for number, what in (
        (counts.excluded, "excluded: nothing of them is there"),
        (len(source.unknown), "to exclude that OUT does not name"),
        (counts.pending, "left out because they are still to be done"),
        (counts.superseded, "older rows of the plans left out: a newer plan names the video"),
    ):
        if number:
            output.say(f"{number} {what}")
    if clips and not record.with_clips:
        output.say("no clips: the snapshot at OUT has none")
    if not any(one.folder == "weights" for one in record.files):
        output.say("no weights: OUT has none")
    output.say(f"every file read back; {target.url}/snapshot.json says what is there")
    return 0


def progress(what: str, done: int, count: int) -> None:
    """How far it is, on a terminal."""
    click.echo(f"\r{what} {done}/{count} ", nl=done == count, err=True)
