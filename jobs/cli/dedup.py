"""`p3d results dedup`: near-duplicate videos in clusters, with evidence. Needs neither torch nor Ray."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import out_store, store_options, store_options_of
from p3d.jobs.cli.progress import show_steps

if TYPE_CHECKING:
    from p3d.pipeline.results.duplicates import Member


@click.command()
@click.argument("out")
@click.option(
    "--threshold",
    type=click.FloatRange(-1, 1),
    default=0.98,
    show_default=True,
    metavar="COSINE",
    help="Count two videos as near-duplicates from this cosine similarity.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout, with every match.")
@store_options
def dedup(out: str, threshold: float, as_json: bool, **typed: Any) -> int:
    """Find near-duplicate videos of OUT: clusters and, for each video, the most similar other and the matching seconds.

    Every pair of videos is compared by its vectors. Pairs of at least --threshold are linked into clusters. A low
    threshold can link a chain of videos whose ends are not alike. Up to eight clips of a video are each matched with
    the most similar clip of the other video; the best match is shown, all of them with --json.

    Which cosine means a copy depends on the weights: look at a few clusters first. Time grows with the square of the
    number of videos. The vectors of the videos are in a temporary file. Memory holds up to an eighth of them, 256 MiB
    of clips, one row group, and about 200 bytes per video. OUT may be a snapshot. Nothing is deleted:
    `p3d results snapshot OUT DEST --exclude FILE` makes a copy without chosen videos.
    """
    from p3d.jobs.job import rows_of
    from p3d.pipeline.results.duplicates import find_duplicates

    source = rows_of(out_store(out, store_options_of(typed)))
    found = find_duplicates(source, threshold=threshold, on_step=show_steps(as_json))
    if as_json:
        output.show_json({"out": source.store.url, "threshold": threshold, "pending": source.pending, **asdict(found)})
        return 0
    for number, cluster in enumerate(found.clusters, 1):
        output.show(f"cluster {number}: {output.count(len(cluster), 'video')}")
        for one in cluster:
            output.show(*_lines(one))
    n_in = sum(map(len, found.clusters))
    output.say(
        f"{output.count(found.n_videos, 'video')} compared: {n_in} in {output.count(len(found.clusters), 'cluster')}, "
        f"{output.count(found.n_pairs, 'pair')} of cosine {threshold:g} or more"
    )
    if source.pending:
        output.say(f"{output.count(source.pending, 'video')} pending and not compared")
    return 0


def _lines(one: Member) -> list[str]:
    """A video of a cluster within 80 columns: its path, which alone may be longer, its id, and the evidence."""
    lines = [
        f"  {one.path}",
        f"    video_id {one.video_id}, {one.duration_s:.1f} s",
        f"    cosine {one.cosine:.4f} to {one.like_path}",
    ]
    if one.matches:
        best = max(one.matches, key=lambda match: match.cosine)
        mine, other = (best.start_s, best.end_s), (best.other_start_s, best.other_end_s)
        lines.append(
            "    {:.2f}-{:.2f} s is like {:.2f}-{:.2f} s of it, cosine {:.4f}".format(*mine, *other, best.cosine)
        )
    return lines
