"""`p3d results export`: the clip vectors of OUT as files for other tools. Needs neither torch nor Ray."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import step_bars


@click.command()
@click.argument("out")
@click.argument("dir_", metavar="DIR")
@click.option(
    "--format", type=click.Choice(["npy"]), default="npy", show_default=True, help="Write files of this format."
)
@click.option("--skip-pending", is_flag=True, help="Leave out pending videos instead of failing.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object on stdout.")
@store_options
def export(out: str, dir_: str, skip_pending: bool, as_json: bool, **typed: Any) -> int:
    """Write the clip vectors of each video of OUT as an array for tools that detect actions in time.

    DIR/features/NAME.npy is an array [T, D]: the T clips of a video in the order of their time, with the dtype of OUT.
    ActionFormer, TriDet and similar tools read such files. NAME is the video_id. If that is not a plain file name, or
    differs from another one only in upper and lower case, NAME is made from it.

    DIR/index.parquet has a row for each video: video_id, name, file, path, uri, n_clips, n_frames, duration_s, fps,
    stride_frames, clip_frames, and the lists start_s and end_s of its clips. With --fps, n_frames and fps are those of
    the resampled video. docs/how-to/detect-actions.md has the settings of ActionFormer.

    DIR is a folder and must be empty or absent. It is written under another name next to it and renamed when all is on
    the disk. After a kill it does not exist, and a hidden folder .DIR.*.part may be removed. OUT may be a snapshot.

    Exits 0 when done, 5 when DIR is not empty, 6 when videos are pending (run `p3d resume OUT`, or add --skip-pending),
    7 when OUT is damaged.
    """
    from p3d.jobs.job import rows_of
    from p3d.pipeline.errors import InputError
    from p3d.pipeline.results.export import export_npy

    if "://" in dir_:
        raise InputError(f"{dir_}: DIR must be a folder on this machine; copy it from there")
    source = rows_of(out_store(out, store_options_of(typed)))
    with nullcontext(None) if as_json else step_bars() as on_step:
        made = export_npy(source, Path(dir_), skip_pending=skip_pending, on_step=on_step)
    if as_json:
        output.show_json({"out": source.store.url, "dir": dir_, **asdict(made)})
        return 0
    rows = [
        ("videos", str(made.videos)),
        ("clips", str(made.clips)),
        ("array", f"[clips, {made.dimension}] {made.dtype}"),
        ("size", output.human_bytes(made.size_bytes)),
        ("stride", "differs between videos" if made.stride_frames is None else f"{made.stride_frames} frames"),
        ("clip", f"{made.clip_frames} frames"),
    ]
    output.show(*output.table(rows))
    for number, what in (
        (made.failures, "failed and left out"),
        (made.pending, "pending and left out"),
        (made.renamed, "with a file name that is not the video_id; column name of the index has it"),
    ):
        if number:
            output.say(f"{output.count(number, 'video')} {what}")
    output.say(f"{dir_}: index.parquet lists the arrays in features/")
    return 0
