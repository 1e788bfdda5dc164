"""The network: its graph, its keys, the sizes it accepts and its reference outputs."""

import hashlib
import zlib

import numpy as np
import pytest
import torch

from p3d import zoo
from p3d.networks.blocks import BlockA, BlockB, BlockC, Bottleneck2D
from p3d.networks.model import P3D, P3DConfig, fold

# sha256 of the sorted "key<tab>AxBxC" lines of the public checkpoints' layout (RGB, 400 classes)
KEYS_SHA256 = {
    "p3d63": "343f6f5362154101bb15905384556a8ac6961e4151b4cc024d31b1b770e8e3f8",
    "p3d131": "c21c3e1f33c9db13b282cb6381bccb4714dcdba8a47f3151b9d0edce8161ed37",
    "p3d199": "7f591c4056eeb295a5bfc07eeccd14d549aec2b9cbfdd9bdf765e6f4e042c989",
}
GOLDEN = {
    "port": {
        "features": (62.5059, 0.828608, [1.79195, 0.0851158, 2.96042, 1.73852, 0.264308, 2.36275]),
        "logits": (13.5277, [0.741574, 0.437364, -0.308414, -1.2265, 1.58936, 1.19294]),
    },
    "caffe": {
        "features": (60.0245, 0.79294, [1.73575, 0.0955374, 2.55022, 1.21838, 0.236375, 1.86982]),
        "logits": (12.9924, [0.656853, 0.442908, -0.530697, -1.14129, 1.47221, 1.17611]),
    },
}


def golden_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The weights that the golden vectors were computed with."""
    random = np.random.RandomState(zlib.crc32(key.encode()) & 0xFFFFFFFF)
    if len(shape) >= 4:
        values = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif len(shape) == 2:
        values = random.randn(*shape) * 0.01
    elif key.endswith(".running_var"):
        values = random.uniform(0.5, 1.5, shape)
    elif key.endswith((".running_mean", ".bias")):
        values = random.randn(*shape) * 0.1
    else:
        values = random.uniform(0.5, 1, shape) * (0.2 if key.endswith("bn4.weight") else 1)
    return torch.from_numpy(values.astype(np.float32))


def golden_network(config: P3DConfig) -> P3D:
    network = P3D(config)
    state = network.state_dict()
    state.update({key: golden_tensor(key, tuple(value.shape)) for key, value in state.items() if "num_b" not in key})
    network.load_state_dict(state, strict=True)
    return network.eval()


def tiny_network(graph: str = "caffe", stride_on: str = "1x1") -> P3D:
    """One block of each kind."""
    return golden_network(P3DConfig(name="tiny", blocks=(1, 1, 1, 1), graph=graph, stride_on=stride_on, num_classes=5))


def random_clips(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(0).randn(*shape).astype(np.float32))


@pytest.mark.parametrize("name", KEYS_SHA256)
def test_keys_and_shapes_are_those_of_the_public_checkpoints(name: str) -> None:
    """Every parameter and statistic has the name and shape it has in the public checkpoints."""
    with torch.device("meta"):
        state = zoo.build(name).state_dict()
    lines = sorted(
        f"{key}\t{'x'.join(map(str, value.shape))}" for key, value in state.items() if "num_batches_tracked" not in key
    )
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == KEYS_SHA256[name]


@pytest.mark.parametrize("graph", ["caffe", "port"])
def test_golden_vectors(graph: str) -> None:
    """P3D-63 gives the same features and logits as an interpreter of the original graph, to 1e-4."""
    network = golden_network(zoo.config("p3d63", graph=graph))
    with torch.inference_mode():
        features = network.features(random_clips(1, 3, 16, 160, 160))[0]
        logits = network.fc(features)
    norm, mean, first = GOLDEN[graph]["features"]
    assert features.norm().item() == pytest.approx(norm, rel=1e-4)
    assert features.mean().item() == pytest.approx(mean, rel=1e-4)
    assert features[:6].tolist() == pytest.approx(first, rel=1e-4)
    norm, first = GOLDEN[graph]["logits"]
    assert logits.norm().item() == pytest.approx(norm, rel=1e-4)
    assert logits[:6].tolist() == pytest.approx(first, rel=1e-4)
    assert logits.argmax().item() == 353


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("p3d63", "ABC ABCA BCABCA 222"),
        ("p3d131", f"ABC ABCA {'BCA' * 7}BC 222"),
        ("p3d199", f"ABC ABCABCAB {'CAB' * 12} 222"),
        ("p3d63-a", "AAA AAAA AAAAAA 222"),
        ("p3d63-b", "BBB BBBB BBBBBB 222"),
        ("p3d63-c", "CCC CCCC CCCCCC 222"),
    ],
)
def test_the_kinds_of_blocks_interleave_without_a_reset(name: str, kinds: str) -> None:
    """A, B and C alternate by one counter that continues across stages, and res5 is 2-D."""
    letters = {BlockA: "A", BlockB: "B", BlockC: "C", Bottleneck2D: "2"}
    with torch.device("meta"):
        network = zoo.build(name)
    stages = (network.layer1, network.layer2, network.layer3, network.layer4)
    assert " ".join("".join(letters[type(block)] for block in stage) for stage in stages) == kinds


@pytest.mark.parametrize("graph", ["caffe", "port"])
@pytest.mark.parametrize("frames", [16, 32, 48])
def test_long_clips_keep_to_themselves(graph: str, frames: int) -> None:
    """A clip's features in a batch are the mean over its time steps of res5 computed on each step alone."""
    network = tiny_network(graph)
    clips = random_clips(2, 3, frames, 64, 64)
    with torch.inference_mode():
        together = network.features(clips)
        for clip, found in zip(clips, together, strict=True):
            x = network.pool1(torch.relu(network.bn1(network.conv1_custom(clip[None]))))
            for stage in (network.layer1, network.layer2, network.layer3):
                x = network.temporal_pool(stage(x))
            steps = [network.layer4(x[:, :, step]).mean(dim=(2, 3))[0] for step in range(x.shape[2])]
            assert len(steps) == frames // 16
            torch.testing.assert_close(found, torch.stack(steps).mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


def test_the_order_of_the_frames_matters() -> None:
    """A clip played backwards has other features: time is not averaged away."""
    network = tiny_network()
    clips = random_clips(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(network.features(clips), network.features(clips.flip(2)), rtol=1e-2)


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
@pytest.mark.parametrize("graph", ["caffe", "port"])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (65, 97), (112, 112), (224, 224)])
def test_any_image_size_gives_one_row_per_clip(graph: str, stride_on: str, height: int, width: int) -> None:
    """Odd and large images give one finite row per clip, whichever convolution has the stride."""
    with torch.inference_mode():
        features = tiny_network(graph, stride_on).features(random_clips(1, 3, 16, height, width))
    assert features.shape == (1, 2048)
    assert torch.isfinite(features).all()
    assert features.std() > 0.01


