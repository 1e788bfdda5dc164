"""The networks of the paper's Sports-1M table other than ResNets: C3D, Deep Video and convolutional pooling.

    c3d                 16 x 112 x 112    8 convolutions 3x3x3, features after fc6
    deepvideo-single     1 x 170 x 170    an AlexNet on one frame, features after fc7
    deepvideo-slow      10 x 170 x 170    the same with time in its first three convolutions ("slow fusion")
    convpool           120 x 220 x 220    GoogLeNet on every frame, maximum over the frames, two layers of 4096

None of them uses batch normalisation. Fully connected layers are computed one row at a time, because in a product of
several rows the bits may depend on a row's position in the batch. Only C3D has public weights. Details that the papers
of the others do not specify (the padding of convolutions) are chosen here and documented in the class.

Sources: Tran et al., "Learning Spatiotemporal Features with 3D Convolutional Networks", ICCV 2015, figure 3, and the
authors' prototxt; Karpathy et al., "Large-scale Video Classification with Convolutional Neural Networks", CVPR 2014,
section 3.1; Ng et al., "Beyond Short Snippets", CVPR 2015, section 3.1; Szegedy et al., "Going Deeper with
Convolutions", CVPR 2015, table 1.

Shapes: B clips, C channels, T frames, H height, W width, D features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d.networks.network import Network, NetworkConfig, Takes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain(NetworkConfig):
    """A network without bottlenecks, so `stride_on` cannot be changed. Raises ValueError."""

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() refers to the class as it was before dataclass added __slots__
        if self.stride_on != "1x1":
            raise ValueError(f"{self.name} has no bottleneck, so its stride cannot be on {self.stride_on}")


def _only_one_graph(config: NetworkConfig) -> None:
    if config.graph != "caffe":
        raise ValueError(f"{config.name} has no public port, so its graph must be caffe, not {config.graph}")


def _rows(layer: nn.Linear, x_BD: Tensor) -> Tensor:
    """A fully connected layer and its ReLU, one row at a time."""
    return torch.cat([F.relu(layer(row)) for row in torch.split(x_BD, 1)])


@dataclass(frozen=True, slots=True, kw_only=True)
class C3DConfig(_Plain):
    """Graph "caffe" rounds the last pooling up, as the authors' code does; "port" pads it, as PyTorch ports do."""

    @property
    def layers(self) -> int:
        return 8 + 3

    def build(self) -> C3D:
        return C3D(self)


