"""Checkpoints of the paper's baselines, whose keys are the same as ours: torchvision's ResNets and ports of C3D.

They are used only if the network is named (`--model resnet50`), because a ResNet can also be inflated to a P3D
(see `resnet`).
Sources: torchvision.models.resnet (stride on the 3x3, RGB, ImageNet statistics); public C3D ports (conv1 .. fc8).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from torch import Tensor

from p3d import zoo
from p3d.weights.record import ImportOptions, Weights, WeightsError, assemble, network_config, sha256_of

_STRIDE_ON: Final = {"resnet50": "3x3", "resnet101": "3x3", "resnet152": "3x3", "c3d": "1x1"}


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    asked: ImportOptions,
) -> Weights:
    """The baseline network `asked.name` from `tensors`, which were read from `path`.

    Options that are not given follow the convention of torchvision or of the ports. Raises WeightsError and OSError.
    """
    source = str(path)
    name = asked.name
    if name is None or name not in _STRIDE_ON:
        raise WeightsError(
            f"{source} was not read: there are public checkpoints of {', '.join(_STRIDE_ON)}, but none of {name}; "
            "save your own weights with p3d.weights.save"
        )
    last = "fc8.weight" if name == "c3d" else "fc.weight"
    if last not in tensors or tensors[last].ndim != 2:
        raise WeightsError(
            f"{source} has no classifier {last}, so it is not a complete {name}; give a checkpoint with one"
        )
    config = network_config(
        source,
        name,
        graph=asked.graph or "port",
        num_classes=len(tensors[last]),
        stride_on=asked.stride_on or _STRIDE_ON[name],
    )
    return assemble(
        source,
        config,
        asked.recipe or zoo.recipe(name, config.graph),
        tensors,
        class_names=asked.class_names or (),
        origin=f"checkpoint {path.name}, sha256 {sha256_of(path)}",
    )
