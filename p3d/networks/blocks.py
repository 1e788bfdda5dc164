"""The residual bottlenecks of P3D: A, B and C split a 3x3x3 convolution into space (S) and time (T); 2D has no time.

Every block is  out = r(BN(conv4(m)) + shortcut(x)),  m = middle(y),  y = r(BN(conv1(x))),  r = ReLU; only the middle
differs. With s = BN(S(y)) and t = BN(T(.)):

    block   paper            graph "caffe" (what the authors trained)   graph "port" (the public PyTorch port)
    A       x + T(S(x))      m = r(t(r(s)))                             the same
    B       x + S(x) + T(x)  m = r(r(s) + t(y))                         m = r(s) + r(t(y))
    C       x + S(x) + TS(x) m = r(r(s) / 2 + t(r(s)) / 2)              m = r(s) + r(t(r(s)))
    2D      (res5)           m = r(BN(conv3x3(y)))                      the same

The two graphs share every parameter name and shape, so a checkpoint loads into both but is correct in only one.
Source: paper section 3.2 and figure 3; deploy prototxt of the authors' release (Eltwise coefficients, ReLU bottoms).

Shapes: B clips, C channels in, P channels of the middle (out = 4P), T frames, H height, W width.
"""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn

from p3d.networks.fused import conv_add_relu, conv_relu

EXPANSION: Final = 4


class Bottleneck3D(nn.Module):
    """1x1x1 reduce, a middle in space and time, 1x1x1 expand, plus shortcut: (B, C, T, H, W) -> (B, 4P, T, H/s, W/s).

    The spatial stride s is on the first 1x1x1 (`stride_on="1x1"`, as released) or on the middle ("3x3", as in
    torchvision's 2-D ResNets and weights inflated from them). Time is never strided here.
    """

    TEMPORAL_STRIDES = False  # whether T reads y directly and so needs the same spatial stride as S

    def __init__(self, channels: int, width: int, *, stride: int, project: bool, graph: str, stride_on: str) -> None:
        super().__init__()
        outer = stride if stride_on == "1x1" else 1
        inner = stride // outer
        temporal = inner if self.TEMPORAL_STRIDES else 1
        self.graph = graph
        self.conv1 = nn.Conv3d(channels, width, 1, stride=(1, outer, outer), bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, (1, 3, 3), stride=(1, inner, inner), padding=(0, 1, 1), bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, width, (3, 1, 1), stride=(1, temporal, temporal), padding=(1, 0, 0), bias=False)
        self.bn3 = nn.BatchNorm3d(width)
        self.conv4 = nn.Conv3d(width, EXPANSION * width, 1, bias=False)
        self.bn4 = nn.BatchNorm3d(EXPANSION * width)
        self.downsample = (
            nn.Sequential(
                nn.Conv3d(channels, EXPANSION * width, 1, stride=(1, stride, stride), bias=False),
                nn.BatchNorm3d(EXPANSION * width),
            )
            if project
            else nn.Identity()
        )

    def middle(self, y_BPTHW: Tensor) -> Tensor:
        raise NotImplementedError

    def spatial(self, y_BPTHW: Tensor) -> Tensor:
        """S and its ReLU, common to all kinds of block."""
        return conv_relu(self.conv2, self.bn2, y_BPTHW)

    def temporal(self, y_BPTHW: Tensor) -> Tensor:
        """T and its ReLU."""
        return conv_relu(self.conv3, self.bn3, y_BPTHW)

    def temporal_added(self, y_BPTHW: Tensor, s_BPTHW: Tensor) -> Tensor:
        """r(t + s): T, then the addition of s, then the ReLU. Its position is what distinguishes blocks and graphs."""
        return conv_add_relu(self.conv3, self.bn3, y_BPTHW, s_BPTHW)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        m_BPTHW = self.middle(conv_relu(self.conv1, self.bn1, x_BCTHW))
        return conv_add_relu(self.conv4, self.bn4, m_BPTHW, self.downsample(x_BCTHW))


class BlockA(Bottleneck3D):
    """Space, then time, in sequence."""

    def middle(self, y_BPTHW: Tensor) -> Tensor:
        return self.temporal(self.spatial(y_BPTHW))


class BlockB(Bottleneck3D):
    """Space and time in parallel."""

    TEMPORAL_STRIDES = True

    def middle(self, y_BPTHW: Tensor) -> Tensor:
        s_BPTHW = self.spatial(y_BPTHW)
        if self.graph == "caffe":
            return self.temporal_added(y_BPTHW, s_BPTHW)
        return s_BPTHW + self.temporal(y_BPTHW)


class BlockC(Bottleneck3D):
    """Space, plus a branch from its output through time."""

    half_is_folded = False

    def middle(self, y_BPTHW: Tensor) -> Tensor:
        s_BPTHW = self.spatial(y_BPTHW)
        if self.graph != "caffe":
            return s_BPTHW + self.temporal(s_BPTHW)
        sum_BPTHW = self.temporal_added(s_BPTHW, s_BPTHW)
        return sum_BPTHW if self.half_is_folded else 0.5 * sum_BPTHW  # bit-equal to r(s/2 + t/2): halving is exact

    def fold_half(self) -> None:
        """Fold the factor 0.5 into conv4, in place: the same numbers with one pass over memory less."""
        if self.graph == "caffe" and not self.half_is_folded:
            self.conv4.weight.data.mul_(0.5)
            self.half_is_folded = True


class Bottleneck2D(nn.Module):
    """The plain ResNet bottleneck of res5, which has no time axis: (B, C, H, W) -> (B, 4P, H/s, W/s).

    The public checkpoints name its middle convolution `conv_normal` and, as in the other blocks, its expansion `conv4`.
    """

    def __init__(self, channels: int, width: int, *, stride: int, project: bool, stride_on: str) -> None:
        super().__init__()
        outer = stride if stride_on == "1x1" else 1
        self.conv1 = nn.Conv2d(channels, width, 1, stride=outer, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv_normal = nn.Conv2d(width, width, 3, stride=stride // outer, padding=1, bias=False)
        self.bn_normal = nn.BatchNorm2d(width)
        self.conv4 = nn.Conv2d(width, EXPANSION * width, 1, bias=False)
        self.bn4 = nn.BatchNorm2d(EXPANSION * width)
        self.downsample = (
            nn.Sequential(
                nn.Conv2d(channels, EXPANSION * width, 1, stride=stride, bias=False),
                nn.BatchNorm2d(EXPANSION * width),
            )
            if project
            else nn.Identity()
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BPHW = conv_relu(self.conv1, self.bn1, x_BCHW)
        m_BPHW = conv_relu(self.conv_normal, self.bn_normal, y_BPHW)
        return conv_add_relu(self.conv4, self.bn4, m_BPHW, self.downsample(x_BCHW))


KINDS: Final = {"A": BlockA, "B": BlockB, "C": BlockC}
