"""Weights: turn a file or a seed into a network in eval mode with everything needed to use it.

    path or "random:SEED" --resolve--> Weights --save--> one safetensors file, the same bytes every time

There is one loader per format: `native` (.safetensors, written here), `port` (.pth, .pt, .tar: checkpoints of the
public PyTorch port), `caffe` (.caffemodel, the authors' release) and `resnet` (2-D ImageNet ResNets as .pth or
.safetensors, recognised by their keys). `plain` loads a baseline network that was requested by name. All of them call
`record.assemble`, which is strict: a file fits completely or is refused. Nothing is loaded by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from p3d import names, zoo
from p3d.preprocessing import ClipRecipe
from p3d.weights import caffe, native, plain, port, resnet
from p3d.weights.native import save, to_bytes
from p3d.weights.record import ImportOptions, Weights, WeightsError, network_config
from p3d.weights.seeded import random_weights

__all__ = [
    "ImportOptions",
    "Weights",
    "WeightsError",
    "WeightsFile",
    "identify",
    "load",
    "random_weights",
    "resolve",
    "save",
    "to_bytes",
]


@dataclass(frozen=True, slots=True)
class WeightsFile:
    """A file of a known format: "native", "port", "caffe" or "resnet" (a 2-D network to start another one from).

    `tensors` holds all tensors of a torch checkpoint or foreign safetensors file, which had to be read to identify it.
    """

    path: Path
    format: str
    tensors: Mapping[str, Tensor] | None = None

    def load(self, asked: ImportOptions) -> Weights:
        """Load the file as the function `load` below does. Raises WeightsError."""
        name, temporal, seed = asked.name, asked.temporal, asked.seed
        if name is not None and name not in zoo.NAMES:
            # raises WeightsError, which suggests similar names
            network_config(str(self.path), name, graph="caffe", num_classes=1, stride_on="1x1")
        with_lstm = self.format == "resnet" and name in zoo.LSTM_NAMES
        is_plain = name in zoo.BASELINES and self.tensors is not None and not with_lstm
        if (temporal, seed) != (None, None) and (is_plain or self.format != "resnet"):
            what = f"{name} needs no temporal filters" if is_plain else f"{self.path} has temporal filters of its own"
            raise WeightsError(f"{what}; leave out {temporal = } and {seed = }")
        try:
            if self.tensors is None:
                return _WHOLE[self.format](self.path, asked)
            return (plain.load if is_plain else _OF_TENSORS[self.format])(self.path, self.tensors, asked)
        except OSError as error:
            raise _unreadable(self.path, error) from error


_WHOLE: Final = {"native": native.load, "caffe": caffe.load}
_OF_TENSORS: Final = {"port": port.load, "resnet": resnet.load}


def identify(path: str | Path) -> WeightsFile:
    """Identify the format of a file by its suffix and its keys. Raises WeightsError."""
    path = Path(path)
    try:
        names.check_file(path)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    try:
        return _LOOKS[path.suffix.lower()](path)
    except OSError as error:
        raise _unreadable(path, error) from error


def load(
    path: str | Path,
    *,
    name: str | None = None,
    graph: str | None = None,
    stride_on: str | None = None,
    recipe: ClipRecipe | None = None,
    class_names: tuple[str, ...] | None = None,
    temporal: str | None = None,
    seed: int | None = None,
) -> Weights:
    """Load the weights in a file. An argument supplies what the file does not state and must agree with what it states.

    A 2-D ResNet has no temporal filters and is refused unless `temporal` says which to create: "identity", or
    "gaussian" with a `seed` (see `p3d.weights.resnet`). An LSTM is always "gaussian". Raises WeightsError.
    """
    return identify(path).load(
        ImportOptions(
            name=name,
            graph=graph,
            stride_on=stride_on,
            recipe=recipe,
            class_names=class_names,
            temporal=temporal,
            seed=seed,
        )
    )


def _look_at_checkpoint(path: Path) -> WeightsFile:
    tensors = port.read(path)
    if resnet.fits(tensors):
        return WeightsFile(path, "resnet", tensors)
    return WeightsFile(path, "port", tensors)


def _look_at_safetensors(path: Path) -> WeightsFile:
    tensors = native.read_foreign(path)
    if tensors is not None and resnet.fits(tensors):
        return WeightsFile(path, "resnet", tensors)
    return WeightsFile(path, "native")


_LOOKS: Final[dict[str, Callable[[Path], WeightsFile]]] = {
    ".safetensors": _look_at_safetensors,
    ".pth": _look_at_checkpoint,
    ".pt": _look_at_checkpoint,
    ".tar": _look_at_checkpoint,
    ".caffemodel": lambda path: WeightsFile(path, "caffe"),
}


def _unreadable(path: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{path} could not be read ({error}); check the file and its permissions")


def resolve(spec: str, *, name: str | None = None, graph: str | None = None, num_classes: int | None = None) -> Weights:
    """Load the weights given by "random:SEED" or a path. Random weights default to 400 classes and the graph "caffe".

    Raises WeightsError.
    """
    try:
        names.check_weights(spec)
    except ValueError as error:
        raise WeightsError(str(error)) from None
    if spec.startswith(names.RANDOM):
        if name is None:
            raise WeightsError(f"{spec} does not say which network; name one")
        seed = spec.removeprefix(names.RANDOM)
        classes = 400 if num_classes is None else num_classes
        return random_weights(name, int(seed), graph=graph or "caffe", num_classes=classes)
    weights = load(spec, name=name, graph=graph)
    if num_classes is not None and num_classes != weights.config.num_classes:
        raise WeightsError(
            f"{spec} holds {weights.config.num_classes} classes and {num_classes} were asked for; "
            f"ask for {weights.config.num_classes}"
        )
    return weights
