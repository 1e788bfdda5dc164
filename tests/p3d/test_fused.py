"""Packed convolutions give the plain network's numbers in every block, graph and shape, using oneDNN's kernels."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from p3d import zoo
from p3d.encoder import Encoder, golden_clip
from p3d.networks.fused import PackedConv, PackedPool, can_pack, conv_add_relu, conv_relu, pack
from p3d.networks.model import P3DConfig, fold
from p3d.networks.network import Network, TemporalPool
from p3d.weights import random_weights

HAS_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu")), reason="no oneDNN of its own on this CPU")


def folded(network: Network) -> Network:
    """The network with random statistics in its normalisations, folded."""
    torch.manual_seed(0)
    for module in network.eval().modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    fold(network)
    return network


def clips(count: int, frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, frames, height, width, generator=generator)
    return values.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("graph", ["caffe", "port"])
@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.parametrize("kinds", ["A", "B", "C", "ABC"])
@torch.inference_mode()
def test_a_packed_network_gives_the_plain_ones_features(kinds: str, graph: str, stride_on: str) -> None:
    """Every kind of block gives the same features, in both graphs, with both strides and in shapes not packed for."""
    config = P3DConfig(name="tiny", blocks=(3, 3, 3, 2), kinds=kinds, graph=graph, stride_on=stride_on, width=8)
    plain = folded(config.build())
    packed = copy.deepcopy(plain)
    pack(packed)
    for shape in ((2, 16, 64, 64), (1, 16, 64, 64), (3, 32, 72, 65)):
        given = clips(*shape)
        expected, found = plain.features(given.clone()), packed.features(given.clone())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["resnet50", "resnet50-lstm", "resnet50-3d", "convpool", "deepvideo-slow"])
@torch.inference_mode()
def test_every_other_network_can_be_packed(name: str) -> None:
    """2-D, 3x3x3 and plain convolutions with biases give the same features when packed."""
    torch.manual_seed(0)
    plain = folded(zoo.build(name))  # PyTorch's own random numbers take a tenth of the time of `random_weights`
    takes, recipe = plain.takes, zoo.recipe(name, "caffe")
    packed = copy.deepcopy(plain)
    pack(packed)
    frames, side = (recipe.n_frames, takes.side) if takes.exact else (takes.frames, takes.side)
    given = clips(1, frames, side, side)
    expected = plain.features(given)
    torch.testing.assert_close(packed.features(given), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@torch.inference_mode()
def test_what_may_be_written_over() -> None:
    """The addend is overwritten, unless it is the input itself, which the convolution must still read."""
    conv = PackedConv(nn.Conv3d(4, 4, (3, 1, 1), padding=(1, 0, 0)))
    nothing = nn.Identity()
    x, addend = clips(1, 4, 6, 6)[:, [0, 1, 2, 0]], clips(1, 4, 6, 6, seed=1)[:, [0, 1, 2, 0]]
    x, addend = (each.contiguous(memory_format=torch.channels_last_3d) for each in (x, addend))
    before, expected = x.clone(), (conv(x) + addend).relu()
    out = conv_add_relu(conv, nothing, x, addend)
    assert out.data_ptr() == addend.data_ptr()
    torch.testing.assert_close(out, expected)
    itself = conv_add_relu(conv, nothing, x, x)
    torch.testing.assert_close(itself, (conv(x) + x).relu())
    torch.testing.assert_close(conv_relu(conv, nothing, x), conv(x).relu())
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 16, 40, 40), (1, 8, 2, 2, 6), (1, 3, 4, 9, 12)])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool3d((2, 3, 3), 2, ceil_mode=True),
        nn.MaxPool3d((2, 3, 3), 2, padding=(0, 1, 1)),
        TemporalPool(),
    ],
    ids=["caffe", "port", "time"],
)
@torch.inference_mode()
def test_a_packed_pool_gives_the_plain_ones_bits(
    pool: nn.MaxPool3d | TemporalPool, shape: tuple[int, ...], kind: torch.dtype
) -> None:
    """Zeros, numbers of every magnitude and infinity, even and odd sizes, and the maximum at every position."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).relu() * torch.logspace(-8, 4, shape[-1])
    x[0, 0, 0, 0, 0] = torch.inf
    for at in range(9):
        x[0, 1, at % 2, at // 3 % shape[3], at % 3 % shape[4]] += 1e4 * at
    x = x.to(kind).contiguous(memory_format=torch.channels_last_3d)
    found = PackedPool(pool)(x)
    assert torch.equal(found, pool(x)) and found.is_contiguous(memory_format=torch.channels_last_3d)


@torch.inference_mode()
def test_a_packed_relu_gives_numbers_alone() -> None:
    """NaN of either sign becomes zero, so that a pooling may compare bits."""
    for kind in (torch.float32, torch.bfloat16) if HAS_BF16 else (torch.float32,):
        conv = PackedConv(nn.Conv3d(3, 32, 1).to(kind))
        x = clips(1, 4, 8, 8).to(kind)
        x[0, :, 0, 0, 0], x[0, :, 0, 0, 1] = torch.nan, -torch.nan
        addend = torch.zeros(1, 32, 4, 8, 8, dtype=kind).contiguous(memory_format=torch.channels_last_3d)
        for out in (conv.relu(x), conv.add_relu(x, addend)):
            assert (out >= 0).all() and not out.signbit().any()


def test_what_cannot_be_packed_is_refused() -> None:
    """An unfolded normalisation would be skipped silently, and other kinds of padding would be computed wrongly."""
    with pytest.raises(ValueError, match="bn1 of P3D must be folded"):
        pack(zoo.config("p3d63").build().eval())
    with pytest.raises(ValueError, match="padding_mode = 'reflect'"):
        PackedConv(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match=r"padding = 'same'"):
        PackedConv(nn.Conv2d(1, 1, 3, padding="same"))
    with pytest.raises(ValueError, match="cannot pack MaxPool3d"):
        PackedPool(nn.MaxPool3d((2, 3, 3), 2))
    assert not can_pack(torch.device("meta"))


@pytest.mark.parametrize("threads", [1, 2])
def test_no_convolution_falls_back(threads: int) -> None:
    """Even with one clip and one thread, all 66 convolutions of P3D-63 are packed, and every sum and ReLU is fused."""
    weights = random_weights("p3d63", 0)
    weights = dataclasses.replace(
        weights, recipe=dataclasses.replace(weights.recipe, resize_hw=(72, 96), crop_hw=(64, 64))
    )
    encoder = Encoder(weights, batch_size=1, threads=threads)
    clip = golden_clip(weights.recipe)
    encoder.encode(*clip)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        encoder.encode(*clip)
    calls = {event.key: event.count for event in seen.key_averages()}
    packed = sum(count for name, count in calls.items() if name.startswith("mkldnn::_convolution_pointwise"))
    assert packed == sum(isinstance(module, PackedConv) for module in encoder._network.modules()) == 66
    assert not [name for name in calls if "conv" in name and not name.startswith("mkldnn::")]
    assert not {"aten::relu", "aten::relu_", "aten::clamp_min_", "aten::add", "aten::add_"} & set(calls)


@pytest.mark.parametrize("looked_at", ["packed", "weight"])
def test_two_threads_may_meet_at_a_convolution_that_is_not_packed_yet(looked_at: str) -> None:
    """Inference threads share the network, so one may pack a convolution that another has just begun to check."""
    x = clips(1, 2, 4, 4)[:, :3]
    waiting = [looked_at]

    class Interrupted(PackedConv):
        def __getattribute__(self, name: str) -> object:
            value = super().__getattribute__(name)
            if name in waiting:
                waiting.clear()
                PackedConv.relu(self, x)  # the other thread, from start to end
            return value

    conv = nn.Conv3d(3, 4, 1)
    assert torch.equal(Interrupted(conv).relu(x), PackedConv(conv).relu(x)) and not waiting
