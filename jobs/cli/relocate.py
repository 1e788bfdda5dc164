"""`p3d relocate`: record that the source videos of OUT are in another folder or bucket. Imports no Ray."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.options import store_options, store_options_of, trust_option


@click.command()
@click.argument("out")
@click.option("--from", "old", required=True, metavar="OLD", help="Name the place where the videos were.")
@click.option("--to", "new", required=True, metavar="NEW", help="Name the place where they are now.")
@click.option(
    "--allow-changed",
    is_flag=True,
    help="Accept videos of another size; a launch embeds them again. Default: fail with an error.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@trust_option
@store_options
def relocate(out: str, old: str, new: str, allow_changed: bool, as_json: bool, trust: bool, **typed: Any) -> int:
    """Record that the source videos of OUT have moved from OLD to NEW, each a folder or s3://bucket/prefix.

    Nothing in OUT is changed: a record is added. After that `launch` of NEW finds the same videos unchanged, and
    `resume`, `retry`, `status --sources`, `results serve`, `results report` and search by path use the new place.

    A sample of up to 500 videos is looked for at NEW. Their versions are compared. If one differs, as after a copy that
    did not keep the times, or into a bucket, the sizes are compared instead; the answer says which. A video of another
    size is never taken for the same. OUT of somebody else is refused without --trust (see `p3d trust`).
    """
    from p3d.jobs.api.moves import relocate as relocate_videos

    s3 = store_options_of(typed)
    done = relocate_videos(out, old, new, allow_changed=allow_changed, trust=trust, say=output.say, s3=s3)
    if as_json:
        output.show_json(asdict(done))
        return 0
    what = {"version": "size and time or ETag", "size": "only the size, since times or ETags differ"}[done.compared]
    rows = [
        ("from", done.old),
        ("to", done.new),
        ("videos", str(done.videos)),
        ("looked at", f"{done.looked_at}: {done.same} the same, {done.gone} gone, {done.changed} of another size"),
        ("compared", what),
    ]
    output.show(*output.table(rows))
    if done.compared == "size":
        output.say("a video that is replaced by another one of the same size will not be noticed")
    output.say(f"recorded in {done.out}/{done.key}")
    return 0
