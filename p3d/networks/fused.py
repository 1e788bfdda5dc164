"""Fused convolution, addition and ReLU, and packed versions of them for CPUs.

    blocks.py, resnet.py --conv_relu, conv_add_relu--> norm(conv(x)), an addition, a ReLU
    folded network --pack--> the same network, each convolution a PackedConv, which does all of it in one kernel,
                             and each pooling of 16-bit numbers a PackedPool

After a plain convolution, the normalisation, the addition and the ReLU are separate passes over memory. A packed
convolution calls oneDNN as torch's own compiler does. Its weights are reordered into the kernel's layout once, and sum
and ReLU happen while the numbers are in registers. Through torch's usual interface, weights are reordered in each call.
With one clip or one thread, many convolutions then do not use oneDNN but a loop that is several times slower.
docs/explanation/performance.md has the figures.

Convolutions are packed on CPUs where oneDNN uses its own kernels. That is everywhere except ARM, where torch uses
another library, which cannot fuse the addition. Shapes: B clips, C channels, T frames, H height, W width.
"""

from __future__ import annotations

import ctypes
import sys
from abc import ABC, abstractmethod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d.networks.network import TemporalPool

M_TRIM_THRESHOLD: Final = -1  # glibc's malloc.h
M_MMAP_THRESHOLD: Final = -3


def conv_relu(conv: nn.Module, norm: nn.Module, x_BCTHW: Tensor) -> Tensor:
    """r(norm(conv(x))), r = ReLU."""
    if isinstance(conv, FusedConv):
        return conv.relu(x_BCTHW)
    return F.relu(norm(conv(x_BCTHW)), inplace=True)


def conv_add_relu(conv: nn.Module, norm: nn.Module, x_BCTHW: Tensor, addend_BCTHW: Tensor) -> Tensor:
    """r(norm(conv(x)) + addend). A FusedConv may overwrite the addend, unless it is x itself."""
    if isinstance(conv, FusedConv):
        return conv.add_relu(x_BCTHW, addend_BCTHW)
    return F.relu(norm(conv(x_BCTHW)) + addend_BCTHW, inplace=True)


class FusedConv(nn.Module, ABC):
    """A convolution of a folded network that also does what follows it; input and output are channels last."""

    @abstractmethod
    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """conv(x)."""

    @abstractmethod
    def relu(self, x_BCTHW: Tensor) -> Tensor:
        """r(conv(x))."""

    @abstractmethod
    def add_relu(self, x_BCTHW: Tensor, addend_BCTHW: Tensor) -> Tensor:
        """r(conv(x) + addend). May overwrite the addend, unless it is x."""


