"""The paper's baseline networks: their sizes, their accepted inputs, and agreement with the papers' descriptions."""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from p3d import zoo
from p3d.encoder import Encoder, check_golden, golden_features
from p3d.networks.baselines import C3D, ConvPool, DeepVideo, GoogLeNet, SlowFusion
from p3d.networks.model import fold
from p3d.networks.network import Network
from p3d.networks.resnet import ResNet, ResNetConfig
from p3d.preprocessing import C3D_RGB, IMAGENET_BGR, IMAGENET_RGB
from p3d.weights import Weights, WeightsError, load, random_weights, save, to_bytes
from tests.p3d.test_resnet import ResNet as PlainResNet

TINY = (1, 1, 1, 1)


def on_meta(name: str, **options: object) -> Network:
    with torch.device("meta"):
        return zoo.build(name, **options).eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def seeded_tensor(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if key.endswith("running_var"):
        return torch.rand(shape, generator=generator) + 0.5
    if len(shape) < 2:
        return torch.rand(shape, generator=generator) * 0.2 + ("weight" in key)
    return torch.randn(shape, generator=generator) * (2 / shape[1:].numel()) ** 0.5


@functools.cache
def tiny_state(spacetime: bool) -> dict[str, torch.Tensor]:
    """Ordinary numbers for every tensor of a residual network of one block per stage."""
    with torch.device("meta"):
        network = ResNetConfig(name="tiny", blocks=TINY, spacetime=spacetime, num_classes=5).build()
    generator = torch.Generator().manual_seed(0)
    return {key: seeded_tensor(key, value.shape, generator) for key, value in network.state_dict().items()}


def tiny(spacetime: bool = False, graph: str = "caffe", stride_on: str = "1x1") -> Network:
    """A residual network of one block per stage, with its own copy of the numbers."""
    config = ResNetConfig(
        name="tiny", blocks=TINY, spacetime=spacetime, graph=graph, stride_on=stride_on, num_classes=5
    )
    with torch.device("meta"):
        network = config.build()
    state = {key: value.clone() for key, value in tiny_state(spacetime).items()}
    network.load_state_dict(state, assign=True)
    return network.eval()


def clips_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@functools.cache
def pooling() -> Weights:
    """Convolutional pooling over a few small frames: the cheapest network without a normalisation."""
    weights = random_weights("convpool", 0, num_classes=5)
    small = dataclasses.replace(weights.recipe, n_frames=2, resize_hw=(64, 64), crop_hw=(64, 64))
    return dataclasses.replace(weights, recipe=small)


PUBLISHED = {  # parameters without the classifier, GMACs per 224x224 frame with the stride on 1x1 and on 3x3
    "resnet50": (23_508_032, 3.856, 4.087),
    "resnet101": (42_500_160, 7.568, 7.799),
    "resnet152": (58_143_808, 11.280, 11.512),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_2d_resnets_have_the_published_size_and_cost(name: str) -> None:
    """Parameters and multiply-adds per frame are those of the known 2-D networks."""
    params, *gmacs = PUBLISHED[name]
    network = on_meta(name, num_classes=1000)
    assert count(network) - count(network.fc) == params
    found = [round(zoo.describe(name, stride_on=stride_on).gmacs / 16, 3) for stride_on in ("1x1", "3x3")]
    assert found == gmacs
    assert f"resnet{zoo.describe(name).layers}" == name


def test_c3d_has_the_published_size() -> None:
    """79,991,015 parameters with 487 classes (the Keras port's summary), 11 layers (the P3D paper's figure 1)."""
    found = zoo.describe("c3d", num_classes=487)
    assert (found.params, found.layers, found.feature_dim) == (79_991_015, 11, 4096)
    assert found.size_mb == pytest.approx(321, rel=0.005)  # MB in the paper's figure 1


def test_googlenet_has_the_published_size() -> None:
    """With a 1000-way classifier on its 1024 features it has the 6,998,552 parameters of Caffe's GoogLeNet."""
    assert count(GoogLeNet(3)) + 1024 * 1000 + 1000 == 6_998_552


COMPUTED = {  # no count was published: computed by hand from the papers' layers, 487 classes
    "deepvideo-single": 3_747_200 + 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 487 + 487,
    "deepvideo-slow": 5_350_880 + 9216 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 487 + 487,
    "convpool": 5_973_552 + 1024 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 487 + 487,
    # P3D has 9 + 3 weights where this has 27, and two normalisations where this has one
    "resnet50-3d": 25_923_495 + sum(n * (15 * p * p - 2 * p) for n, p in ((3, 64), (4, 128), (6, 256))),
    "resnet50-lstm": 23_508_032 + 4 * 512 * (2048 + 512 + 2 + 512 + 512 + 2) + 512 * 487 + 487,
    "resnet152-3d": 66_670_503 + sum(n * (15 * p * p - 2 * p) for n, p in ((3, 64), (8, 128), (36, 256))),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_the_others_have_the_computed_size(name: str) -> None:
    """Where no count was published, the sum over the layers of the paper's description agrees."""
    assert zoo.describe(name, num_classes=487).params == COMPUTED[name]


@pytest.mark.parametrize("spacetime", [False, True])
def test_a_quarter_of_the_width_has_a_sixteenth_of_the_convolutions(spacetime: bool) -> None:
    """`width` scales every convolution and the features, in the 2-D and the 3x3x3 network."""
    blocks = (3, 4, 6, 3)
    with torch.device("meta"):
        full, quarter = (
            ResNetConfig(name="any", blocks=blocks, spacetime=spacetime, width=width).build() for width in (64, 16)
        )
    assert (full.feature_dim, quarter.feature_dim) == (2048, 512)
    assert (full.fc.in_features, quarter.fc.in_features) == (2048, 512)
    for key, value in quarter.state_dict().items():
        if value.ndim > 3:
            assert full.state_dict()[key].numel() == value.numel() * (4 if key == "conv1.weight" else 16)
    frames = 16 if spacetime else 2
    assert quarter.eval()(torch.empty(1, 3, frames, 64, 64, device="meta")).shape == (1, 400)
    for wrong in ({"width": 0}, {"blocks": (1, 1, 1)}):
        with pytest.raises(ValueError, match="a ResNet"):
            ResNetConfig(**{"name": "any", "blocks": blocks} | wrong)


def torchvision_shapes(blocks: tuple[int, ...], classes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's bottleneck ResNets, according to its documentation of the layers."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    channels = 64
    for stage, (n, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        for i in range(n):
            at = f"layer{stage}.{i}"
            shapes[f"{at}.conv1.weight"] = (width, channels, 1, 1)
            shapes[f"{at}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{at}.conv3.weight"] = (4 * width, width, 1, 1)
            norms |= {f"{at}.bn1": width, f"{at}.bn2": width, f"{at}.bn3": 4 * width}
            if i == 0:
                shapes[f"{at}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                norms[f"{at}.downsample.1"] = 4 * width
            channels = 4 * width
    for norm, width in norms.items():
        shapes |= {f"{norm}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {"fc.weight": (classes, 2048), "fc.bias": (classes,)}


def c3d_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the public PyTorch ports of C3D."""
    widths = {"1": (3, 64), "2": (64, 128), "3a": (128, 256), "3b": (256, 256), "4a": (256, 512), "4b": (512, 512)}
    widths |= {"5a": (512, 512), "5b": (512, 512)}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (channels, width) in widths.items():
        shapes |= {f"conv{name}.weight": (width, channels, 3, 3, 3), f"conv{name}.bias": (width,)}
    for name, (inputs, outputs) in {"6": (8192, 4096), "7": (4096, 4096), "8": (4096, classes)}.items():
        shapes |= {f"fc{name}.weight": (outputs, inputs), f"fc{name}.bias": (outputs,)}
    return shapes


LAYOUTS = {
    "resnet50": torchvision_shapes((3, 4, 6, 3), 1000),
    "resnet101": torchvision_shapes((3, 4, 23, 3), 1000),
    "resnet152": torchvision_shapes((3, 8, 36, 3), 1000),
    "c3d": c3d_shapes(1000),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_and_shapes_are_those_of_public_checkpoints(name: str) -> None:
    """ResNets have torchvision's names, C3D those of the ports."""
    state = on_meta(name, num_classes=1000).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if "num_batches" not in key} == LAYOUTS[name]


@pytest.mark.parametrize("name", zoo.BASELINES)
def test_every_network_takes_its_own_recipe_and_no_other_size(name: str) -> None:
    """Two clips of the recipe give two rows and scores; a wrong channel count or size is refused."""
    network, recipe = on_meta(name, num_classes=7), zoo.recipe(name, "caffe")
    shape = (recipe.channels, recipe.n_frames, *recipe.crop_hw)
    features = network.features(torch.empty(2, *shape, device="meta"))
    assert features.shape == (2, network.feature_dim)
    assert network.classify(features).shape == (2, 7)
    assert (recipe.channels, network.config.name) == (3, name)
    for wrong in ((2, *shape[1:]), (3, 0, *shape[2:]), (*shape[:3], 31)):
        with pytest.raises(ValueError, match=f"{name} takes "):
            network.features(torch.empty(1, *wrong, device="meta"))
    with pytest.raises(ValueError, match=re.escape("(B, C, T, H, W)")):
        network.features(torch.empty(shape, device="meta"))


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("c3d", (16, 112, 128)),
        ("c3d", (32, 112, 112)),
        ("deepvideo-single", (2, 170, 170)),
        ("deepvideo-slow", (9, 170, 170)),
        ("resnet50-3d", (24, 160, 160)),
    ],
)
def test_fully_connected_layers_fix_the_size(name: str, size: tuple[int, int, int]) -> None:
    """A clip with an unsupported size, or with frames that would be ignored, is refused with its sizes."""
    with pytest.raises(ValueError, match=f"t = {size[0]}"):
        on_meta(name).features(torch.empty(1, 3, *size, device="meta"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("c3d", {"stride_on": "3x3"}, "no bottleneck"),
        ("convpool", {"graph": "port"}, "no public port"),
        ("deepvideo-slow", {"graph": "port"}, "no public port"),
        ("resnet50", {"graph": "tf"}, "tf"),
    ],
)
def test_options_without_a_meaning_are_refused(name: str, options: dict[str, str], message: str) -> None:
    """A network refuses an option that has no effect on it."""
    with pytest.raises(ValueError, match=message):
        zoo.config(name, **options)


@pytest.mark.parametrize(("graph", "stride_on"), [("caffe", "1x1"), ("port", "3x3")])
def test_a_clips_features_are_the_mean_of_its_frames(graph: str, stride_on: str) -> None:
    """The 2-D network computes each frame independently of the other frames and clips of the batch."""
    network, clips = tiny(graph=graph, stride_on=stride_on), clips_of(2, 3, 3, 70, 64)
    with torch.inference_mode():
        together = network.features(clips)
        for clip, found in zip(clips, together, strict=True):
            alone = torch.cat([network.features(clip[None, :, t : t + 1]) for t in range(3)])
            torch.testing.assert_close(found, alone.mean(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], rtol=1e-2)


@pytest.mark.parametrize(("graph", "stride_on"), [("caffe", "1x1"), ("port", "3x3")])
def test_the_2d_network_is_the_one_p3d_is_inflated_from(graph: str, stride_on: str) -> None:
    """The independent ResNet from the tests of inflation gives the same row for the same tensors and frame."""
    other = PlainResNet(TINY, v1=stride_on == "1x1", caffe_pool=graph == "caffe")
    network, frame = tiny(graph=graph, stride_on=stride_on), clips_of(1, 3, 1, 65, 70)
    network.load_state_dict(other.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(network.features(frame), other.features(frame[:, :, 0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("graph", "stride_on"), [("caffe", "1x1"), ("port", "3x3")])
def test_3x3x3_filters_that_see_one_frame_give_the_2d_network(graph: str, stride_on: str) -> None:
    """With a 2-D network's filters on the centre tap, a static clip has its frame's features; a moving clip has not."""
    flat, deep = tiny(graph=graph, stride_on=stride_on), tiny(spacetime=True, graph=graph, stride_on=stride_on)
    state = deep.state_dict()
    for key, value in flat.state_dict().items():
        if state[key].ndim == value.ndim + 1:
            state[key] = torch.zeros_like(state[key])
            state[key][:, :, state[key].shape[2] // 2] = value
        else:
            state[key] = value
    deep.load_state_dict(state)
    frame = clips_of(1, 3, 1, 64, 70)
    with torch.inference_mode():
        static = deep.features(frame.expand(-1, -1, 16, -1, -1))
        torch.testing.assert_close(static, flat.features(frame), rtol=1e-4, atol=5e-5)
        moving = clips_of(1, 3, 16, 64, 70)
        assert not torch.allclose(deep.features(moving), flat.features(moving), rtol=1e-2)


def test_3x3x3_filters_see_time() -> None:
    """A clip played backwards has other features."""
    network, clips = tiny(spacetime=True), clips_of(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(network.features(clips), network.features(clips.flip(2)), rtol=1e-2)


@pytest.mark.parametrize("spacetime", [False, True])
def test_folding_changes_rounding_only(spacetime: bool) -> None:
    """Folding removes every normalisation of a residual network and keeps its features to 1e-5."""
    network, clips = tiny(spacetime), clips_of(1, 3, 16, 64, 64)
    with torch.inference_mode():
        plain = network.features(clips)
        fold(network)
        folded = network.features(clips)
    assert not [m for m in network.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm3d)]
    assert (folded - plain).norm() / plain.norm() < 1e-5


def test_c3ds_last_pooling_rounds_up_in_caffe_and_pads_in_the_ports() -> None:
    """7 pixels become 4 in both graphs, with windows that start at pixel 0 or at pixel -1."""
    ramp = torch.arange(7.0).expand(1, 1, 2, 7, 7)
    with torch.device("meta"):
        caffe, port = (zoo.build("c3d", graph=graph) for graph in ("caffe", "port"))
    assert isinstance(caffe, C3D)
    assert caffe.pool5(ramp)[0, 0, 0, 0].tolist() == [1, 3, 5, 6]
    assert port.pool5(ramp)[0, 0, 0, 0].tolist() == [0, 2, 4, 6]


def test_slow_fusion_sees_all_ten_frames_step_by_step() -> None:
    """4, 2 and 1 time steps are left after the first three convolutions, as in the paper's figure 1."""
    with torch.device("meta"):
        network = zoo.build("deepvideo-slow").eval()
    times: list[int] = []
    for conv in (network.conv1, network.conv2, network.conv3, network.conv5):
        conv.register_forward_hook(lambda _module, _given, out: times.append(out.shape[2]))
    network.features(torch.empty(1, 3, 10, 170, 170, device="meta"))
    assert times == [4, 2, 1, 1]
    assert isinstance(network, SlowFusion)
    assert type(on_meta("deepvideo-single")) is DeepVideo


def test_krizhevskys_normalisation_does_not_divide_alpha() -> None:
    """b = a / (2 + 1e-4 * sum of squares of 5 neighbours) ** 0.5; for this torch's alpha must be 5e-4."""
    with torch.device("meta"):
        norm = zoo.build("deepvideo-single").norm
    a = torch.full((1, 9, 1, 1), 100.0)
    assert norm(a)[0, 4, 0, 0].item() == pytest.approx(100 / (2 + 1e-4 * 5 * 100**2) ** 0.5)


def test_convolutional_pooling_is_a_maximum_over_frames() -> None:
    """Order and repetition of the frames do not matter, and every frame contributes."""
    network = pooling().network
    assert isinstance(network, ConvPool)
    clip = clips_of(1, 3, 3, 64, 64) * 50
    with torch.inference_mode():
        features = network.features(clip)
        for same in ([2, 0, 1], [0, 0, 1, 2, 2]):
            torch.testing.assert_close(network.features(clip[:, :, same]), features)
        rows = torch.stack([network.frames(clip[0, :, t][None])[0] for t in range(3)])
        assert {*rows.argmax(0).tolist()} == {0, 1, 2}
        assert not torch.allclose(network.features(clip[:, :, :1]), features, rtol=1e-3)


def unlike_clips(frames: int, side: int, amplitude: float) -> torch.Tensor:
    """Two different clips: noise and a sine grating."""
    noise = clips_of(3, frames, side, side)
    grating = torch.sin(torch.arange(side) / 3).expand(3, frames, side, side)
    return torch.stack([noise, grating]) * amplitude


@pytest.mark.parametrize("name", ["resnet50", "convpool"])
def test_random_features_stay_sane(name: str) -> None:
    """Random weights give features of magnitude one that differ between clips, also without a normalisation."""
    network = pooling().network if name == "convpool" else random_weights(name, 0, num_classes=5).network
    first: list[float] = []  # standard deviation of the first layer's output
    layer = network.get_submodule(network.stem_norm or network.stem)
    handle = layer.register_forward_hook(lambda _module, _given, out: first.append(out.std().item()))
    with torch.inference_mode():
        features = network.features(unlike_clips(2, 80, 64))
    handle.remove()
    assert all(0.1 < std < 5 for std in first)
    assert torch.isfinite(features).all()
    assert 0.05 < features.std() < 5
    assert torch.cosine_similarity(features[0], features[1], dim=0) < 0.95


def assert_a_row_depends_on_its_clip_alone(encoder: Encoder) -> None:
    """Rows and scores have the same bits alone, in any order and at any position in a batch.

    Five clips, because with two threads the last row of a five-row product was observed to have different bits.
    """
    frames = np.random.RandomState(0).randint(0, 256, (6, *encoder.recipe.crop_hw, 3)).astype(np.uint8)
    index = np.stack([np.arange(5), np.arange(1, 6)], axis=1)
    rows, probs = encoder.encode(frames, index, probs=True)
    assert len({row.tobytes() for row in rows}) == 5
    for order in ([4, 0, 1, 2, 3], [2]):
        moved = encoder.encode(frames, index[order], probs=True)
        assert np.array_equal(moved[0], rows[order])
        assert np.array_equal(moved[1], probs[order])


def test_the_encoder_runs_a_network_without_normalisations() -> None:
    """Fully connected layers give the same bits at every position in a batch, and the golden check passes."""
    weights = pooling()
    encoder = Encoder(weights, batch_size=5, threads=2)
    assert encoder.feature_dim == 4096
    assert_a_row_depends_on_its_clip_alone(encoder)
    check_golden(encoder, golden_features(weights))


def test_the_encoder_gives_a_frame_network_the_same_bits_at_every_place() -> None:
    """A 2-D network merges frames into the batch, but a clip's row depends on its clip alone."""
    recipe = dataclasses.replace(IMAGENET_BGR, n_frames=2, crop_hw=(64, 64))
    assert_a_row_depends_on_its_clip_alone(
        Encoder(Weights(tiny().eval(), recipe, (), "a test"), batch_size=5, threads=2)
    )


def hollow(name: str) -> dict[str, torch.Tensor]:
    """A checkpoint with the public layout and zeros that need no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in LAYOUTS[name].items()}


@pytest.mark.parametrize(("name", "stride_on", "recipe"), [("resnet50", "3x3", IMAGENET_RGB), ("c3d", "1x1", C3D_RGB)])
def test_public_checkpoints_load_when_the_network_is_named(
    tmp_path: Path, name: str, stride_on: str, recipe: object
) -> None:
    """torchvision's ResNets and ports of C3D load with their conventions, also after saving in the native format."""
    path = tmp_path / "w.pth"
    torch.save({f"module.{key}": value for key, value in hollow(name).items()}, path)
    weights = load(path, name=name)
    assert weights.config == zoo.config(name, graph="port", stride_on=stride_on, num_classes=1000)
    assert weights.recipe == recipe
    assert "w.pth, sha256" in weights.origin
    with pytest.raises(WeightsError, match="temporal = 'identity'"):
        load(path, name=name, temporal="identity")
    if name == "resnet50":
        assert isinstance(weights.network, ResNet)
        save(tmp_path / "w.safetensors", weights)
        assert to_bytes(load(tmp_path / "w.safetensors", name=name)) == to_bytes(weights)


@pytest.mark.parametrize(
    ("held", "name", "message"),
    [
        ("resnet50", "resnet101", "does not fit resnet101.*missing layer3.10"),
        ("resnet50", "c3d", "no classifier fc8.weight"),
        ("c3d", "resnet50", "no classifier fc.weight"),
        ("resnet50", "convpool", "none of convpool"),
        ("resnet50", "resnet51", "did you mean resnet50"),
    ],
)
def test_checkpoints_of_other_networks_are_refused(tmp_path: Path, held: str, name: str, message: str) -> None:
    """A checkpoint of a network other than the named one is refused, and the error names the file."""
    path = tmp_path / "w.pth"
    torch.save(hollow(held), path)
    with pytest.raises(WeightsError, match=rf"w\.pth .*({message})"):
        load(path, name=name)


def test_a_recipe_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """C3D accepts only 16 frames of 112x112, and the error says so."""
    path = tmp_path / "w.pth"
    torch.save(hollow("c3d"), path)
    for change in ({"n_frames": 8}, {"crop_hw": (100, 112)}):
        with pytest.raises(WeightsError, match="takes 16 frames of 112x112 pixels"):
            load(path, name="c3d", recipe=dataclasses.replace(C3D_RGB, **change))
