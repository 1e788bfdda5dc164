"""`p3d models`: the networks that are here."""

from __future__ import annotations

from dataclasses import asdict

import click

from jobs.cli import talk


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def models(as_json: bool) -> int:
    """The networks that are here: layers, parameters, size, cost of one 16x160x160 clip, feature dimension.

    Counted on the networks themselves, with a 400-class head.
    """
    from p3d import zoo

    described = [zoo.describe(name) for name in zoo.NAMES]
    if as_json:
        talk.show_json({"models": [asdict(one) for one in described]})
        return 0
    rows = [("model", "layers", "parameters", "MB", "GMAC/clip", "dim", "input")]
    rows += [
        (
            one.name,
            str(one.layers),
            f"{one.params:,}",
            f"{one.size_mb:.0f}",
            f"{one.gmacs:.1f}",
            str(one.feature_dim),
            "flow" if one.name.endswith("-flow") else "RGB",
        )
        for one in described
    ]
    talk.show(*talk.table(rows, right=(1, 2, 3, 4, 5)))
    talk.say("no weights are shipped: --weights takes a file, or random:SEED to try the machinery")
    return 0
