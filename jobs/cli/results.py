"""`p3d results snapshot`: a copy of the rows of OUT. Reads only the dataset; imports neither torch nor Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps


@click.command()
@click.argument("out")
@click.argument("dest")
@click.option(
    "--exclude",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Leave out these ids: one per line, or column video_id of a table. Default: none.",
)
@click.option("--allow-unknown", is_flag=True, help="Accept ids in --exclude that OUT does not have.")
@click.option("--clips/--no-clips", default=True, show_default=True, help="Copy the rows of clips/, too.")
@click.option("--skip-pending", is_flag=True, help="Leave out pending videos instead of failing.")
@click.option("--json", "as_json", is_flag=True, help="Print snapshot.json on stdout.")
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
    """Write a clean copy of the dataset at OUT to DEST: for takedown, compaction or distribution.

    \b
      p3d results snapshot out/ clean/
      p3d results snapshot out/ s3://results/clean --exclude ids.txt

    DEST gets the newest row of each video, in plan order, in few large files. Of the videos in --exclude it holds only
    their number. OUT may be a snapshot, too. DEST is a folder or s3://bucket/prefix and must be empty or absent.

    Every row is checked as it is read, and every file is read back from DEST. DEST/snapshot.json is created last: a
    DEST without it is unfinished and may be removed. `p3d verify DEST` checks it again. OUT is not changed: after a
    takedown, remove it yourself.

    Exits 0 when done, 2 when --exclude has ids that OUT does not have, 5 when DEST is not empty, 6 when videos are
    pending (run `p3d resume OUT`, or add --skip-pending), 7 when OUT is damaged. A video that waits for a retry is
    pending: its older row is not used.
    """
    from p3d.jobs.job import rows_of
    from p3d.jobs.trust import id_of, is_trusted, owned_at, remember
    from p3d.pipeline.dataset.snapshot import snapshot as write_snapshot
    from p3d.pipeline.sources.lists import read_ids

    s3 = store_options_of(typed)
    leave_out = frozenset[str]() if exclude is None else read_ids(str(exclude), exclude.read_bytes(), "video_id")
    store, target = out_store(out, s3), out_store(dest, s3)
    source = rows_of(store, leave_out)
    record = write_snapshot(
        source,
        target,
        clips=clips,
        allow_unknown=allow_unknown,
        skip_pending=skip_pending,
        on_step=show_steps(as_json),
    )
    # a copy of a foreign OUT still names foreign paths
    if is_trusted(store, owned_at(store)) and (warning := remember(target, id_of(record), "copied", s3)):
        output.say(warning)
    counts = record.counts
    if as_json:
        output.show_json({**record.to_dict(), "dest": target.url, "n_unknown": len(source.unknown)})
        return 0
    size = output.human_bytes(sum(one.size_bytes for one in record.files))
    rows = [("videos", str(counts.videos)), ("clips", str(counts.clips)), ("failures", str(counts.failures))]
    output.show(*output.table([*rows, ("files", f"{len(record.files)} ({size})")]))
    for number, what in (
        (counts.excluded, "excluded: no data of them is in DEST"),
        (len(source.unknown), "to exclude that OUT does not have"),
        (counts.pending, "left out because they are pending"),
        (counts.superseded, "older rows left out: a newer plan has the video"),
    ):
        if number:
            output.say(f"{number} {what}")
    if clips and not record.with_clips:
        output.say("no clips copied: the snapshot at OUT has no clips")
    if not any(one.folder == "weights" for one in record.files):
        output.say("no weights copied: OUT has no weights")
    output.say(f"every file read back; {target.url}/snapshot.json lists them")
    return 0
