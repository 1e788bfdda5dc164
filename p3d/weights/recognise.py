"""Identify the network of the zoo that a set of named tensors belongs to, by its blocks and input channels.

`port` and `caffe` use this before `record.assemble`, because their files do not name the network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from p3d import zoo
from p3d.networks.network import NetworkConfig
from p3d.weights.record import WeightsError, check_asked, network_config


def recognise(
    source: str, tensors: Mapping[str, Tensor], *, name: str | None, graph: str, stride_on: str | None
) -> NetworkConfig:
    """The configuration that these tensors belong to, or the one called `name` if it has the same blocks.

    The block kinds cannot be inferred, so the ABC mix is assumed unless `name` is given. The number of classes is the
    number of rows of fc. Raises WeightsError.
    """
    held = _guess(source, tensors)
    if name is not None and not _could_be(name, held):
        check_asked(source, "the network", name, held)
    return network_config(
        source,
        name or held,
        graph=graph,
        num_classes=_rows(tensors.get("fc.weight")),
        stride_on=stride_on or "1x1",
    )


def _guess(source: str, tensors: Mapping[str, Tensor]) -> str:
    """The name of the network with as many blocks and input channels as these tensors have."""
    firsts = [re.fullmatch(r"layer([1-4])\.\d+\.conv1\.weight", key) for key in tensors]
    stages = [first[1] for first in firsts if first]
    blocks = tuple(stages.count(stage) for stage in "1234")
    stem = tensors.get("conv1_custom.weight")
    channels = stem.shape[1] if stem is not None and stem.ndim == 5 else 0
    for known in zoo.P3D_NAMES:  # the ABC mix comes first, and its variants have the same keys
        config = zoo.p3d_config(known)
        if (config.blocks, config.in_channels) == (blocks, channels):
            return known
    raise WeightsError(
        f"{source} holds no known P3D ({blocks} blocks per stage, {channels} input channels); "
        f"give a checkpoint of one of {', '.join(zoo.P3D_NAMES)}, or say with --model which other network it is"
    )


def _could_be(name: str, held: str) -> bool:
    """Whether the named network has the blocks and channels of the one in the file; unknown names are refused later."""
    if name not in zoo.P3D_NAMES:
        return name not in zoo.NAMES
    asked, found = zoo.p3d_config(name), zoo.p3d_config(held)
    return (asked.blocks, asked.in_channels) == (found.blocks, found.in_channels)


def _rows(tensor: Tensor | None) -> int:
    """The number of classes; a missing classifier is reported later as missing keys."""
    return tensor.shape[0] if tensor is not None and tensor.ndim and tensor.shape[0] else 400
