"""P3D's 3-D convolutions as 2-D convolutions on views of the same memory, for CUDA.

    1xkxk   B clips of T frames as B*T images                 (B, C, T, H, W) -> (B*T, C, H, W)
    3x1x1   the pixels of a frame as the width of one image   (B, C, T, H, W) -> (B, C, T, H*W)

In channels-last memory, the order of the numbers is B, T, H, W, C. Both views are therefore channels-last images, and
no number is moved. Sums have the same terms as before; their order is up to the library.

cuDNN's 3-D convolutions of these shapes have given wrong results without an error (pytorch issues 163539 and 40275),
and its fastest kernels are for 2-D. Shapes: B clips, C channels, T frames, H height, W width, O output channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d.networks.fused import FusedConv


class PlanarConv(FusedConv):
    """A 1xkxk or kx1x1 convolution whose weights and inputs are views for a 2-D convolution.

    Parameters keep their numbers and lose one dimension of size 1. Raises ValueError for any other convolution.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        if not can_be_planar(conv):
            raise ValueError(f"{conv} is not 1xkxk or kx1x1 over zero padding, so it is no convolution of one plane")
        of_time, _, _ = conv.kernel_size
        self.over_time = of_time > 1
        weight = conv.weight.detach()
        weight = weight.squeeze(4) if self.over_time else weight.squeeze(2)
        self.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)
        time, *space = zip(conv.stride, conv.padding, conv.dilation, strict=True)
        plane = (time, (1, 0, 1)) if self.over_time else space
        self.stride, self.padding, self.dilation = zip(*plane, strict=True)
        self.step = conv.stride[1] if self.over_time else 1  # in height and width, of a convolution over time
        self.groups = conv.groups

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.folded(self.run(self.plane(x_BCTHW)), x_BCTHW)

    def relu(self, x_BCTHW: Tensor) -> Tensor:
        return self.forward(x_BCTHW).relu_()

    def add_relu(self, x_BCTHW: Tensor, addend_BCTHW: Tensor) -> Tensor:
        return self.forward(x_BCTHW).add_(addend_BCTHW).relu_()

    def run(self, x_NCHW: Tensor) -> Tensor:
        """The 2-D convolution of a plane."""
        return F.conv2d(x_NCHW, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def plane(self, x_BCTHW: Tensor) -> Tensor:
        """The view that the 2-D convolution takes. It is a copy only for a stride in space after a kernel over time."""
        if not self.over_time:
            return x_BCTHW.transpose(1, 2).flatten(0, 1)
        if self.step > 1:
            x_BCTHW = x_BCTHW[..., :: self.step, :: self.step]
        return x_BCTHW.flatten(3)

    def folded(self, out_NCHW: Tensor, x_BCTHW: Tensor) -> Tensor:
        """The output as clips (B, O, T, H, W), for the input that it came from."""
        if not self.over_time:
            return out_NCHW.view(len(x_BCTHW), -1, *out_NCHW.shape[1:]).transpose(1, 2)
        height = -(-x_BCTHW.shape[3] // self.step)
        return out_NCHW.view(*out_NCHW.shape[:3], height, -1)


def can_be_planar(conv: nn.Conv3d) -> bool:
    """Whether a convolution is 1xkxk with stride 1 in time, or kx1x1, with zero padding."""
    (t, h, w), (step, *steps) = conv.kernel_size, conv.stride
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if t == 1:
        return step == 1 and conv.padding[0] == 0
    return h == w == 1 and steps[0] == steps[1] and conv.padding[1:] == (0, 0)


def planar(network: nn.Module) -> None:
    """Replace every convolution of a folded network that can be planar, in place; others stay 3-D.

    Raises ValueError if the network is not folded.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm3d):
                raise ValueError(f"{name} of {type(module).__name__} must be folded before its convolution is planar")
            if isinstance(child, nn.Conv3d) and can_be_planar(child):
                setattr(module, name, PlanarConv(child))
