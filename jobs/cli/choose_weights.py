"""`p3d weights choose`: find the undocumented convention of a public weights file."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import options_of
from p3d.pipeline.recipe import RunOptions

if TYPE_CHECKING:
    from p3d.jobs.planning.weights_convention import Trial
    from p3d.weights import Weights


@click.command()
@click.argument("file")
@click.option(
    "--labelled",
    required=True,
    metavar="SRC",
    help="Try the conventions on these videos: a folder with one folder per class, or a list with a column `label`.",
)
@click.option(
    "--class-names",
    metavar="FILE",
    help="Read class names, one per line, in the order of the weights. Default: the file's own.",
)
@click.option(
    "--model", help="Choose the network if the file fits several (see `p3d models`). Default: the one that fits."
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=40,
    show_default=True,
    metavar="N",
    help="Use at most N videos, taking the classes in turn.",
)
@click.option(
    "--clips", type=click.IntRange(1), default=2, show_default=True, metavar="N", help="Use N clips of each video."
)
@options_of(RunOptions, only=("device",))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def choose(
    file: str,
    labelled: str,
    class_names: str | None,
    model: str | None,
    limit: int,
    clips: int,
    device: str,
    as_json: bool,
) -> int:
    """Find the graph, channel order and range of FILE by trying all of them on labelled videos.

    Public P3D files do not say what they were trained on. A wrong convention gives wrong features and no error. The
    network runs over the clips once for each of eight conventions. The most accurate one is the best guess; a warning
    says when it may be wrong.
    """
    from p3d.jobs.planning.job_spec import check_named

    check_named(model, file)
    from p3d import weights as files  # which imports torch
    from p3d.device import device_for
    from p3d.jobs.machine import usable_cpus
    from p3d.jobs.planning.weights_convention import choose as try_all
    from p3d.jobs.planning.weights_convention import labelled_videos
    from p3d.pipeline.errors import InputError

    try:
        device_for(device)
        weights = files.load(file, name=model)
    except ValueError as error:
        raise InputError(str(error)) from None
    names = _lines(class_names) if class_names else weights.class_names
    videos = labelled_videos(labelled, names, weights.config.num_classes, limit=limit)
    found = try_all(weights, videos, clips=clips, device=device, threads=max(1, usable_cpus() // 2), tell=output.say)
    best = found.trials[0]
    then = _next(file, weights, best) if found.decided else "undecided: nothing is better than chance; see the warning"
    if as_json:
        trials = [{**asdict(trial), "right": trial.n_right} for trial in found.trials]
        record = {"videos": found.n_videos, "clips": found.n_clips, "trials": trials, "warnings": found.warnings}
        output.show_json({**record, "next": then})
        return 0
    rows = [("top-1", "right", "graph", "channels", "range")]
    for trial in found.trials:
        share, of = f"{trial.n_right / found.n_videos:.0%}", f"{trial.n_right} of {found.n_videos}"
        rows.append((share, of, trial.graph, trial.channel_order, str(trial.value_range)))
    output.show(*output.table(rows, right=(0, 1, 4)))
    for sentence in found.warnings:
        output.say(f"warning: {sentence}")
    output.show("", f"next:  {then}")
    return 0


def _next(file: str, weights: Weights, best: Trial) -> str:
    """The next command. A native file states its own convention, which `import` does not override."""
    convention = f"--graph {best.graph} --channel-order {best.channel_order} --range {best.value_range}"
    if Path(file).suffix.lower() != ".safetensors":
        return f"p3d weights import {shlex.quote(file)} -o OUT.safetensors {convention}"
    clip = weights.recipe
    if (weights.config.graph, clip.channel_order, clip.value_range) == (
        best.graph,
        best.channel_order,
        best.value_range,
    ):
        return f"nothing to do: {file} already says so"
    return f"import the source of {file} ({weights.origin}) again, with {convention}"


def _lines(path: str) -> tuple[str, ...]:
    from p3d.pipeline.errors import InputError

    try:
        return tuple(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeError) as error:
        raise InputError(f"--class-names {path} could not be read ({error})") from None
