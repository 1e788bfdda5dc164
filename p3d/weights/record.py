"""The Weights record, this package's error, and the strict conversion of named tensors to a network."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from p3d import zoo
from p3d.networks.network import Network, NetworkConfig
from p3d.preprocessing import ClipRecipe

COUNTER = "num_batches_tracked"  # a training counter of torch's batch normalisation; features do not depend on it


class WeightsError(ValueError):
    """Weights that cannot be used. The message says in one line what happened, to which file, and what to do.

    Names from a file may hold anything, so unprintable characters are escaped and long messages are cut.
    """

    def __init__(self, message: str) -> None:
        text = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in message)
        super().__init__(text if len(text) <= 2000 else f"{text[:1200]} ... {text[-300:]}")


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """A network in eval mode on the CPU, with its recipe and description.

    `class_names` has one name per class or is empty if the source has no names; `origin` describes the source.
    Raises WeightsError for a network in training mode, as a newly built one is.
    """

    network: Network
    recipe: ClipRecipe
    class_names: tuple[str, ...]
    origin: str

    def __post_init__(self) -> None:
        if self.network.training:
            raise WeightsError(
                f"a {self.network.config.name} in training mode cannot be used as weights: load them with "
                "p3d.weights.load, or call eval() on the network that you trained"
            )

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    @property
    def name(self) -> str:
        """The network's name in the zoo."""
        return self.network.config.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """Options of the caller for every loader; None leaves a value to the file or to the convention of its format.

    `name` is a name in the zoo. `temporal` and `seed` say which temporal filters to create for a 2-D network.
    """

    name: str | None = None
    graph: str | None = None
    stride_on: str | None = None
    recipe: ClipRecipe | None = None
    class_names: tuple[str, ...] | None = None
    temporal: str | None = None
    seed: int | None = None


def sha256_of(path: Path) -> str:
    """Hex SHA-256 digest of a file, for the origin of its weights. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=16)
def expected_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Every key that a set of weights must have, with its shape; counters excluded."""
    with torch.device("meta"):
        return _shapes(config.build())


def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in network.state_dict().items() if not key.endswith(COUNTER)}


def assemble(
    source: str,
    config: NetworkConfig,
    recipe: ClipRecipe,
    tensors: Mapping[str, Tensor],
    *,
    class_names: tuple[str, ...] = (),
    origin: str,
) -> Weights:
    """Build the network of `config` with float32 copies of `tensors`; training counters are set to 0.

    `source` names the file in error messages. Raises WeightsError for missing, unknown or mis-shaped keys, for
    non-finite numbers, and for a recipe or class names that do not fit the network.
    """
    with torch.device("meta"):
        network = config.build()
    _check_companions(source, network, recipe, class_names)
    check_tensors(source, f"{config.name} with {config.num_classes} classes", _shapes(network), tensors)
    state = {key: torch.zeros((), dtype=torch.int64) for key in network.state_dict() if key.endswith(COUNTER)}
    for key, tensor in tensors.items():
        if not key.endswith(COUNTER):
            state[key] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
            if not np.isfinite(state[key].numpy()).all():  # torch.isfinite takes fifty times as long on a CPU
                raise WeightsError(f"{source} holds numbers that are not finite in {key}; fetch or convert it again")
    network.load_state_dict(state, strict=True, assign=True)
    return Weights(network.eval(), recipe, class_names, origin)


def to_train(weights: Weights, dropout: float | None = None) -> Network:
    """A new network in training mode with these weights, and this dropout; by default that of its config."""
    config = weights.config if dropout is None else replace(weights.config, dropout=dropout)
    network = config.build()
    network.load_state_dict(weights.network.state_dict())
    return network


def check_asked(source: str, what: str, asked: object, held: object) -> None:
    """Raise WeightsError if the file contradicts the caller; None accepts anything."""
    if asked is not None and asked != held:
        raise WeightsError(
            f"{source} holds {what} {held} and {asked} was asked for; ask for {held} or give another file"
        )


def network_config(source: str, name: str, *, graph: str, num_classes: int, stride_on: str) -> NetworkConfig:
    """`zoo.config` with its ValueError turned into a WeightsError that names the file."""
    try:
        return zoo.config(name, graph=graph, num_classes=num_classes, stride_on=stride_on)
    except ValueError as error:
        raise WeightsError(f"{source} cannot be used: {error}") from error


def _check_companions(source: str, network: Network, recipe: ClipRecipe, class_names: tuple[str, ...]) -> None:
    config = network.config
    if recipe.channels != config.in_channels:
        raise WeightsError(
            f"{source} has a clip recipe of {recipe.channels} channels, but {config.name} takes {config.in_channels}; "
            "give it a recipe that fits"
        )
    if not network.takes.fits(recipe.n_frames, *recipe.crop_hw):
        raise WeightsError(
            f"{source} has a clip recipe of {recipe.n_frames} frames of {recipe.crop_hw} pixels, but {config.name} "
            f"takes {network.takes}; give it a recipe that fits"
        )
    if class_names and len(class_names) != config.num_classes:
        raise WeightsError(
            f"{source} has {config.num_classes} classes but {len(class_names)} names for them; give one name per class"
        )


def check_tensors(
    source: str, what: str, expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> None:
    """Raise WeightsError if tensors do not fit `what`: missing or unexpected keys, wrong shapes, integer types."""
    given = {key: tuple(tensor.shape) for key, tensor in tensors.items() if not key.endswith(COUNTER)}
    troubles = [
        f"{trouble} {_first_few(keys)}"
        for trouble, keys in (
            ("missing", expected.keys() - given.keys()),
            ("unexpected", given.keys() - expected.keys()),
            (
                "mis-shaped",
                {
                    f"{key} ({_by(given[key])} for {_by(shape)})"
                    for key, shape in expected.items()
                    if key in given and given[key] != shape
                },
            ),
            ("not floating point", {key for key in given if not tensors[key].is_floating_point()}),
        )
        if keys
    ]
    if troubles:
        raise WeightsError(
            f"{source} does not fit {what}: {'; '.join(troubles)}; "
            "name the network it was made for, or convert it to these keys"
        )


def _first_few(keys: Iterable[str], limit: int = 4) -> str:
    ordered = sorted(keys)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(key[:80] for key in ordered[:limit]) + more


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
