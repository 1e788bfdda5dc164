"""The interface of every network in the zoo, so that weights, encoder and jobs depend on no particular network.

    NetworkConfig --build--> Network:  clips_BCTHW --features--> features_BD --classify--> logits_BK

A network also states which clips it accepts and where its first convolution and last normalisations are. Drawing random
weights needs no other knowledge of its structure.

Shapes: B clips, C channels, T frames, H height, W width, D features, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

GRAPHS: Final = ("caffe", "port")
STRIDES_ON: Final = ("1x1", "3x3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Takes:
    """Accepted clip sizes: exactly this size if `exact`, else a multiple of `frames` and sides of at least `side`."""

    frames: int
    side: int
    exact: bool = False

    def fits(self, frames: int, height: int, width: int) -> bool:
        """Whether a clip of `frames` frames of (height, width) pixels is accepted."""
        if self.exact:
            return (frames, height, width) == (self.frames, self.side, self.side)
        return frames >= self.frames and frames % self.frames == 0 and min(height, width) >= self.side

    def __str__(self) -> str:
        if self.exact:
            return f"{self.frames} frames of {self.side}x{self.side} pixels"
        frames = f"multiples of {self.frames} frames" if self.frames > 1 else "any number of frames"
        return f"{frames} and sides of at least {self.side}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig(ABC):
    """The architecture of a network: everything but its weights. Raises ValueError for invalid values.

    `graph` is "caffe" for the network as trained in Caffe, where poolings round up, and "port" for the public PyTorch
    versions, where they pad or round down. `stride_on` says which convolution of a bottleneck halves the image.
    Parameters have the same names and shapes either way.
    """

    name: str
    graph: str = "caffe"
    stride_on: str = "1x1"
    in_channels: int = 3
    num_classes: int = 400
    dropout: float = 0.5

    def __post_init__(self) -> None:
        if self.graph not in GRAPHS:
            raise ValueError(f"graph must be one of {', '.join(GRAPHS)}, not {self.graph!r}")
        if self.stride_on not in STRIDES_ON:
            raise ValueError(f"stride_on must be one of {', '.join(STRIDES_ON)}, not {self.stride_on!r}")
        if self.in_channels < 1:
            raise ValueError(f"a network needs at least one channel, not {self.in_channels = }")
        if not 1 <= self.num_classes <= 1_000_000:
            raise ValueError(f"a network takes 1 to a million classes, not {self.num_classes = }")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")

    @property
    @abstractmethod
    def layers(self) -> int:
        """Depth as the papers count it: convolutions and fully connected layers on the longest path, no projections."""

    @abstractmethod
    def build(self) -> Network:
        """A new network in training mode with torch's default initialisation."""


class Network(nn.Module, ABC):
    """The network of a config. `features` returns the features, `forward` adds the classifier (no softmax)."""

    takes: ClassVar[Takes]
    feature_dim: int  # D
    stem: ClassVar[str]  # name of the first convolution, whose input is what the recipe produces
    stem_norm: ClassVar[str] = ""  # name of the normalisation after it, if any
    block_norm: ClassVar[str] = ""  # last part of the name of each residual block's last normalisation, if any
    classifier: ClassVar[str] = "fc"  # name of the last layer, which has one row per class

    precisions: ClassVar[tuple[str, ...]] = ("fp32",)  # others only if the features were measured in them

    config: NetworkConfig

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """One row per clip, (B, D). Raises ValueError for clips that the network does not accept."""

    @abstractmethod
    def classify(self, features_BD: Tensor) -> Tensor:
        """Class scores of feature rows before the softmax, (B, K)."""

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        """Class scores of clips before the softmax, (B, K); same input and errors as `features`."""
        return self.classify(self.features(clips_BCTHW))

    def check(self, clips_BCTHW: Tensor) -> None:
        """Raise ValueError, with the sizes, for clips that this network does not accept."""
        if clips_BCTHW.ndim != 5:
            raise ValueError(f"clips must be (B, C, T, H, W), not {tuple(clips_BCTHW.shape)}")
        _, c, t, h, w = clips_BCTHW.shape
        if c != self.config.in_channels:
            raise ValueError(f"{self.config.name} takes {self.config.in_channels} channels, not {c = }")
        if not self.takes.fits(t, h, w):
            raise ValueError(f"{self.config.name} takes {self.takes}, not {t = }, {h = }, {w = }")


class TemporalPool(nn.Module):
    """The maximum of each two frames, a max pooling of 2x1x1: (B, C, T, H, W) -> (B, C, T/2, H, W); T is even.

    torch's own pooling also computes the index of each maximum and takes two to four times as long on a CPU
    (docs/explanation/performance.md).
    """

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        even, odd = x_BCTHW.unfold(2, 2, 2).unbind(-1)  # views
        return torch.maximum(even, odd)