class C3D(Network):
    """Eight 3x3x3 convolutions and five poolings; parameters are named as in the public PyTorch ports."""

    takes = Takes(frames=16, side=112, exact=True)
    feature_dim = 4096
    stem = "conv1"
    classifier = "fc8"

    def __init__(self, config: C3DConfig) -> None:
        super().__init__(config)

        def conv(channels: int, width: int) -> nn.Conv3d:
            return nn.Conv3d(channels, width, 3, padding=1)

        self.conv1 = conv(config.in_channels, 64)
        self.conv2 = conv(64, 128)
        self.conv3a, self.conv3b = conv(128, 256), conv(256, 256)
        self.conv4a, self.conv4b = conv(256, 512), conv(512, 512)
        self.conv5a, self.conv5b = conv(512, 512), conv(512, 512)
        caffe = config.graph == "caffe"
        self.pool5 = nn.MaxPool3d(2, padding=0 if caffe else (0, 1, 1), ceil_mode=caffe)
        self.fc6 = nn.Linear(512 * 4 * 4, self.feature_dim)
        self.fc7 = nn.Linear(self.feature_dim, 4096)
        self.fc8 = nn.Linear(4096, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """fc6 after its ReLU, (B, 4096): with Caffe's in-place ReLU this is what extraction returns."""
        self.check(clips_BCTHW)
        x = F.max_pool3d(F.relu(self.conv1(clips_BCTHW)), (1, 2, 2))  # B 64 16 56 56
        x = F.max_pool3d(F.relu(self.conv2(x)), 2)  # B 128 8 28 28
        x = F.max_pool3d(F.relu(self.conv3b(F.relu(self.conv3a(x)))), 2)  # B 256 4 14 14
        x = F.max_pool3d(F.relu(self.conv4b(F.relu(self.conv4a(x)))), 2)  # B 512 2 7 7
        x = self.pool5(F.relu(self.conv5b(F.relu(self.conv5a(x)))))  # B 512 1 4 4
        return _rows(self.fc6, x.flatten(1))

    def classify(self, features_BD: Tensor) -> Tensor:
        hidden = _rows(self.fc7, self.dropout(features_BD))
        logits_BK: Tensor = self.fc8(self.dropout(hidden))
        return logits_BK


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepVideoConfig(_Plain):
    """`slow` selects slow fusion over 10 frames instead of a single frame. Raises ValueError."""

    slow: bool = False

    def __post_init__(self) -> None:
        _Plain.__post_init__(self)
        _only_one_graph(self)

    @property
    def layers(self) -> int:
        return 5 + 3

    def build(self) -> DeepVideo:
        return SlowFusion(self) if self.slow else DeepVideo(self)


class DeepVideo(Network):
    """C(96,11,3)-N-P-C(256,5,1)-N-P-C(384,3,1)-C(384,3,1)-C(256,3,1)-P-FC(4096)-FC(4096) on one frame.

    C(channels, size, stride); N is Krizhevsky's normalisation with k 2, n 5, alpha 1e-4, beta 0.5; P is 2x2 max
    pooling. The paper does not specify padding: here the first convolution has none and the others keep the image size.
    """

    takes = Takes(frames=1, side=170, exact=True)
    feature_dim = 4096
    stem = "conv1"
    classifier = "fc8"
    TIME: tuple[tuple[int, int], ...] = ((1, 1), (1, 1), (1, 1))  # temporal (size, stride) of the first three

    def __init__(self, config: DeepVideoConfig) -> None:
        super().__init__(config)
        (t1, s1), (t2, s2), (t3, s3) = self.TIME
        self.conv1 = nn.Conv3d(config.in_channels, 96, (t1, 11, 11), stride=(s1, 3, 3))
        self.conv2 = nn.Conv3d(96, 256, (t2, 5, 5), stride=(s2, 1, 1), padding=(0, 2, 2))
        self.conv3 = nn.Conv3d(256, 384, (t3, 3, 3), stride=(s3, 1, 1), padding=(0, 1, 1))
        self.conv4 = nn.Conv3d(384, 384, (1, 3, 3), padding=(0, 1, 1))
        self.conv5 = nn.Conv3d(384, 256, (1, 3, 3), padding=(0, 1, 1))
        # torch divides alpha by n, Krizhevsky does not
        self.norm = nn.LocalResponseNorm(5, alpha=5e-4, beta=0.5, k=2.0)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, self.feature_dim)
        self.fc8 = nn.Linear(self.feature_dim, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """fc7 after its ReLU, (B, 4096)."""
        self.check(clips_BCTHW)
        half = (1, 2, 2)
        x = F.max_pool3d(self.norm(F.relu(self.conv1(clips_BCTHW))), half)  # B 96 T' 27 27; T' 1, or 4 in slow fusion
        x = F.max_pool3d(self.norm(F.relu(self.conv2(x))), half)  # B 256 T'' 13 13; T'' 1, or 2
        x = F.relu(self.conv4(F.relu(self.conv3(x))))  # B 384 1 13 13
        x = F.max_pool3d(F.relu(self.conv5(x)), half)  # B 256 1 6 6
        return _rows(self.fc7, self.dropout(_rows(self.fc6, self.dropout(x.flatten(1)))))

    def classify(self, features_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self.fc8(self.dropout(features_BD))
        return logits_BK


class SlowFusion(DeepVideo):
    """10 frames: temporal filters of 4, 2 and 2 frames, each with stride 2, leave 4, 2 and 1 time steps."""

    takes = Takes(frames=10, side=170, exact=True)
    TIME = ((4, 2), (2, 2), (2, 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvPoolConfig(_Plain):
    """Convolutional pooling over GoogLeNet. Raises ValueError."""

    def __post_init__(self) -> None:
        _Plain.__post_init__(self)
        _only_one_graph(self)

    @property
    def layers(self) -> int:
        return 21 + 3

    def build(self) -> ConvPool:
        return ConvPool(self)


class ConvPool(Network):
    """Maximum over all frames of GoogLeNet's average-pooled rows, followed by two layers of 4096."""

    takes = Takes(frames=1, side=64)
    feature_dim = 4096
    stem = "frames.conv1"

    def __init__(self, config: ConvPoolConfig) -> None:
        super().__init__(config)
        self.frames = GoogLeNet(config.in_channels)
        self.fc1 = nn.Linear(1024, 4096)
        self.fc2 = nn.Linear(4096, self.feature_dim)
        self.fc = nn.Linear(self.feature_dim, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The second layer of 4096 after its ReLU, (B, 4096); any T. One clip at a time: 120 frames fill a device."""
        self.check(clips_BCTHW)
        pooled_BD = torch.stack([self.frames(clip.transpose(0, 1)).amax(dim=0) for clip in clips_BCTHW])
        return _rows(self.fc2, self.dropout(_rows(self.fc1, self.dropout(pooled_BD))))

    def classify(self, features_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self.fc(self.dropout(features_BD))
        return logits_BK


# channels: input, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, after the pooling; "P" is a pooling that halves the image
INCEPTIONS: Final = (
    (192, 64, 96, 128, 16, 32, 32),
    (256, 128, 128, 192, 32, 96, 64),
    "P",
    (480, 192, 96, 208, 16, 48, 64),
    (512, 160, 112, 224, 24, 64, 64),
    (512, 128, 128, 256, 24, 64, 64),
    (512, 112, 144, 288, 32, 64, 64),
    (528, 256, 160, 320, 32, 128, 128),
    "P",
    (832, 256, 160, 320, 32, 128, 128),
    (832, 384, 192, 384, 48, 128, 128),
)


class Inception(nn.Module):
    """Parallel 1x1, 3x3 and 5x5 convolutions and a pooling, concatenated: (N, C, H, W) -> (N, C', H, W)."""

    def __init__(self, channels: int, one: int, before3: int, three: int, before5: int, five: int, after_pool: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, one, 1)
        self.conv3_reduce = nn.Conv2d(channels, before3, 1)
        self.conv3 = nn.Conv2d(before3, three, 3, padding=1)
        self.conv5_reduce = nn.Conv2d(channels, before5, 1)
        self.conv5 = nn.Conv2d(before5, five, 5, padding=2)
        self.pool_project = nn.Conv2d(channels, after_pool, 1)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        three = self.conv3(F.relu(self.conv3_reduce(x_NCHW)))
        five = self.conv5(F.relu(self.conv5_reduce(x_NCHW)))
        pooled = self.pool_project(F.max_pool2d(x_NCHW, 3, 1, padding=1))
        return F.relu(torch.cat([self.conv1(x_NCHW), three, five, pooled], dim=1))


class GoogLeNet(nn.Module):
    """Frames to rows: (N, C, H, W) -> (N, 1024). The auxiliary classifiers are omitted: they serve training only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3)
        self.conv2_reduce = nn.Conv2d(64, 64, 1)
        self.conv2 = nn.Conv2d(64, 192, 3, padding=1)
        self.inceptions = nn.Sequential(
            *(nn.MaxPool2d(3, 2, ceil_mode=True) if row == "P" else Inception(*map(int, row)) for row in INCEPTIONS)
        )
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        x = self.norm(F.max_pool2d(F.relu(self.conv1(x_NCHW)), 3, 2, ceil_mode=True))  # N 64 H/4 W/4
        x = self.norm(F.relu(self.conv2(F.relu(self.conv2_reduce(x)))))
        x = self.inceptions(F.max_pool2d(x, 3, 2, ceil_mode=True))  # N 1024 H/32 W/32
        rows_ND: Tensor = x.mean(dim=(2, 3))
        return rows_ND
