"""Weights: a file, or a seed asked for by name, becomes a network in eval mode with everything needed to use it.

    path or "random:SEED" --resolve--> Weights --save--> one safetensors file, the same bytes every time

One loader a format, chosen by the file's suffix: `native` (.safetensors, written here), `port` (.pth, .pt, .tar,
checkpoints of the public PyTorch port) and `caffe` (.caffemodel, the authors' release). All of them end in
`record.assemble`, which is strict: a file fits whole or is refused. There are no default weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from p3d.recipe import ClipRecipe
from p3d.weights import caffe, native, port
from p3d.weights.native import save, to_bytes
from p3d.weights.record import Weights, WeightsError
from p3d.weights.seeded import random_weights

__all__ = ["Weights", "WeightsError", "load", "random_weights", "resolve", "save", "to_bytes"]

_LOADERS: Final = {
    ".safetensors": native.load,
    ".pth": port.load,
    ".pt": port.load,
    ".tar": port.load,
    ".caffemodel": caffe.load,
}


def load(
    path: str | Path,
    *,
    name: str | None = None,
    graph: str | None = None,
    stride_on: str | None = None,
    recipe: ClipRecipe | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Weights:
    """The weights in a file. What is given and the file does not say, it decides; what the file says otherwise refuses.

    Raises WeightsError.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"there is no weights file at {path}; give the path of one, or random:SEED for random weights"
        )
    loader = _LOADERS.get(path.suffix.lower())
    if loader is None:
        raise WeightsError(
            f"{path} ends in none of {', '.join(_LOADERS)}, so its format is unknown; rename it to say what it is"
        )
    try:
        return loader(path, name=name, graph=graph, stride_on=stride_on, recipe=recipe, class_names=class_names)
    except OSError as error:
        raise WeightsError(f"{path} could not be read ({error}); check the file and its permissions") from error


def resolve(spec: str, *, name: str | None = None, graph: str | None = None, num_classes: int | None = None) -> Weights:
    """What a user means by "random:SEED" or a path. Random weights have 400 classes and the graph "caffe" if not told.

    Raises WeightsError.
    """
    kind, colon, seed = spec.partition(":")
    if kind == "random" and colon:
        if name is None:
            raise WeightsError(f"{spec} does not say which network; name one")
        if not re.fullmatch(r"[0-9]{1,18}", seed):
            raise WeightsError(f"{spec} needs a whole number of 1 to 18 digits after the colon, as in random:0")
        classes = 400 if num_classes is None else num_classes
        return random_weights(name, int(seed), graph=graph or "caffe", num_classes=classes)
    if not spec:
        raise WeightsError("no weights were named; give the path of a file, or random:SEED for random weights")
    weights = load(spec, name=name, graph=graph)
    if num_classes is not None and num_classes != weights.config.num_classes:
        raise WeightsError(
            f"{spec} holds {weights.config.num_classes} classes and {num_classes} were asked for; ask for what it holds"
        )
    return weights
