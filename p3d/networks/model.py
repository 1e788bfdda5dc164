"""P3D ResNet: clips_BCTHW -> features_BD (pool5) -> logits_BK.

    layer (16x160x160 input)     C x T x H x W
    conv1, bn1                   64 x 16 x 80 x 80
    pool1                        64 x 8 x 40 x 40
    layer1 (res2), temporal pool 256 x 8 x 40 x 40, 256 x 4 x 40 x 40
    layer2 (res3), temporal pool 512 x 4 x 20 x 20, 512 x 2 x 20 x 20
    layer3 (res4), temporal pool 1024 x 2 x 10 x 10, 1024 x 1 x 10 x 10
    layer4 (res5), 2-D           2048 x 5 x 5
    global average               2048

Four poolings halve time, so 16 frames become one time step; 32 become two, whose res5 features are averaged. The block
kinds of res2..res4 cycle through A, B, C with one counter that is not reset between stages.
Parameter names and shapes are those of the public PyTorch checkpoints.

Source: the paper, section 3.3; deploy prototxt of the authors' release for the graph "caffe"; see `blocks.py` for what
"port" changes. Here it changes only pool1: "caffe" has no padding and rounds up, "port" pads one pixel and rounds down.

Shapes: B clips, C channels, T frames, H height, W width, N = B x remaining time steps, D = 2048, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import Final

import torch
from torch import Tensor, nn

from p3d.networks.blocks import EXPANSION, KINDS, BlockC, Bottleneck2D
from p3d.networks.fused import conv_relu
from p3d.networks.network import Network, NetworkConfig, Takes, TemporalPool

FEATURE_DIM: Final = 2048
WIDTHS: Final = (64, 128, 256, 512)
MIN_SIDE: Final = 64
FRAMES_PER_STEP: Final = 16  # four temporal halvings


@dataclass(frozen=True, slots=True, kw_only=True)
class P3DConfig(NetworkConfig):
    """The architecture of a P3D: everything but its weights.

    `blocks` counts the blocks of res2..res5; `kinds` is repeated over those of res2..res4 ("ABC" is the paper's mix,
    "A" its single-kind variant). `width` is the number of channels of conv1 and of res2's middle convolutions: 64 in
    every published network, less in small test networks. Raises ValueError for invalid values.
    """

    blocks: tuple[int, int, int, int]
    kinds: str = "ABC"
    width: int = WIDTHS[0]

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)  # super() refers to the class as it was before dataclass added __slots__
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"a P3D has four stages of at least one block, not {self.blocks = }")
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"block kinds must consist of the letters A, B and C, not {self.kinds!r}")
        if self.width < 1:
            raise ValueError(f"a P3D needs a width of at least one channel, not {self.width = }")

    def stage_kinds(self) -> tuple[str, str, str]:
        """The kinds of the blocks of res2, res3 and res4: ("ABC", "ABCA", "BCABCA") in P3D-63."""
        letters = cycle(self.kinds)  # one cycle through all three stages
        first, second, third = ("".join(islice(letters, n)) for n in self.blocks[:3])
        return first, second, third

    def last_block(self, stage: int) -> str:
        """The last block of stage 2..5 as Caffe's ResNets name it: res4f in P3D-63, res4b22 in -131, res4b35 in -199.

        Blocks are a, b, c ..., or a, b1, b2 ... in a stage of more than six; res5 always ends in res5c.
        """
        count = self.blocks[stage - 2]
        return f"res{stage}{'abcdef'[count - 1]}" if count <= 6 else f"res{stage}b{count - 1}"

    @property
    def layers(self) -> int:
        """Depth as the paper counts it: conv1, 4 convolutions per P3D block, 3 per 2-D block, fc; no projections."""
        return 1 + 4 * sum(self.blocks[:3]) + 3 * self.blocks[3] + 1

    def build(self) -> P3D:
        return P3D(self)


@dataclass(frozen=True, slots=True, eq=False)
class Activations:
    """Intermediate results of the network: float32, for B clips of T frames of H x W pixels.

    `res4_BCTHW` is the last block of res4 before its temporal pool, (B, 1024, T/8, H/16, W/16). `res5_BCHW` is res5,
    (B, 2048, H/32, W/32), and `pool5_BD` its global average, (B, 2048). Both are averaged over the remaining time steps
    (one if T is 16). At 16x160x160: 1024 x 2 x 10 x 10, 2048 x 5 x 5, 2048.
    """

    res4_BCTHW: Tensor
    res5_BCHW: Tensor
    pool5_BD: Tensor


class P3D(Network):
    """The P3D network. `features` returns the extracted features, `forward` adds the classifier (no softmax).

    A new P3D has torch's default initialisation, which is useful only for training. Load weights with `p3d.weights`.
    """

    takes = Takes(frames=FRAMES_PER_STEP, side=MIN_SIDE)
    stem = "conv1_custom"
    stem_norm = "bn1"
    block_norm = "bn4"
    precisions = ("fp32", "tf32", "bf16", "fp16")

    config: P3DConfig

    def __init__(self, config: P3DConfig) -> None:
        super().__init__(config)
        self.feature_dim = FEATURE_DIM * config.width // WIDTHS[0]
        caffe = config.graph == "caffe"
        self.conv1_custom = nn.Conv3d(
            config.in_channels, config.width, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False
        )
        self.bn1 = nn.BatchNorm3d(config.width)
        self.pool1 = nn.MaxPool3d((2, 3, 3), 2, padding=0 if caffe else (0, 1, 1), ceil_mode=caffe)
        first, second, third = config.stage_kinds()
        self.layer1 = self._stage(0, first)
        self.layer2 = self._stage(1, second)
        self.layer3 = self._stage(2, third)
        self.layer4 = self._stage(3, "2" * config.blocks[3])
        self.temporal_pool = TemporalPool()
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(self.feature_dim, config.num_classes)

    def _stage(self, stage: int, kinds: str) -> nn.Sequential:
        """One block per letter ("2" is 2-D); the first projects its shortcut and, except in res2, halves the size."""
        graph, stride_on, stem = self.config.graph, self.config.stride_on, self.config.width
        width = WIDTHS[stage] * stem // WIDTHS[0]
        blocks: list[nn.Module] = []
        for i, kind in enumerate(kinds):
            project = i == 0
            channels = EXPANSION * width if i else (EXPANSION * width // 2 if stage else stem)
            stride = 2 if project and stage else 1
            if kind == "2":
                blocks.append(Bottleneck2D(channels, width, stride=stride, project=project, stride_on=stride_on))
            else:
                block = KINDS[kind]
                blocks.append(block(channels, width, stride=stride, project=project, graph=graph, stride_on=stride_on))
        return nn.Sequential(*blocks)

    def features(self, clips_BCTHW: Tensor) -> Tensor:
        """The global average after res5 ("pool5"), float32, (B, 2048).

        Takes any T that is a multiple of 16 and any H, W of at least 64 pixels; raises ValueError otherwise.
        """
        _, res5_BTCHW = self._maps(clips_BCTHW)
        return _pool5(res5_BTCHW)

    def activations(self, clips_BCTHW: Tensor) -> Activations:
        """The features and the layers before them; same input and errors as `features`.

        Convolutions run in the precision of their weights, averages in float32.
        """
        res4_BCTHW, res5_BTCHW = self._maps(clips_BCTHW)
        return Activations(res4_BCTHW.float(), res5_BTCHW.mean(dim=1), _pool5(res5_BTCHW))

    def _maps(self, clips_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """The last block of res4 in its own precision, and res5 in float32, (B, T/16, 2048, H/32, W/32)."""
        self.check(clips_BCTHW)
        x = conv_relu(self.conv1_custom, self.bn1, clips_BCTHW)  # B 64 T H/2 W/2
        x = self.pool1(x)  # B 64 T/2 H/4 W/4
        x = self.temporal_pool(self.layer1(x))  # B 256 T/4 H/4 W/4
        x = self.temporal_pool(self.layer2(x))  # B 512 T/8 H/8 W/8
        res4_BCTHW = self.layer3(x)  # B 1024 T/8 H/16 W/16
        x = self.temporal_pool(res4_BCTHW)  # B 1024 T/16 H/16 W/16
        clips, _, steps = x.shape[:3]
        x = x.permute(0, 2, 1, 3, 4).flatten(0, 1)  # N 1024 H/16 W/16: time merged into the batch
        x = self.layer4(x).float()  # N 2048 H/32 W/32
        return res4_BCTHW, x.unflatten(0, (clips, steps))

    def classify(self, features_BD: Tensor) -> Tensor:
        logits_BK: Tensor = self.fc(self.dropout(features_BD))
        return logits_BK


def _pool5(res5_BTCHW: Tensor) -> Tensor:
    """The mean of all pixels of each time step, then of the steps, (B, 2048)."""
    features_ND = res5_BTCHW.flatten(0, 1).mean(dim=(2, 3))
    return features_ND.view(*res5_BTCHW.shape[:2], -1).mean(dim=1)


def fold(network: nn.Module) -> None:
    """Fold every batch normalisation into the convolution before it, in place; the network must be in eval mode.

    The factor 0.5 of block C is folded into the convolution after it, which changes no bit. In all our networks a
    convolution and its normalisation are adjacent children of their module. The arithmetic is in float64 and rounded
    once, so features change by rounding only (about 1e-6 relative). Raises ValueError if a normalisation does not
    follow a convolution or is in training mode.
    """
    for module in list(network.modules()):
        children = list(module.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if not isinstance(norm, nn.BatchNorm2d | nn.BatchNorm3d):
                continue
            if not isinstance(conv, nn.Conv2d | nn.Conv3d) or norm.training:
                raise ValueError(
                    f"cannot fold {name} of {type(module).__name__}: {type(conv).__name__}, {norm.training = }"
                )
            mean, var = norm.running_mean, norm.running_var
            assert mean is not None and var is not None, "our normalisations track their statistics"
            scale_C = norm.weight.detach().double() / torch.sqrt(var.double() + norm.eps)
            weight = conv.weight.detach().double() * scale_C.reshape(-1, *[1] * (conv.weight.ndim - 1))
            bias_C = norm.bias.detach().double() - mean.double() * scale_C
            if conv.bias is not None:
                bias_C = bias_C + conv.bias.detach().double() * scale_C
            conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
            conv.bias = nn.Parameter(bias_C.to(conv.weight.dtype), requires_grad=False)
            setattr(module, name, nn.Identity())
        if isinstance(module, BlockC):
            module.fold_half()
