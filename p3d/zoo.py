"""The zoo: maps a name to a network and the clip recipe that its weights need.

    p3d63  p3d131  p3d199           the paper's mix of A, B and C on ResNet-50, -101, -152
    p3d63-a  -b  -c                 every block of res2..res4 of one kind (paper, table 1)
    p3d63-flow                      two input channels: optical flow, x and y
    resnet50  resnet101  resnet152  2-D, frame features averaged over the clip
    resnet50-lstm                   2-D, an LSTM over the frame features
    resnet50-3d  resnet152-3d       3x3x3 convolutions where P3D has S and T
    c3d  deepvideo-single  deepvideo-slow  convpool      the other networks of the paper's table 2
    p3d-demo                        four blocks at a quarter of the width, for 64x64 pixels: the network of the demo

Only P3D-199 was ever released by the P3D authors (Sports-1M RGB, Kinetics RGB and flow).
Source: the paper, section 4 and table 1; dropout of the deploy prototxt (Kinetics: RGB 0.5, flow 0.7).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn

from p3d import names
from p3d.networks.baselines import C3DConfig, ConvPoolConfig, DeepVideoConfig
from p3d.networks.lstm import LSTMConfig
from p3d.networks.model import P3DConfig
from p3d.networks.network import Network, NetworkConfig
from p3d.networks.resnet import ResNetConfig
from p3d.preprocessing import (
    C3D_RGB,
    CAFFE_FLOW,
    CAFFE_RGB,
    CONVPOOL_RGB,
    DEEPVIDEO_RGB,
    DEMO_RGB,
    IMAGENET_BGR,
    IMAGENET_RGB,
    PORT_FLOW,
    PORT_RGB,
    ClipRecipe,
)

_BLOCKS: Final = {"p3d63": (3, 4, 6, 3), "p3d131": (3, 4, 23, 3), "p3d199": (3, 8, 36, 3)}
_VARIANTS: Final = {"": "ABC", "-a": "A", "-b": "B", "-c": "C", "-flow": "ABC"}
P3D_NAMES: Final = names.P3D_NAMES

_P3D: Final = {"caffe": CAFFE_RGB, "port": PORT_RGB}
_FLOW: Final = {"caffe": CAFFE_FLOW, "port": PORT_FLOW}
_IMAGENET: Final = {"caffe": IMAGENET_BGR, "port": IMAGENET_RGB}
# name: class of its configuration, the arguments it needs in addition to the name, recipe by graph
_OTHERS: Final[dict[str, tuple[type[NetworkConfig], dict[str, Any], dict[str, ClipRecipe]]]] = {
    "resnet50": (ResNetConfig, {"blocks": _BLOCKS["p3d63"]}, _IMAGENET),
    "resnet101": (ResNetConfig, {"blocks": _BLOCKS["p3d131"]}, _IMAGENET),
    "resnet152": (ResNetConfig, {"blocks": _BLOCKS["p3d199"]}, _IMAGENET),
    "resnet50-lstm": (LSTMConfig, {"blocks": _BLOCKS["p3d63"]}, _IMAGENET),
    "resnet50-3d": (ResNetConfig, {"blocks": _BLOCKS["p3d63"], "spacetime": True}, _P3D),
    "resnet152-3d": (ResNetConfig, {"blocks": _BLOCKS["p3d199"], "spacetime": True}, _P3D),
    "c3d": (C3DConfig, {}, {"caffe": C3D_RGB, "port": C3D_RGB}),
    "deepvideo-single": (DeepVideoConfig, {}, {"caffe": replace(DEEPVIDEO_RGB, n_frames=1)}),
    "deepvideo-slow": (DeepVideoConfig, {"slow": True}, {"caffe": DEEPVIDEO_RGB}),
    "convpool": (ConvPoolConfig, {}, {"caffe": CONVPOOL_RGB}),
    "p3d-demo": (P3DConfig, {"blocks": (1, 1, 1, 1), "width": 16}, {"caffe": DEMO_RGB, "port": DEMO_RGB}),
}
BASELINES: Final = names.BASELINES
LSTM_NAMES: Final = tuple(name for name, (kind, _, _) in _OTHERS.items() if kind is LSTMConfig)
NAMES: Final = names.NAMES


@dataclass(frozen=True, slots=True)
class Description:
    """Size and cost of a network: parameters with classifier, MB of a float32 file, 1e9 multiply-adds per clip.

    The clip has the size of the network's own recipe (`n_frames`, `crop_hw`). `gmacs` excludes the classifier.
    """

    name: str
    layers: int
    params: int
    size_mb: float
    gmacs: float
    feature_dim: int
    n_frames: int
    crop_hw: tuple[int, int]


def config(
    name: str, *, graph: str = "caffe", num_classes: int = 400, stride_on: str = "1x1", dropout: float | None = None
) -> NetworkConfig:
    """The configuration of any network in the zoo; raises ValueError for an unknown name or option."""
    if name not in _OTHERS:
        return p3d_config(name, graph=graph, num_classes=num_classes, stride_on=stride_on, dropout=dropout)
    kind, options, _ = _OTHERS[name]
    dropout = 0.5 if dropout is None else dropout
    return kind(name=name, graph=graph, num_classes=num_classes, stride_on=stride_on, dropout=dropout, **options)


def p3d_config(
    name: str, *, graph: str = "caffe", num_classes: int = 400, stride_on: str = "1x1", dropout: float | None = None
) -> P3DConfig:
    """The configuration of a P3D in the zoo; raises ValueError for any other name and for an unknown option."""
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
    """A new network in training mode with torch's default initialisation; to extract features, load `p3d.weights`.

    Raises ValueError for an unknown name or option.
    """
    return config(name, graph=graph, num_classes=num_classes, stride_on=stride_on, dropout=dropout).build()


def recipe(name: str, graph: str) -> ClipRecipe:
    """The recipe that weights of this network expect, by the graph they were trained in.

    Raises ValueError for an unknown name or graph.
    """
    recipes = _OTHERS[name][2] if name in _OTHERS else _FLOW if _parts(name)[1] == "-flow" else _P3D
    if graph not in recipes:
        raise ValueError(f"graph of {name} must be one of {', '.join(recipes)}, not {graph!r}")
    return recipes[graph]


@cache
def describe(name: str, *, stride_on: str = "1x1", num_classes: int = 400) -> Description:
    """Size and cost, counted on torch's meta device without memory; raises ValueError for unknown options."""
    clip = recipe(name, "caffe")
    with torch.device("meta"):
        network = build(name, stride_on=stride_on, num_classes=num_classes).eval()
        clips_BCTHW = torch.empty(1, network.config.in_channels, clip.n_frames, *clip.crop_hw)
    macs: list[int] = []

    def count(layer: nn.Conv2d | nn.Conv3d | nn.Linear, _: object, out: Tensor) -> None:
        macs.append(out.numel() * math.prod(layer.weight.shape[1:]))

    def count_lstm(layer: nn.LSTM, _: object, out: tuple[Tensor, object]) -> None:
        weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.ndim == 2)
        macs.append(out[0].shape[:-1].numel() * weights)  # every weight once per time step

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            module.register_forward_hook(count)
        elif isinstance(module, nn.LSTM):
            module.register_forward_hook(count_lstm)
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
        n_frames=clip.n_frames,
        crop_hw=clip.crop_hw,
    )


def _parts(name: str) -> tuple[str, str]:
    """Split "p3d63-flow" into ("p3d63", "-flow"); raises ValueError with suggestions for an unknown name."""
    if name not in P3D_NAMES:
        raise names.unknown(name)
    depth, dash, variant = name.partition("-")
    return depth, dash + variant