class PackedConv(FusedConv):
    """A convolution for CPU inference whose weights are in a layout chosen by oneDNN.

    The layout depends on the input shape, so the weights are packed at the first call. Other shapes give the same
    numbers but are slower. Raises ValueError for unsupported padding.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d) -> None:
        super().__init__()
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"cannot pack a convolution with {conv.padding_mode = }, {conv.padding = }")
        self.weight: Tensor | None = conv.weight.detach()  # until it is packed
        self.packed: Tensor | None = None
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.how = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self._run(x_BCTHW, "none")

    def relu(self, x_BCTHW: Tensor) -> Tensor:
        return self._run(x_BCTHW, "relu")

    def add_relu(self, x_BCTHW: Tensor, addend_BCTHW: Tensor) -> Tensor:
        ops = torch.ops.mkldnn
        ending: tuple[Any, ...] = (self._packed(x_BCTHW), self.bias, *self.how, "add", 1.0, "relu", [], "")
        if addend_BCTHW is x_BCTHW:
            out_BCTHW: Tensor = ops._convolution_pointwise.binary(x_BCTHW, addend_BCTHW, *ending)
        else:
            out_BCTHW = ops._convolution_pointwise_.binary(addend_BCTHW, x_BCTHW, *ending)
        return out_BCTHW

    def _run(self, x_BCTHW: Tensor, after: str) -> Tensor:
        packed = self._packed(x_BCTHW)
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(x_BCTHW, packed, self.bias, *self.how, after, [], "")
        return out

    def _packed(self, x_BCTHW: Tensor) -> Any:
        weight = self.weight  # read once: another thread may pack it meanwhile, with the same result
        if weight is not None:
            ops: Any = torch._C._nn  # its type stubs lack the last argument
            reorder = ops.mkldnn_reorder_conv3d_weight if x_BCTHW.ndim == 5 else ops.mkldnn_reorder_conv2d_weight
            self.packed = reorder(weight.to_mkldnn(), *self.how, x_BCTHW.shape)
            self.weight = None  # only after `packed` is set
        return self.packed


class PackedPool(nn.Module):
    """16-bit max pooling of 2x1x1, or of 2x3x3 with stride 2, for the output of a packed ReLU.

    That output is not negative and holds no NaN, because oneDNN's ReLU turns NaN into zero. Such numbers are ordered
    like their bits (IEEE 754), so integers are compared, two to three times as fast as bfloat16.
    Raises ValueError for other poolings.
    """

    def __init__(self, pool: nn.MaxPool3d | TemporalPool) -> None:
        super().__init__()
        self.plain = pool  # for odd sizes
        self.in_space = isinstance(pool, nn.MaxPool3d)
        if isinstance(pool, nn.MaxPool3d):
            rounded = (0, True), ((0, 1, 1), False)
            if (pool.kernel_size, pool.stride) != ((2, 3, 3), 2) or (pool.padding, pool.ceil_mode) not in rounded:
                raise ValueError(f"cannot pack {pool}")
            self.padded = pool.padding != 0

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if x_BCTHW.element_size() != 2 or any(size % 2 for size in x_BCTHW.shape[2:]):
            out: Tensor = self.plain(x_BCTHW)
            return out
        bits_BTHWC = x_BCTHW.permute(0, 2, 3, 4, 1).view(torch.int16)
        if not self.in_space:
            out_BTHWC = torch.maximum(bits_BTHWC[:, 0::2], bits_BTHWC[:, 1::2])
        else:
            b, t, h, w, c = bits_BTHWC.shape
            out_BTHWC = bits_BTHWC.new_empty(b, t // 2, h // 2, w // 2, c)
            for clip_THWC, out_THWC in zip(bits_BTHWC, out_BTHWC, strict=True):
                for number, out_HWC in enumerate(out_THWC):  # frame by frame, which fits into a core's cache
                    larger_HWC = torch.maximum(clip_THWC[2 * number], clip_THWC[2 * number + 1])
                    self._halve(self._halve(larger_HWC, 0), 1, out_HWC)
        return out_BTHWC.view(x_BCTHW.dtype).permute(0, 4, 1, 2, 3)

    def _halve(self, x_HWC: Tensor, dim: int, out_HWC: Tensor | None = None) -> Tensor:
        """The maximum of each three neighbours in `dim`, with stride 2, starting at the first value or the padding."""
        even, odd = (x_HWC[::2], x_HWC[1::2]) if dim == 0 else (x_HWC[:, ::2], x_HWC[:, 1::2])
        out_HWC = torch.maximum(even, odd, out=out_HWC)
        count = even.shape[dim] - 1
        third, of = (odd.narrow(dim, 0, count), 1) if self.padded else (even.narrow(dim, 1, count), 0)
        reached = out_HWC.narrow(dim, of, count)
        torch.maximum(reached, third, out=reached)
        return out_HWC


def can_pack(device: torch.device) -> bool:
    """Whether packed convolutions run on this device."""
    onednn: Any = torch.backends.mkldnn  # untyped
    return device.type == "cpu" and onednn.is_available() and not torch.ops.mkldnn._is_mkldnn_acl_supported()


def pack(network: nn.Module) -> None:
    """Replace every convolution of a folded network by a PackedConv. Raises ValueError if it is not folded.

    In P3D and the 3x3x3 networks, whose poolings follow a ReLU, also replace each pooling by a PackedPool.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                raise ValueError(f"{name} of {type(module).__name__} must be folded before its convolution is packed")
            if isinstance(child, nn.Conv2d | nn.Conv3d):
                setattr(module, name, PackedConv(child))
            if isinstance(child, TemporalPool) or (isinstance(child, nn.MaxPool3d) and child.kernel_size == (2, 3, 3)):
                setattr(module, name, PackedPool(child))


def keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 1 GiB of freed memory instead of returning it to the system each time.

    A layer's output is tens of megabytes, and new memory from the system is zeroed page by page: thousands of page
    faults per encode. Other C libraries have no such option, and this function then has no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
        mallopt(M_MMAP_THRESHOLD, 1 << 30) or mallopt(M_MMAP_THRESHOLD, 32 << 20)  # limit of older versions
