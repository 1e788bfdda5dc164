"""`p3d models`: the available networks and their costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output

if TYPE_CHECKING:
    from p3d.jobs.planning.speed import Speeds
    from p3d.zoo import Description


@click.command()
@click.option(
    "--model", "names", multiple=True, metavar="NAME", help="List only this network; may be repeated. Default: all."
)
@click.option(
    "--measure", is_flag=True, help="Time each network on this device, too: seconds per network, minutes for all."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def models(names: tuple[str, ...], measure: bool, as_json: bool) -> int:
    """List the available networks: layers, parameters, file size, cost per clip, feature dimension, clip.

    The counts include a 400-class head. MB is the size of the float32 weights file. GMAC is 1e9 multiply-adds for
    one clip of the network's own recipe (frames x height x width), up to its features.
    """
    from p3d.jobs.planning.job_spec import check_named

    for name in names:
        check_named(name)
    from p3d import zoo  # which imports torch

    described = [zoo.describe(name) for name in dict.fromkeys(names or zoo.NAMES)]
    speeds = _measured(described) if measure else None
    if as_json:
        output.show_json(_record(described, speeds))
        return 0
    rows = [("model", "layers", "parameters", "MB", "GMAC", "dim", "clip", *(("clips/s",) if speeds else ()))]
    for one in described:
        speed = (f"{speeds.of[one.name].clips_per_s:.3g}",) if speeds else ()
        clip = "x".join(map(str, (one.n_frames, *one.crop_hw)))
        row = (one.name, str(one.layers), f"{one.params:,}", f"{one.size_mb:.0f}", f"{one.gmacs:.1f}")
        rows.append((*row, str(one.feature_dim), clip, *speed))
    output.show(*output.table(rows, right=(1, 2, 3, 4, 5, 7)))
    if speeds:
        output.say(f"clips/s on {_where(speeds)}; medians, without decoding")
    output.say("no weights are shipped: `p3d weights fetch` gets some; random:SEED is for trials")
    return 0


def _measured(described: list[Description]) -> Speeds:
    from p3d.jobs.planning.speed import measure

    return measure(tuple(one.name for one in described), tell=output.say)


def _where(speeds: Speeds) -> str:
    if speeds.device == "cpu":
        return f"cpu, {output.count(speeds.threads, 'thread')}, one clip at a time"
    return f"{speeds.device}, {speeds.batch_size} clips at a time"


def _record(described: list[Description], speeds: Speeds | None) -> dict[str, Any]:
    if speeds is None:
        return {"models": [asdict(one) for one in described]}
    where = {"device": speeds.device, "threads": speeds.threads, "batch_size": speeds.batch_size}
    return {"models": [{**asdict(one), "speed": asdict(speeds.of[one.name])} for one in described], "measured": where}