def test_pool1_rounds_up_in_caffe_and_pads_in_the_port() -> None:
    """The one difference outside the blocks: windows start at pixel 0 and round up, or at -1 and round down."""
    ramp = torch.arange(33.0).expand(1, 64, 2, 33, 33)
    assert tiny_network("caffe").pool1(ramp)[0, 0, 0, 0].tolist() == [*range(2, 33, 2)]
    assert tiny_network("port").pool1(ramp)[0, 0, 0, 0].tolist() == [*range(1, 33, 2), 32]
    even = torch.arange(32.0).expand(1, 64, 2, 32, 32)
    assert tiny_network("caffe").pool1(even)[0, 0, 0, 0].tolist() == [*range(2, 31, 2), 31]
    assert tiny_network("port").pool1(even)[0, 0, 0, 0].tolist() == [*range(1, 32, 2)]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 16, 64, 64), r"\(B, C, T, H, W\)"),
        ((1, 2, 16, 64, 64), "c = 2"),
        ((1, 3, 8, 64, 64), "t = 8"),
        ((1, 3, 0, 64, 64), "t = 0"),
        ((1, 3, 24, 64, 64), "t = 24"),
        ((1, 3, 16, 63, 64), "h = 63"),
        ((1, 3, 16, 64, 32), "w = 32"),
    ],
)
def test_clips_that_do_not_fit_are_refused_with_their_sizes(shape: tuple[int, ...], message: str) -> None:
    """A clip that the network does not accept is refused, and the error states the wrong value."""
    with pytest.raises(ValueError, match=message):
        tiny_network().features(torch.zeros(shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": (3, 4, 0, 3)}, "at least one block"),
        ({"blocks": (3, 4, 6)}, "four stages"),
        ({"kinds": "ABD"}, "ABD"),
        ({"kinds": ""}, "block kinds"),
        ({"graph": "tf"}, "tf"),
        ({"stride_on": "7x7"}, "7x7"),
        ({"num_classes": 0}, "num_classes = 0"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_configurations_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    """A wrong option is refused when the configuration is constructed, and the error states its value."""
    with pytest.raises(ValueError, match=message):
        P3DConfig(**{"name": "x", "blocks": (1, 1, 1, 1), **change})


def test_both_graphs_can_be_trained() -> None:
    """Every parameter gets a gradient: nothing overwrites a tensor that the backward pass needs."""
    for graph in ("caffe", "port"):
        network = tiny_network(graph).train()
        network(random_clips(2, 3, 16, 64, 64)).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("graph", ["caffe", "port"])
def test_folding_changes_rounding_only(graph: str) -> None:
    """With every normalisation folded away, the features are the same to 1e-5."""
    network = tiny_network(graph)
    clips = random_clips(1, 3, 16, 64, 64)
    with torch.inference_mode():
        plain = network.features(clips)
        fold(network)
        folded = network.features(clips)
    assert not [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d)]
    assert (folded - plain).norm() / plain.norm() < 1e-5


def test_folding_refuses_a_network_in_training_mode() -> None:
    """Statistics that still change cannot be folded."""
    with pytest.raises(ValueError, match="training"):
        fold(tiny_network().train())
