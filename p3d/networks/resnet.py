"""Plain residual networks: 2-D on every frame, and with the 3x3x3 convolutions that P3D splits into S and T.

    resnet50 101 152      frames --2-D network--> rows of 2048 --mean over the clip--> features_BD
                          (`lstm.py` puts an LSTM in place of the mean)
    resnet50-3d 152-3d    P3D without factorisation: one 3x3x3 in the middle of each block of res2..res4, res5 2-D;
                          the stem, the poolings and the last average are P3D's, so only the blocks differ

Parameter names and shapes of the 2-D networks are torchvision's. Graph "caffe" pools as the original release did (no
padding, rounding up) and "port" as torchvision does; `stride_on` is "1x1" in the former and "3x3" in the latter.
Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1; P3D paper, section 3.2
and table 1 for the average over the clip (the paper averages scores).

Shapes: B clips, C channels, T frames, H height, W width, N = B x frames or time steps, D = 2048 features at the
published width, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from p3d.networks.fused import conv_add_relu, conv_relu
from p3d.networks.network import Network, NetworkConfig, Takes, TemporalPool

WIDTH = 64
EXPANSION = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ResNetConfig(NetworkConfig):
    """`blocks` counts the blocks of res2..res5; `spacetime` makes those of res2..res4 3x3x3.

    `width` is the number of channels of conv1 and of res2's middle convolutions: 64 in every published network, less in
    small ones for tests and comparisons. Raises ValueError for invalid values.
    """

    blocks: tuple[int, int, int, int]
    spacetime: bool = False
    width: int = WIDTH

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() refers to the class as it was before dataclass added __slots__
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"a ResNet has four stages of at least one block, not {self.blocks = }")
        if self.width < 1:
            raise ValueError(f"a ResNet needs a width of at least one channel, not {self.width = }")

    @property
    def layers(self) -> int:
        return 2 + 3 * sum(self.blocks)

    def build(self) -> Network:
        return ResNet3D(self) if self.spacetime else ResNet(self)


class Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (or 3x3x3, if `spacetime`), 1x1 expand, plus shortcut; only space is strided, not time."""

    def __init__(self, channels: int, width: int, *, stride: int, project: bool, stride_on: str, spacetime: bool):
        super().__init__()
        outer = stride if stride_on == "1x1" else 1
        inner = stride // outer

        def conv(of: int, to: int, size: int, step: int) -> nn.Conv2d | nn.Conv3d:
            if spacetime:
                return nn.Conv3d(of, to, size, stride=(1, step, step), padding=size // 2, bias=False)
            return nn.Conv2d(of, to, size, stride=step, padding=size // 2, bias=False)

        norm = nn.BatchNorm3d if spacetime else nn.BatchNorm2d
        self.conv1 = conv(channels, width, 1, outer)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, inner)
        self.bn2 = norm(width)
        self.conv3 = conv(width, EXPANSION * width, 1, 1)
        self.bn3 = norm(EXPANSION * width)
        self.downsample = (
            nn.Sequential(conv(channels, EXPANSION * width, 1, stride), norm(EXPANSION * width))
            if project
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = conv_relu(self.conv1, self.bn1, x)
        y = conv_relu(self.conv2, self.bn2, y)
        return conv_add_relu(self.conv3, self.bn3, y, self.downsample(x))


def _stage(config: ResNetConfig, stage: int, *, spacetime: bool) -> nn.Sequential:
    """The blocks of a stage. The first projects its shortcut and, except in res2, halves the image."""
    width = config.width << stage
    before = EXPANSION * width // 2 if stage else config.width
    return nn.Sequential(
        *(
            Bottleneck(
                EXPANSION * width if i else before,
                width,
                stride=2 if stage and not i else 1,
                project=i == 0,
                stride_on=config.stride_on,
                spacetime=spacetime,
            )
            for i in range(config.blocks[stage])
        )
    )


class _Residual(Network):
    """The part common to both networks: four stages, then the global average and one linear classifier."""

    stem = "conv1"
    stem_norm = "bn1"
    block_norm = "bn3"

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        self.feature_dim = 8 * EXPANSION * config.width
        self.layer1 = _stage(config, 0, spacetime=config.spacetime)
        self.layer2 = _stage(config, 1, spacetime=config.spacetime)
        self.layer3 = _stage(config, 2, spacetime=config.spacetime)
        self.layer4 = _stage(config, 3, spacetime=False)
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(self.feature_dim, config.num_classes)

    def classify(self, features_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self.fc(self.dropout(features_BD))
        return logits_BK


class ResNet(_Residual):
    """The 2-D network on every frame; a clip's features are the mean of its frames' features."""

    takes = Takes(frames=1, side=32)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        caffe = config.graph == "caffe"
        self.conv1 = nn.Conv2d(config.in_channels, config.width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(config.width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=0 if caffe else 1, ceil_mode=caffe)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The mean of `frame_features` over the frames, (B, 2048); any T."""
        features_BD: Tensor = self.frame_features(clips_BCTHW).mean(dim=1)
        return features_BD

    def frame_features(self, clips_BCTHW: Tensor) -> Tensor:
        """The global average after res5 ("pool5") of every frame, (B, T, 2048); same input and errors as `features`."""
        self.check(clips_BCTHW)
        x = clips_BCTHW.transpose(1, 2).flatten(0, 1)  # N C H W: frames merged into the batch
        x = conv_relu(self.conv1, self.bn1, x)  # N 64 H/2 W/2
        x = self.layer1(self.maxpool(x))  # N 256 H/4 W/4
        x = self.layer4(self.layer3(self.layer2(x)))  # N 2048 H/32 W/32
        features_BTD: Tensor = x.mean(dim=(2, 3)).unflatten(0, (len(clips_BCTHW), -1))
        return features_BTD


class ResNet3D(_Residual):
    """The network that P3D factorises, with P3D's poolings: four halvings of time before the 2-D res5."""

    takes = Takes(frames=16, side=64)

    def __init__(self, config: ResNetConfig) -> None:
        super().__init__(config)
        caffe = config.graph == "caffe"
        self.conv1 = nn.Conv3d(
            config.in_channels, config.width, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(config.width)
        self.maxpool = nn.MaxPool3d((2, 3, 3), 2, padding=0 if caffe else (0, 1, 1), ceil_mode=caffe)
        self.temporal_pool = TemporalPool()

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The global average after res5, (B, 2048); T is a multiple of 16."""
        self.check(clips_BCTHW)
        x = conv_relu(self.conv1, self.bn1, clips_BCTHW)  # B 64 T H/2 W/2
        x = self.maxpool(x)  # B 64 T/2 H/4 W/4
        x = self.temporal_pool(self.layer1(x))  # B 256 T/4 H/4 W/4
        x = self.temporal_pool(self.layer2(x))  # B 512 T/8 H/8 W/8
        x = self.temporal_pool(self.layer3(x))  # B 1024 T/16 H/16 W/16
        x = self.layer4(x.transpose(1, 2).flatten(0, 1))  # N 2048 H/32 W/32
        features_ND = x.mean(dim=(2, 3))
        features_BD: Tensor = features_ND.unflatten(0, (len(clips_BCTHW), -1)).mean(dim=1)
        return features_BD
