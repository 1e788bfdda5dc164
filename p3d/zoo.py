"""The zoo: a name gives a network and the recipe its clips need.

    p3d63  p3d131  p3d199       the paper's mix of A, B and C on ResNet-50, -101, -152
    p3d63-a  -b  -c             every block of res2..res4 of one kind (paper, table 1)
    p3d63-flow                  two input channels: optical flow, x and y

Only P3D-199 was ever released by the authors (Sports-1M RGB, Kinetics RGB and flow).
Source: the paper, section 4 and table 1; dropout of the deploy prototxt (Kinetics: RGB 0.5, flow 0.7).
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import cache
from typing import Final

import torch
from torch import Tensor, nn

from p3d.model import P3DConfig
from p3d.network import GRAPHS, Network, NetworkConfig
from p3d.recipe import CAFFE_FLOW, CAFFE_RGB, PORT_FLOW, PORT_RGB, ClipRecipe

_BLOCKS: Final = {"p3d63": (3, 4, 6, 3), "p3d131": (3, 4, 23, 3), "p3d199": (3, 8, 36, 3)}
_VARIANTS: Final = {"": "ABC", "-a": "A", "-b": "B", "-c": "C", "-flow": "ABC"}
_RECIPES: Final = {
    ("caffe", False): CAFFE_RGB,
    ("caffe", True): CAFFE_FLOW,
    ("port", False): PORT_RGB,
    ("port", True): PORT_FLOW,
}

P3D_NAMES: Final = tuple(depth + variant for depth in _BLOCKS for variant in _VARIANTS)
NAMES: Final = P3D_NAMES


@dataclass(frozen=True, slots=True)
class Description:
    """What a network costs: parameters with 400 classes, MB of a float32 file, 1e9 multiply-adds a clip.

    The clip is 16 x 160 x 160 and its features are counted; the classifier adds 0.0008 more.
    """

    name: str
    layers: int
    params: int
    size_mb: float
    gmacs: float
    feature_dim: int


def config(
    name: str, *, graph: str = "caffe", num_classes: int = 400, stride_on: str = "1x1", dropout: float | None = None
) -> NetworkConfig:
    """The configuration of a network of the zoo; raises ValueError for an unknown name or option."""
    return p3d_config(name, graph=graph, num_classes=num_classes, stride_on=stride_on, dropout=dropout)


def p3d_config(
    name: str, *, graph: str = "caffe", num_classes: int = 400, stride_on: str = "1x1", dropout: float | None = None
) -> P3DConfig:
    """The configuration of a P3D of the zoo; raises ValueError for any other name, and an unknown option."""
    depth, variant = _parts(name)
    flow = variant == "-flow"
    return P3DConfig(
        name=name,
        blocks=_BLOCKS[depth],
        kinds=_VARIANTS[variant],
        graph=graph,
        stride_on=stride_on,
        in_channels=2 if flow else 3,
        num_classes=num_classes,
        dropout=(0.7 if flow else 0.5) if dropout is None else dropout,
    )


def build(
    name: str, *, graph: str = "caffe", num_classes: int = 400, stride_on: str = "1x1", dropout: float | None = None
) -> Network:
    """A new network in training mode with torch's default initialisation; for features, load weights (`p3d.weights`).

    Raises ValueError for an unknown name or option.
    """
    return config(name, graph=graph, num_classes=num_classes, stride_on=stride_on, dropout=dropout).build()


def recipe(name: str, graph: str) -> ClipRecipe:
    """The clips that weights of this network expect, by the graph they were trained in; raises ValueError."""
    _, variant = _parts(name)
    if graph not in GRAPHS:
        raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, not {graph!r}")
    return _RECIPES[graph, variant == "-flow"]


@cache
def describe(name: str, *, stride_on: str = "1x1") -> Description:
    """Sizes and cost, counted on a network without memory (torch's meta device); raises ValueError."""
    with torch.device("meta"):
        network = build(name, stride_on=stride_on).eval()
        clips_BCTHW = torch.empty(1, network.config.in_channels, 16, 160, 160)
    macs: list[int] = []

    def count(conv: nn.Conv2d | nn.Conv3d, _: object, out: Tensor) -> None:
        macs.append(out.numel() * math.prod(conv.weight.shape[1:]))

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        network.features(clips_BCTHW)
    params = sum(parameter.numel() for parameter in network.parameters())
    statistics = sum(buffer.numel() for buffer in network.buffers() if buffer.ndim)  # not num_batches_tracked
    return Description(
        name=name,
        layers=network.config.layers,
        params=params,
        size_mb=4 * (params + statistics) / 1e6,
        gmacs=sum(macs) / 1e9,
        feature_dim=network.feature_dim,
    )


def _parts(name: str) -> tuple[str, str]:
    """("p3d63", "-flow") of "p3d63-flow"."""
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(NAMES)}"
        raise ValueError(f"no network is called {name!r}; {hint}")
    depth, dash, variant = name.partition("-")
    return depth, dash + variant
