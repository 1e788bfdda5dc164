"""P3D as a user would first write it: torch's modules in their own layout, float32, every layer by itself.

The baseline of `bench/model.py`, written from the specification in the manner of the public PyTorch port, without code
of `p3d`. Its parameters have the port's names, so both compute with the same weights. Graph "port" is what that port
computes, "caffe" what the authors trained.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOCKS = {"p3d63": (3, 4, 6, 3), "p3d131": (3, 4, 23, 3), "p3d199": (3, 8, 36, 3)}


class PlainBlock(nn.Module):
    """A bottleneck of kind A, B, C, or 2 for the two-dimensional kind of the last stage."""

    def __init__(self, kind: str, graph: str, channels: int, width: int, stride: int, first: bool) -> None:
        super().__init__()
        self.kind, self.caffe = kind, graph == "caffe"
        flat = kind == "2"
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if flat else (nn.Conv3d, nn.BatchNorm3d)
        step = stride if flat else (1, stride, stride)
        self.conv1, self.bn1 = conv(channels, width, 1, stride=step, bias=False), norm(width)
        if flat:
            self.conv_normal, self.bn_normal = conv(width, width, 3, padding=1, bias=False), norm(width)
        else:
            self.conv2, self.bn2 = conv(width, width, (1, 3, 3), padding=(0, 1, 1), bias=False), norm(width)
            self.conv3, self.bn3 = conv(width, width, (3, 1, 1), padding=(1, 0, 0), bias=False), norm(width)
        self.conv4, self.bn4 = conv(width, 4 * width, 1, bias=False), norm(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(conv(channels, 4 * width, 1, stride=step, bias=False), norm(4 * width)) if first else None
        )

    def middle(self, y: Tensor) -> Tensor:
        if self.kind == "2":
            return self.relu(self.bn_normal(self.conv_normal(y)))
        s = self.relu(self.bn2(self.conv2(y)))
        t = self.bn3(self.conv3(y if self.kind == "B" else s))
        if self.kind == "A":
            return self.relu(t)
        if not self.caffe:
            return s + self.relu(t)
        return self.relu(s + t if self.kind == "B" else 0.5 * s + 0.5 * t)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.downsample(x) if self.downsample is not None else x
        out = self.bn4(self.conv4(self.middle(self.relu(self.bn1(self.conv1(x))))))
        out += shortcut
        return self.relu(out)


class PlainP3D(nn.Module):
    """Clips of 16 frames, (B, 3, 16, H, W), to features, (B, 2048)."""

    def __init__(self, name: str, graph: str) -> None:
        super().__init__()
        caffe = graph == "caffe"
        self.conv1_custom = nn.Conv3d(3, 64, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool3d((2, 3, 3), 2, padding=0 if caffe else (0, 1, 1), ceil_mode=caffe)
        self.maxpool_2 = nn.MaxPool3d((2, 1, 1), (2, 1, 1))
        channels, count = 64, 0
        for stage, blocks in enumerate(BLOCKS[name]):
            width, made = 64 << stage, []
            for i in range(blocks):
                kind = "2" if stage == 3 else "ABC"[count % 3]
                made.append(PlainBlock(kind, graph, channels, width, 2 if stage and not i else 1, not i))
                channels, count = 4 * width, count + 1
            setattr(self, f"layer{stage + 1}", nn.Sequential(*made))

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1_custom(x))))
        x = self.maxpool_2(self.layer1(x))
        x = self.maxpool_2(self.layer2(x))
        x = self.maxpool_2(self.layer3(x))
        return self.layer4(x.squeeze(2)).mean(dim=(2, 3))


def plain_of(weights: dict[str, Tensor], name: str, graph: str) -> PlainP3D:
    """The plain network with the parameters of a P3D; the classifier is left out."""
    network = PlainP3D(name, graph).eval()
    network.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
    return network


@torch.inference_mode()
def macs_of(network: nn.Module, clip_BCTHW: Tensor) -> tuple[float, float]:
    """Multiply-adds of a batch's convolutions: all, and without those on zero padding."""
    all_macs, real_macs = 0.0, 0.0

    def count(conv: nn.Conv2d | nn.Conv3d, given: tuple[Tensor, ...], out: Tensor) -> None:
        nonlocal all_macs, real_macs
        all_macs += (macs := out.numel() * conv.weight[0].numel())
        for size, to, kernel, step, pad in zip(
            given[0].shape[2:], out.shape[2:], conv.kernel_size, conv.stride, conv.padding, strict=True
        ):
            inside = sum(0 <= o * step - int(pad) + k < size for o in range(to) for k in range(kernel))
            macs *= inside / (to * kernel)
        real_macs += macs

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)]
    network(clip_BCTHW)
    for hook in hooks:
        hook.remove()
    return all_macs, real_macs
