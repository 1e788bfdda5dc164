"""2-D convolutions on views: the numbers of the 3-D network, and no copy or 3-D convolution on CUDA."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from bench.kernels import count
from p3d import zoo
from p3d.encoder import Encoder, GoldenMismatch, check_golden, golden_features
from p3d.networks.model import P3DConfig
from p3d.networks.planar import PlanarConv, can_be_planar, planar
from p3d.weights import Weights, random_weights
from tests.p3d.test_encoder import every, seeded, video
from tests.p3d.test_fused import clips, folded


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((1, 7, 7), (1, 2, 2), (0, 3, 3), 1),
        ((1, 3, 3), 1, (0, 1, 1), (1, 2, 2)),
        ((1, 1, 1), (1, 2, 2), 0, 1),
        ((3, 1, 1), 1, (1, 0, 0), 1),
        ((3, 1, 1), (2, 1, 1), (1, 0, 0), 1),
        ((3, 1, 1), (1, 2, 2), (1, 0, 0), 1),
        ((5, 1, 1), 1, (2, 0, 0), 1),
    ],
)
@torch.inference_mode()
def test_each_convolution_gives_the_same_numbers(kernel, stride, padding, dilation) -> None:
    """Alone, with ReLU, and with an addend, whose values are used whatever memory it is in; odd sizes too."""
    conv = nn.Conv3d(6, 4, kernel, stride, padding, dilation)
    twin = PlanarConv(conv)
    x = torch.randn(2, 6, 4, 9, 7).contiguous(memory_format=torch.channels_last_3d)
    expected = conv(x)
    addend = torch.randn_like(expected)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(twin(x), expected, **close)
    torch.testing.assert_close(twin.relu(x), expected.relu(), **close)
    torch.testing.assert_close(twin.add_relu(x, addend), (expected + addend).relu(), **close)


def test_other_convolutions_stay_3d() -> None:
    """3x3x3, strides in time, and what is not padded with zeros cannot be computed in a plane."""
    for conv in (
        nn.Conv3d(2, 2, 3),
        nn.Conv3d(2, 2, (1, 3, 3), stride=2),
        nn.Conv3d(2, 2, (3, 1, 1), padding=1),
        nn.Conv3d(2, 2, (1, 3, 3), padding="same"),
        nn.Conv3d(2, 2, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect"),
    ):
        assert not can_be_planar(conv)
        with pytest.raises(ValueError, match="is not 1xkxk or kx1x1"):
            PlanarConv(conv)
    with pytest.raises(ValueError, match="bn1 of P3D must be folded"):
        planar(zoo.build("p3d63").eval())


@pytest.mark.parametrize("graph", ["caffe", "port"])
@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.parametrize("kinds", ["A", "B", "C", "ABC"])
@torch.inference_mode()
def test_a_planar_network_gives_the_plain_ones_features(kinds: str, graph: str, stride_on: str) -> None:
    """Every kind of block, in both graphs, with both strides and in uneven shapes."""
    config = P3DConfig(name="tiny", blocks=(3, 3, 3, 2), kinds=kinds, graph=graph, stride_on=stride_on, width=8)
    plain = folded(config.build())
    twin = copy.deepcopy(plain)
    planar(twin)
    assert not any(isinstance(module, nn.Conv3d) for module in twin.modules())
    for shape in ((2, 16, 64, 64), (3, 32, 72, 65)):
        expected, found = plain.features(clips(*shape)), twin.features(clips(*shape))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "name", ["p3d63-flow", "p3d131-c", "resnet50-lstm", "resnet50-3d", "deepvideo-single", "convpool"]
)
def test_networks_of_the_zoo_pass_the_golden_check(name: str) -> None:
    """The whole Encoder in the form of CUDA gives the golden features far within the limit, in all rows of a batch."""
    weights = _small(name)
    check_golden(Encoder(weights, batch_size=2, threads=2, form="planar"), golden_features(weights), 1e-11)


def _small(name: str) -> Weights:
    """Random weights, with small pictures where the network takes them."""
    weights = random_weights(name, 0)
    takes, recipe = weights.network.takes, weights.recipe
    if takes.exact:
        return weights
    small = {"resize_hw": (72, 96), "crop_hw": (64, 64), "short_side": None, "n_frames": min(recipe.n_frames, 16)}
    return dataclasses.replace(weights, recipe=dataclasses.replace(recipe, **small))


def test_a_row_depends_on_its_clip_alone() -> None:
    """In the form of CUDA too, rows and scores have the same bits alone, in any order and at any position."""
    encoder = Encoder(seeded(), batch_size=3, threads=2, form="planar")
    frames, index = video(40, encoder.recipe), every(4, 7)
    rows, probs = encoder.encode(frames, index, probs=True)
    assert len({row.tobytes() for row in rows}) == 7
    order = np.random.RandomState(1).permutation(7)
    moved_rows, moved_probs = encoder.encode(frames, index[order], probs=True)
    assert np.array_equal(moved_rows, rows[order]) and np.array_equal(moved_probs, probs[order])
    same = encoder.encode(frames, np.repeat(index[3:4], 3, axis=0))
    assert {row.tobytes() for row in same} == {rows[3].tobytes()}


@pytest.mark.parametrize(("name", "kernels", "megabytes"), [("p3d63", 231, 565), ("p3d199", 696, 831)])
def test_on_cuda_nothing_is_copied_and_no_convolution_is_3d(name: str, kernels: int, megabytes: int) -> None:
    """The Encoder's code from frames on the device to rows, in bf16, on tensors without data. All is on one device, the
    only copies change the type, and kernels per batch of 32 clips and bytes per clip do not grow."""
    weights = random_weights(name, 0)
    found = count(weights, "planar", "bf16", 32, ("pool5",))
    assert found.devices == {"cuda:0"}
    assert not [call for call in found.calls if call[0] == "convolution" and call[1] != 4]
    types = [(before, after) for _, before, after in found.copies]
    assert types == [(torch.uint8, torch.float32), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
    assert len(found.calls) <= kernels and found.n_bytes / 32 / 1e6 <= megabytes
    plain = count(weights, "plain", "bf16", 32, ("pool5",))
    assert len([call for call in plain.calls if call == ("convolution", 5)]) > 50  # so the count above can fail


def test_the_golden_check_sees_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """With inputs and weights of ten bits of mantissa, as TF32 multiplies them, fp32 is refused and tf32 is not."""
    encoder = Encoder(seeded(), batch_size=2, threads=2, form="planar")
    true = PlanarConv.run
    monkeypatch.setattr(PlanarConv, "run", lambda self, x: true(self, _tf32(x)))
    with torch.no_grad():
        for conv in encoder._network.modules():
            if isinstance(conv, PlanarConv):
                conv.weight.copy_(_tf32(conv.weight))
    with pytest.raises(GoldenMismatch, match=r"in row 1 of 2: cosine distance .*e-07 \(at most 1e-08\)"):
        check_golden(encoder, golden_features(seeded()))
    encoder.precision = "tf32"
    check_golden(encoder, golden_features(seeded()))


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 explicit bits of mantissa, ties away from zero."""
    return ((x.detach().clone().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_the_golden_check_looks_at_every_row() -> None:
    """A wrong last row of a full batch, as errors with large tensors make it, is found."""
    encoder = Encoder(seeded(), batch_size=3, threads=2)
    true = encoder._network.features

    def features(clips_BCTHW: torch.Tensor) -> torch.Tensor:
        rows_BD = true(clips_BCTHW)
        rows_BD[-1, :16] = 0
        return rows_BD

    encoder._network.features = features
    with pytest.raises(GoldenMismatch, match="in row 3 of 3"):
        check_golden(encoder, golden_features(seeded()))
