"""Kernels per batch and bytes per clip of the Encoder on a GPU, counted without one, on tensors without data.

    python -m bench.kernels                  P3D-63 and P3D-199 in bf16, batches of 32, in every form for CUDA

The Encoder's own code runs from the frames on the device to the rows, with scores. torch computes shapes, devices and
memory layouts as it would on CUDA. Each operation that is not a view counts as one kernel that reads its inputs and
writes its output once. A convolution with a bias counts as two, since torch adds the bias separately on CUDA.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import p3d.encoder
from bench.rounds import Report, Table, parser_of
from p3d.encoder import Encoder
from p3d.weights import random_weights
from p3d.weights.record import Weights

CUDA = torch.device("cuda:0")
FORMS = ("plain", "planar")
COPIES = frozenset(("clone", "copy_", "_to_copy", "contiguous"))
CREATE = frozenset(("empty", "arange", "new_empty", "empty_strided", "empty_like"))  # not of the batch's data


@dataclass
class Kernels(TorchDispatchMode):
    """What was called: (name, dimensions of its first input), its bytes, and the devices of its outputs."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    copies: list[tuple[str, torch.dtype, torch.dtype]] = field(default_factory=list)  # from a type to another one
    devices: set[str] = field(default_factory=set)
    n_bytes: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            out = _as_cudnn_would(out, *args[:2])
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = [one for one in tree_leaves(out) if isinstance(one, Tensor)]
        self.devices |= {str(one.device) for one in made}
        if name in CREATE or func.namespace == "prim" or (func.is_view and name not in COPIES) or not given:
            return out
        self.calls.append((name, given[0].ndim))
        if name in COPIES:
            self.copies.append((name, given[0].dtype, made[0].dtype))
        self.n_bytes += sum(map(_bytes, [*given, *made]))
        if name == "convolution" and args[2] is not None:  # read and written again for the bias
            self.calls.append(("bias", given[0].ndim))
            self.n_bytes += 2 * _bytes(made[0])
        return out


def _as_cudnn_would(out: Tensor, *given: Tensor) -> Tensor:
    """The output in the layout of cuDNN: channels last if one of the inputs is. Without CUDA, torch assumes another."""
    layout = torch.channels_last if out.ndim == 4 else torch.channels_last_3d
    if not any(one.is_contiguous(memory_format=layout) for one in given):
        return out
    strides = torch.empty(out.shape, device="meta").to(memory_format=layout).stride()
    return torch.empty_strided(out.shape, strides, dtype=out.dtype, device=out.device)


def _bytes(one: Tensor) -> int:
    return one.numel() * one.element_size()


def count(weights: Weights, form: str, precision: str, batch: int, layers: tuple[str, ...]) -> Kernels:
    """The kernels of one batch of the Encoder on CUDA."""
    encoder = Encoder(weights, device="cpu", batch_size=batch, precision="fp32", form="plain")
    network, encoder._as_read = p3d.encoder.prepared(weights, precision, form)
    encoder.precision = precision
    recipe = weights.recipe
    mode = FakeTensorMode()
    encoder._network = _on_cuda(network, mode)
    with mode, torch.no_grad(), _lines_on_cuda():
        frames_NHWC = torch.empty(
            batch * recipe.n_frames, *recipe.crop_hw, recipe.channels, dtype=torch.uint8, device=CUDA
        )
        index_BT = torch.empty(batch, recipe.n_frames, dtype=torch.int64, device=CUDA)
        with Kernels() as found:
            encoder._run(frames_NHWC, index_BT, 0, batch, layers)
    return found


def _on_cuda(network: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """The network with parameters without data, of the same layouts."""
    network = copy.deepcopy(network)
    for module in network.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None:
                    values[name] = _fake(value.detach(), mode)
    return network


def _fake(value: Tensor, mode: FakeTensorMode) -> FakeTensor:
    meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(mode, meta, CUDA)


@contextmanager
def _lines_on_cuda() -> Iterator[None]:
    """Means and deviations are copied to the device once; here they are there already."""

    def line(values: tuple[float, ...], width: int, device: torch.device) -> Tensor:
        return torch.empty(len(values) * width, device=device)

    with mock.patch.object(p3d.encoder, "_line", line):
        yield


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--networks", nargs="+", default=["p3d63", "p3d199"])
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    report = Report("kernels", "Kernels and bytes of a batch on CUDA, counted")
    rows = []
    for name in given.networks:
        weights = random_weights(name, 0)
        for form in FORMS:
            found = count(weights, form, given.precision, given.batch, ("pool5",))
            in_3d = sum(call == ("convolution", 5) for call in found.calls)
            megabytes = found.n_bytes / given.batch / 1e6
            rows.append((name, form, str(len(found.calls)), str(in_3d), str(len(found.copies)), f"{megabytes:.0f}"))
    columns = ("network", "form", "kernels per batch", "3-D convolutions", "copies", "MB per clip")
    report.add(Table(f"{given.precision}, {given.batch} clips per batch", columns, tuple(rows)))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
