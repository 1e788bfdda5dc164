"""Infer from a set of weights how they were trained, and how certain that is.

A file of public weights says neither which inputs it expects nor whether its temporal filters were ever trained. The
scale of the inputs can be inferred from its first convolution and normalisation, because the statistics of `bn1` are
those of conv1's outputs on the training set. They cannot distinguish RGB from BGR; labelled clips can.

Shapes: O filters of conv1, C input channels, S positions in a filter, 49 in a 7x7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from p3d.networks.blocks import Bottleneck3D
from p3d.networks.network import Network
from p3d.preprocessing import ClipRecipe
from p3d.weights.record import Weights

_PIXEL_STD: Final = 64.0  # standard deviation of natural pictures in 0..255; about 1 when normalised, 0.25 in 0..1
_MIDDLE: Final = 8.0  # geometric mean of 64 and 1
_REACH: Final = 20.0  # pixels at distance d have a correlation of about exp(-d / 20)
_COLOURS: Final = 0.9  # approximate correlation between the channels of a pixel


@dataclass(frozen=True, slots=True)
class Hints:
    """Statistics computed from the weights alone.

    `conv1_energy` is each input channel's share of conv1's squared weights, in the order of the network's inputs.
    `input_std` is the estimated standard deviation of the training inputs, or None without a trained `bn1`. Of
    `n_temporal` temporal convolutions, `n_still` look at one frame only, and `n_untouched` have a normalisation that
    still has its initial statistics.
    """

    conv1_mean_abs: float
    conv1_energy: tuple[float, ...]
    input_std: float | None
    n_temporal: int
    n_still: int
    n_untouched: int


def hints(weights: Weights) -> Hints:
    """Compute `Hints` for these weights; takes a fraction of a second."""
    network = weights.network
    filters_OCS = _filters(network)
    energy_C = filters_OCS.square().sum(dim=(0, 2))
    blocks = [block for block in network.modules() if isinstance(block, Bottleneck3D)]
    return Hints(
        conv1_mean_abs=float(filters_OCS.abs().mean()),
        conv1_energy=tuple((energy_C / energy_C.sum().clamp(min=1e-300)).tolist()),
        input_std=_input_std(network),
        n_temporal=len(blocks),
        n_still=sum(not block.conv3.weight[:, :, [0, 2]].any() for block in blocks),
        n_untouched=sum(_untouched(block.bn3) for block in blocks),
    )


def sentences(found: Hints, recipe: ClipRecipe) -> list[str]:
    """The hints as sentences; one that contradicts `recipe` begins with "WARNING"."""
    said = []
    if recipe.channels == 3:
        shares = " ".join(f"{share:.0%}" for share in found.conv1_energy)
        said = [
            _about_range(found.input_std, recipe),
            f"conv1's energy by input channel is {shares}: weights cannot distinguish RGB from BGR, labelled clips can "
            "(`p3d weights choose`)",
        ]
    if not found.n_temporal:
        return said
    if found.n_still == found.n_temporal:
        said.append("no temporal filter looks at another frame: these weights see frames, not motion")
    else:
        seeing = found.n_temporal - found.n_still
        said.append(f"{seeing} of {found.n_temporal} temporal filters look at other frames")
    if found.n_untouched and found.n_still < found.n_temporal:
        said.append(
            f"{found.n_untouched} of {found.n_temporal} temporal normalisations still have their initial statistics: "
            "never trained, or frozen as in the authors' training"
        )
    return said


def _about_range(input_std: float | None, recipe: ClipRecipe) -> str:
    """Bytes or normalised inputs? They differ by a factor of about 60; within a factor of 2 of the middle: unknown."""
    if input_std is None:
        return "no trained bn1: the range of the inputs cannot be inferred from the file"
    wanted = _PIXEL_STD * recipe.value_range / 255 / recipe.std[0]
    found = f"bn1 fits inputs of a standard deviation of about {input_std:.2g}"
    if _MIDDLE / 2 < input_std < _MIDDLE * 2:
        return f"{found}, between 0..255 and 0..1: the range is unclear"
    what = "0..255" if input_std > _MIDDLE else "0..1, normalised or not"
    if (input_std > _MIDDLE) != (wanted > _MIDDLE):
        return f"WARNING: {found} ({what}), but the recipe gives about {wanted:.2g}: try the other range"
    return f"{found} ({what}), and the recipe gives about {wanted:.2g}"


def _stem(network: Network) -> nn.Conv2d | nn.Conv3d:
    stem = network.get_submodule(network.stem)
    assert isinstance(stem, nn.Conv2d | nn.Conv3d), "every network starts with a convolution"
    return stem


def _filters(network: Network) -> Tensor:
    return _stem(network).weight.detach().double().flatten(2)


def _input_std(network: Network) -> float | None:
    """The input standard deviation that explains the variances in bn1: the median over filters.

    A filter w on pixels of covariance s^2 R gives variance s^2 w'Rw, where R approximates natural pictures. With white
    and Gabor filters on frames of real videos the estimate is 0.6 to 1.0 times the true value (docs/how-to/weights.md).
    """
    norm = network.get_submodule(network.stem_norm) if network.stem_norm else None
    if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d) or _untouched(norm):
        return None
    assert norm.running_var is not None, "our normalisations track their statistics"
    filters_OCS = _filters(network)
    sides = [torch.arange(side, dtype=torch.float64) for side in _stem(network).kernel_size]
    positions_SD = torch.cartesian_prod(*sides)
    space_SS = torch.exp(-torch.cdist(positions_SD, positions_SD) / _REACH)
    channels = filters_OCS.shape[1]
    colours_CC = torch.full((channels, channels), _COLOURS, dtype=torch.float64).fill_diagonal_(1)
    seen_O = torch.einsum("ocs,cd,st,odt->o", filters_OCS, colours_CC, space_SS, filters_OCS)
    live_O = seen_O > 1e-6 * seen_O.max()  # filters that died in training are almost zero
    if not live_O.any():
        return None
    return float((norm.running_var.double()[live_O] / seen_O[live_O]).median().sqrt())


def _untouched(norm: nn.BatchNorm2d | nn.BatchNorm3d) -> bool:
    """Whether a normalisation has mean 0 and variance 1, or 1 - eps, which makes it an exact identity."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None, "our normalisations track their statistics"
    return not mean.any() and bool(((variance - 1).abs() <= 1.01 * norm.eps).all())
