"""`p3d weights import` and `p3d weights show`: convert and inspect files of weights. No job is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p3d.jobs.cli import output
from p3d.jobs.cli.declared import Declared

if TYPE_CHECKING:
    from p3d.weights import Weights, WeightsFile

FORMATS = {
    "native": "our own .safetensors",
    "port": "a checkpoint with the keys of the PyTorch port",
    "caffe": "a caffemodel of the authors",
    "resnet": "a 2-D ResNet, which `p3d weights import` turns into the following",
}
STILL = (
    "these weights see frames, not motion: each feature is that of a 2-D network, the larger of each pair of frames "
    "at four poolings; train them further before you use them as P3D features"
)
RANDOM_IN_TIME = (
    "the temporal filters or LSTM are random: use these weights to start training, as in the paper, not for features"
)

_file = click.argument("file", type=click.Path(path_type=Path))
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
out_option = click.option(
    "-o",
    "--output",
    "out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="OUT.safetensors",
    help="Write to this file.",
)
_stated = partial(click.option, cls=Declared, group="What the file does not state")
_IMPORT_OPTIONS = (
    _stated("--model", help="Choose among networks with these tensors, such as p3d63-a. Default: the mixed one."),
    _stated(
        "--graph",
        type=click.Choice(["caffe", "port"]),
        help="Use the authors' graph or the port's. Default: the format's.",
    ),
    _stated(
        "--stride-on",
        type=click.Choice(["1x1", "3x3"]),
        help="Set which convolution has stride 2. Default: the format's.",
    ),
    _stated(
        "--temporal",
        type=click.Choice(["identity", "gaussian"]),
        help="Initialise the temporal filters of a 2-D ResNet, or its LSTM (gaussian only). Default: identity.",
    ),
    _stated("--seed", type=click.IntRange(0), help="Seed --temporal gaussian, which requires it. Default: none."),
    _stated(
        "--channel-order",
        type=click.Choice(["rgb", "bgr"]),
        help="Set the order it was trained on. Default: the format's.",
    ),
    _stated(
        "--range",
        "value_range",
        type=click.Choice(["255", "1"]),
        help="Set the input range. 255: minus 104/117/123; 1: ImageNet mean and std. Default: the format's.",
    ),
    _stated(
        "--class-names",
        "names_file",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        metavar="FILE",
        help="Read class names from UTF-8 text, one per line. Default: none, or the file's own.",
    ),
)


def import_options(verb: Callable[..., int]) -> Callable[..., int]:
    """The options that state what a file does not, for `import` and `fetch`."""
    for option in reversed(_IMPORT_OPTIONS):
        verb = option(verb)
    return verb


@click.command("import")
@_file
@out_option
@import_options
@as_json_option
def import_(file: Path, out: Path, as_json: bool, **typed: Any) -> int:
    """Convert FILE to one .safetensors that holds network, graph, clip recipe, classes and origin.

    \b
      p3d weights import resnet50.pth -o p3d63.safetensors
      p3d weights import resnet50.pth -o frames.safetensors --model resnet50

    FILE is our own .safetensors, a caffemodel of the authors, a checkpoint of the PyTorch port, or a 2-D ImageNet
    ResNet-50, -101 or -152 with torchvision's or timm's keys (.pth or .safetensors). Only tensors are read; no code in
    a file is ever run. What a format does not state defaults to the convention of its public files, and options may
    override it. They cannot override what a file states itself.

    A 2-D ResNet becomes P3D-63, -131 or -199. With --model resnet50 and so on it stays 2-D. With --model resnet50-lstm
    --temporal gaussian --seed N it gets an LSTM that has to be trained. Until it is trained further, SUCH A P3D SEES
    FRAMES, NOT MOTION: on a clip of equal frames it gives the 2-D features, on any other the larger of each pair of
    frames at the four temporal poolings. --temporal gaussian is the paper's initialisation for training and gives no
    useful features. For training use that or --graph caffe: in the port's graph the zero branches of identity never
    learn.

    OUT is written atomically and never replaces other content. Exits 2 when FILE does not fit.
    """
    check_name(out)
    convert(file, out, as_json=as_json, **typed)
    return 0


def check_name(out: Path) -> None:
    """InputError for an OUT that no other verb could read."""
    from p3d.pipeline.errors import InputError

    if out.suffix.lower() != ".safetensors":
        raise InputError(f"{out} must end in .safetensors, so that other verbs can read it")


def convert(
    file: Path,
    out: Path,
    *,
    as_json: bool,
    channel_order: str | None,
    value_range: str | None,
    names_file: Path | None,
    downloaded: str = "",
    **typed: Any,
) -> None:
    """Write OUT and show what it is. `downloaded` says where FILE is from and is added to the origin."""
    from dataclasses import replace

    from p3d.jobs.planning.job_spec import check_named
    from p3d.pipeline.errors import InputError

    check_named(typed["model"], str(file))
    from p3d.weights import to_bytes  # which imports torch
    from p3d.weights.native import write
    from p3d.zoo import BASELINES

    found = _identify(file)
    inflates = found.format == "resnet" and typed["model"] not in BASELINES
    if inflates:
        typed["temporal"] = typed["temporal"] or "identity"
    names = None if names_file is None else _class_names(names_file)
    weights = _load(found, class_names=names, **_named(typed))
    weights = _in_convention(found, weights, channel_order, value_range)
    if downloaded:
        weights = replace(weights, origin=f"{weights.origin}; {downloaded}")
    content = to_bytes(weights)
    try:
        if out.exists() and (not out.is_file() or out.read_bytes() != content):
            raise InputError(f"{out} already exists with other content; name another file or remove it")
        write(out, content)
    except OSError as error:
        raise InputError(f"{out} could not be written ({error}); no partial file is left") from None
    record = _record(out, content, "native", weights)
    if as_json:
        output.show_json(record)
    else:
        output.show(*_lines(record, weights))
    if typed["temporal"]:
        output.say(STILL if typed["temporal"] == "identity" else RANDOM_IN_TIME)


@click.command()
@_file
@as_json_option
def show(file: Path, as_json: bool) -> int:
    """Show what FILE is: format, network, graph, stride, classes, clip recipe, origin, sha256.

    Hints from its values follow: the input range that its first normalisation fits, how conv1 weights the channels,
    and whether its temporal filters use other frames at all. They are only hints: weights cannot tell RGB from BGR.

    Only tensors are read; no code in a file is ever run. If the format does not state graph or recipe, the defaults of
    `p3d weights import` are shown.
    """
    from p3d.jobs.planning.job_spec import check_named

    check_named(None, str(file))
    from p3d.weights.hints import hints, sentences  # which imports torch

    found = _identify(file)
    weights = _load(found, temporal="identity" if found.format == "resnet" else None)
    record = _record(file, file.read_bytes(), found.format, weights)
    said = hints(weights)
    if as_json:
        output.show_json(record | {"hints": asdict(said)})
        return 0
    output.show(*_lines(record, weights, *sentences(said, weights.recipe)))
    return 0


def _identify(file: Path) -> WeightsFile:
    from p3d.pipeline.errors import InputError
    from p3d.weights import WeightsError, identify

    try:
        return identify(file)
    except WeightsError as error:
        raise InputError(str(error)) from None


def _load(found: WeightsFile, **asked: Any) -> Weights:
    from p3d.pipeline.errors import InputError
    from p3d.weights import ImportOptions, WeightsError

    try:
        return found.load(ImportOptions(**asked))
    except WeightsError as error:
        raise InputError(str(error)) from None


def _named(typed: dict[str, Any]) -> dict[str, Any]:
    """The options under the names of `p3d.weights.load`."""
    return {"name": typed.pop("model"), **typed}


def _class_names(path: Path) -> tuple[str, ...]:
    """One name per line; InputError for an empty line, which would shift all later classes."""
    from p3d.pipeline.errors import InputError

    try:
        names = tuple(line.strip() for line in path.read_text("utf-8").splitlines())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} could not be read as UTF-8 text ({error})") from None
    if not names or not all(names):
        raise InputError(f"{path} must have one class name a line and no empty line")
    return names


def _in_convention(found: WeightsFile, weights: Weights, order: str | None, value_range: str | None) -> Weights:
    """The weights with the recipe of --channel-order and --range. InputError if a file states another recipe."""
    from dataclasses import replace

    from p3d.pipeline.errors import InputError
    from p3d.preprocessing import in_convention

    if order is None and value_range is None:
        return weights
    held = weights.recipe
    try:
        wanted = in_convention(
            held,
            channel_order=order or held.channel_order,
            value_range=int(value_range) if value_range else held.value_range,
        )
    except ValueError as error:
        raise InputError(f"{found.path}: {error}") from None
    if found.format == "native" and wanted != held:
        raise InputError(
            f"{found.path} states that it takes {held.channel_order} in 0..{held.value_range}; "
            "import the file that it was made from"
        )
    return replace(weights, recipe=wanted)


def _record(path: Path, content: bytes, kind: str, weights: Weights) -> dict[str, Any]:
    """The description of weights as a JSON record."""
    from hashlib import sha256

    config = weights.config
    return {
        "file": str(path),
        "size_bytes": len(content),
        "sha256": sha256(content).hexdigest(),
        "format": kind,
        "network": config.name,
        "graph": config.graph,
        "stride_on": config.stride_on,
        "in_channels": config.in_channels,
        "num_classes": config.num_classes,
        "class_names": list(weights.class_names),
        "recipe": weights.recipe.to_dict(),
        "origin": weights.origin,
    }


def _lines(record: dict[str, Any], weights: Weights, *hinted: str) -> list[str]:
    """The same as a table, with hints."""
    config, recipe = weights.config, weights.recipe
    names = weights.class_names
    called = f"called {names[0]} .. {names[-1]}" if names else "without names"
    resized = f"short side {recipe.short_side}" if recipe.resize_hw is None else "x".join(map(str, recipe.resize_hw))
    colours = recipe.channel_order if recipe.channels == 3 else "flow"
    mean, std = (" ".join(f"{value:g}" for value in values) for values in (recipe.mean, recipe.std))
    rows = [
        ("file", f"{record['file']} ({output.human_bytes(record['size_bytes'])})"),
        ("sha256", record["sha256"]),
        ("format", FORMATS.get(record["format"], record["format"])),
        ("network", f"{config.name}, graph {config.graph}, stride on the {config.stride_on}"),
        ("classes", f"{config.num_classes}, {called}"),
        ("clips", f"{recipe.n_frames} frames, {resized}, centre {'x'.join(map(str, recipe.crop_hw))} (height x width)"),
        ("inputs", f"{colours}, 0..{recipe.value_range}, mean {mean}, std {std}"),
        ("origin", record["origin"]),
    ]
    return output.table([*rows, *(("hint", sentence) for sentence in hinted)])
