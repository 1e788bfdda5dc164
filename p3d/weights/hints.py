"""What the numbers of a set of weights say of how they were trained, and how sure that is.

A file of public weights says neither which inputs it wants nor whether its temporal filters were ever trained. Its
first convolution and normalisation still tell the scale of the inputs: the statistics of `bn1` are those of conv1's
outputs on the training set. Nothing in them tells RGB from BGR; labelled clips do.

Shapes: O filters of conv1, C input channels, S the 49 places of a 7x7 filter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from p3d.blocks import Bottleneck3D
from p3d.model import P3D
from p3d.recipe import ClipRecipe
from p3d.weights.record import Weights

_PIXEL_STD: Final = 64.0  # of natural pictures in 0..255
_REACH: Final = 20.0  # pixels d apart correlate by about exp(-d / 20)
_COLOURS: Final = 0.9  # and the channels of a pixel by about this


@dataclass(frozen=True, slots=True)
class Hints:
    """Read off the weights alone.

    `conv1_energy` is each input channel's share of conv1's squared weights, in the order of the network's inputs;
    `input_std` the standard deviation of the inputs it was trained on, None where `bn1` was never trained. Of
    `n_temporal` temporal convolutions `n_still` look at one frame only, and `n_untouched` have a normalisation with the
    statistics it was made with.
    """

    conv1_mean_abs: float
    conv1_energy: tuple[float, ...]
    input_std: float | None
    n_temporal: int
    n_still: int
    n_untouched: int


def hints(weights: Weights) -> Hints:
    """The statistics above; costs a fraction of a second."""
    network = weights.network
    filters_OCS = network.conv1_custom.weight.detach().double().flatten(2)
    energy_C = filters_OCS.square().sum(dim=(0, 2))
    blocks = [block for block in network.modules() if isinstance(block, Bottleneck3D)]
    return Hints(
        conv1_mean_abs=float(filters_OCS.abs().mean()),
        conv1_energy=tuple((energy_C / energy_C.sum().clamp(min=1e-300)).tolist()),
        input_std=_input_std(network, filters_OCS),
        n_temporal=len(blocks),
        n_still=sum(not block.conv3.weight[:, :, [0, 2]].any() for block in blocks),
        n_untouched=sum(_untouched(block.bn3) for block in blocks),
    )


def sentences(found: Hints, recipe: ClipRecipe) -> list[str]:
    """The hints in words; one that speaks against `recipe` is a WARNING."""
    shares = " ".join(f"{share:.0%}" for share in found.conv1_energy)
    said = [_about_range(found.input_std, recipe)]
    if recipe.channels == 3:
        said.append(
            f"conv1's energy by input channel is {shares}: weights do not tell RGB from BGR, labelled clips do "
            "(`p3d weights choose`)"
        )
    if found.n_still == found.n_temporal:
        said.append("no temporal filter looks at another frame: these weights see frames, not motion")
    else:
        seeing = found.n_temporal - found.n_still
        said.append(f"{seeing} of {found.n_temporal} temporal filters look at other frames")
    if found.n_untouched and found.n_still < found.n_temporal:
        said.append(
            f"{found.n_untouched} of {found.n_temporal} temporal normalisations still have the statistics they were "
            "made with: never trained, or frozen as the authors did"
        )
    return said


def _about_range(input_std: float | None, recipe: ClipRecipe) -> str:
    """Bytes or normalised inputs? They differ by a factor of about 60; within 2 of the middle nothing is said."""
    if input_std is None:
        return "bn1 was never trained: the file does not tell the range of its inputs"
    wanted = _PIXEL_STD * recipe.value_range / 255 / recipe.std[0]
    bytes_likely = input_std > math.sqrt(_PIXEL_STD)
    found = f"bn1 fits inputs of a standard deviation of about {input_std:.2g}"
    if 0.5 < input_std / math.sqrt(_PIXEL_STD) < 2:
        return f"{found}, between 0..255 and 0..1: it tells neither"
    what = "0..255" if bytes_likely else "0..1, normalised or not"
    if bytes_likely != (wanted > math.sqrt(_PIXEL_STD)):
        return f"WARNING: {found} ({what}), but the recipe gives about {wanted:.2g}: try the other range"
    return f"{found} ({what}), and the recipe gives about {wanted:.2g}"


def _input_std(network: P3D, filters_OCS: Tensor) -> float | None:
    """The median over filters of what inputs must deviate by to give the deviation that bn1 saw.

    A filter w on pixels of covariance s^2 R gives variance s^2 w'Rw; R is that of natural pictures, roughly. White and
    Gabor filters on frames of real videos: off by a factor of 0.6 to 1.1.
    """
    mean_O, variance_O = network.bn1.running_mean, network.bn1.running_var
    assert mean_O is not None and variance_O is not None, "our normalisations track their statistics"
    if _untouched(network.bn1):
        return None
    side = torch.arange(7, dtype=torch.float64)
    places_S2 = torch.cartesian_prod(side, side)
    space_SS = torch.exp(-torch.cdist(places_S2, places_S2) / _REACH)
    channels = filters_OCS.shape[1]
    colours_CC = torch.full((channels, channels), _COLOURS, dtype=torch.float64).fill_diagonal_(1)
    seen_O = torch.einsum("ocs,cd,st,odt->o", filters_OCS, colours_CC, space_SS, filters_OCS)
    live_O = seen_O > 1e-6 * seen_O.max()  # filters that died in training are all but zero
    if not live_O.any():
        return None
    return float((variance_O.double()[live_O] / seen_O[live_O]).median().sqrt())


def _untouched(norm: nn.BatchNorm3d) -> bool:
    """Whether a normalisation has mean 0 and variance 1, or what passes exactly: 1 - eps."""
    mean, variance = norm.running_mean, norm.running_var
    assert mean is not None and variance is not None, "our normalisations track their statistics"
    return not mean.any() and bool(((variance - 1).abs() <= 1.01 * norm.eps).all())
