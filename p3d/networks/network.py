"""What every network of the zoo has in common, so that weights, encoder and jobs know no particular one.

    NetworkConfig --build--> Network:  clips_BCTHW --features--> features_BD --classify--> logits_BK

A network also says which clips it takes, and where its first convolution and last normalisations are, which is all that
drawing random weights must know of its inside.

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
    """Which clips fit: those of this very size if `exact`, else any multiple of `frames` and any side from `side`."""

    frames: int
    side: int
    exact: bool = False

    def fits(self, frames: int, height: int, width: int) -> bool:
        """Whether a clip of T frames of (height, width) pixels can be computed."""
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
    """What must be known to build a network: everything but its weights. Raises ValueError.

    `graph` is "caffe" for the network as it was trained in Caffe, where poolings round up, and "port" for what public
    PyTorch code makes of it, where they pad or round down. `stride_on` says which convolution of a bottleneck halves
    the image. Parameters have the same names and shapes either way.
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
        """Depth as the papers count it: convolutions and fully connected layers on the longest way, no projections."""

    @abstractmethod
    def build(self) -> Network:
        """A new network in training mode with torch's default initialisation."""


class Network(nn.Module, ABC):
    """The network of a config. `features` is what is extracted, `forward` adds the classifier (no softmax)."""

    takes: ClassVar[Takes]
    feature_dim: int  # D
    stem: ClassVar[str]  # name of the first convolution, the one that sees the recipe's numbers
    stem_norm: ClassVar[str] = ""  # of the normalisation after it, if there is one
    block_norm: ClassVar[str] = ""  # last part of the name of each residual block's last normalisation, if any
    classifier: ClassVar[str] = "fc"  # the last layer, which has a row a class

    precisions: ClassVar[tuple[str, ...]] = ("fp32",)  # others only where their features were measured

    config: NetworkConfig

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """One row a clip, (B, D). Raises ValueError for clips that the network does not take."""

    @abstractmethod
    def classify(self, features_BD: Tensor) -> Tensor:
        """Class scores of feature rows before the softmax, (B, K)."""

    def forward(self, clips_BCTHW: Tensor) -> Tensor:
        """Class scores of clips before the softmax, (B, K); takes and raises what `features` does."""
        return self.classify(self.features(clips_BCTHW))

    def check(self, clips_BCTHW: Tensor) -> None:
        """ValueError, with the sizes, for clips that this network does not take."""
        if clips_BCTHW.ndim != 5:
            raise ValueError(f"clips must be (B, C, T, H, W), not {tuple(clips_BCTHW.shape)}")
        _, c, t, h, w = clips_BCTHW.shape
        if c != self.config.in_channels:
            raise ValueError(f"{self.config.name} takes {self.config.in_channels} channels, not {c = }")
        if not self.takes.fits(t, h, w):
            raise ValueError(f"{self.config.name} takes {self.takes}, not {t = }, {h = }, {w = }")


class TemporalPool(nn.Module):
    """The larger of each two frames, a max pooling of 2x1x1: (B, C, T, H, W) -> (B, C, T/2, H, W); T is even.

    torch's own pooling also finds out where each maximum was, and takes two to four times as long on a CPU
    (docs/performance.md).
    """

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return torch.maximum(x_BCTHW[:, :, 0::2], x_BCTHW[:, :, 1::2])
