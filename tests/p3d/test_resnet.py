"""2-D ResNets: every tensor is copied, and on a clip of equal frames the P3D equals the 2-D network bit for bit."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name torch's own documentation gives it

from p3d.encoder import Encoder
from p3d.networks.model import P3D, P3DConfig
from p3d.preprocessing import CAFFE_RGB, PORT_RGB
from p3d.weights import Weights, WeightsError, identify, load, resolve, save
from p3d.weights.resnet import flat_shapes, inflate

State = dict[str, Tensor]


class Bottleneck(nn.Module):
    """The plain bottleneck with torchvision's names; `v1` strides in the first 1x1 as the Caffe models do."""

    def __init__(self, channels: int, width: int, stride: int, v1: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, stride if v1 else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1 if v1 else stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module | None = None
        if stride > 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A 2-D ResNet written only for these tests, with random weights and random statistics in every normalisation."""

    def __init__(
        self, blocks: tuple[int, ...], *, v1: bool = False, caffe_pool: bool = False, classes: int = 5
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True) if caffe_pool else nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, count in enumerate(blocks, 1):
            width = 32 << stage
            strides = [2 if stage > 1 else 1] + [1] * (count - 1)
            layer = []
            for stride in strides:
                layer.append(Bottleneck(channels, width, stride, v1))
                channels = 4 * width
            setattr(self, f"layer{stage}", nn.Sequential(*layer))
        self.fc = nn.Linear(channels, classes)
        generator = torch.Generator().manual_seed(1)
        for key, value in self.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and value.ndim == 1:
                value.normal_(0.7 if key.endswith("weight") else 0.0, 0.2, generator=generator)
            elif value.is_floating_point():
                value.normal_(0, (2 / value[0].numel()) ** 0.5, generator=generator)
        self.eval()

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean(dim=(2, 3))


def tensors_of(network: nn.Module) -> State:
    return {key: value for key, value in network.state_dict().items() if "num_batches_tracked" not in key}


def inflated(config: P3DConfig, flat: State, seed: int | None = None) -> P3D:
    network = P3D(config)
    network.load_state_dict(inflate(config, flat, seed=seed), strict=False)
    return network.eval()


def tiny(kinds: str = "ABC", graph: str = "port", stride_on: str = "3x3") -> tuple[P3D, ResNet]:
    """A P3D with one kind of block or all kinds, and the 2-D network that it was inflated from."""
    blocks = (3, 2, 2, 1) if kinds == "ABC" else (1, 1, 2, 1)
    config = P3DConfig(name="tiny", blocks=blocks, kinds=kinds, graph=graph, stride_on=stride_on, num_classes=5)
    flat = ResNet(blocks, v1=stride_on == "1x1", caffe_pool=graph == "caffe")
    return inflated(config, tensors_of(flat)), flat


def frames(count: int, side: int = 64) -> Tensor:
    return torch.from_numpy(np.random.RandomState(2).randn(count, 3, side, side).astype(np.float32))


def still(images_BCHW: Tensor, length: int = 16) -> Tensor:
    """(B, C, T, H, W): each image as a clip of equal frames."""
    return images_BCHW[:, :, None].expand(-1, -1, length, -1, -1).contiguous()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are tiny, so a second thread makes them slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_convolutions() -> Iterator[None]:
    """Use torch's own convolutions. oneDNN sums in different orders in 2-D and 3-D, so the last bits would differ."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


bitwise = [
    pytest.mark.usefixtures("plain_convolutions"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration"),  # torch warns when these flags are restored
]


def assert_same_rows(found: Tensor, wanted: Tensor) -> None:
    """Equal to 1e-5 of the row's length, for computations that may sum in another order."""
    assert ((found - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


class TestStillClips:
    pytestmark = bitwise

    @pytest.mark.parametrize("stride_on", ["3x3", "1x1"])
    @pytest.mark.parametrize("graph", ["port", "caffe"])
    @pytest.mark.parametrize("kinds", ["A", "B", "C", "ABC"])
    def test_a_still_clip_gives_what_the_2d_network_gives(self, kinds: str, graph: str, stride_on: str) -> None:
        """Features and scores are bit-identical in both graphs with either stride position; a moving clip differs."""
        network, flat = tiny(kinds, graph, stride_on)
        images = frames(2)
        with torch.inference_mode():
            wanted = flat.features(images)
            found = network.features(still(images))
            assert torch.equal(found, wanted)
            assert torch.equal(network.fc(found), flat.fc(wanted))
            assert wanted.std() > 0.01
            moving = still(images)
            moving[:, :, 9] = images.flip(0)
            assert not torch.allclose(network.features(moving), wanted, rtol=1e-2)

    @pytest.mark.parametrize("graph", ["port", "caffe"])
    @pytest.mark.parametrize(("length", "side"), [(32, 64), (16, 97), (16, 160)])
    def test_still_clips_of_other_sizes_do_too(self, graph: str, length: int, side: int) -> None:
        """32 frames, odd sides, and the paper's size, for which some processors sum in another order in 3-D."""
        network, flat = tiny(graph=graph)
        with torch.inference_mode():
            found, wanted = network.features(still(frames(1, side), length)), flat.features(frames(1, side))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    def test_a_whole_resnet50_from_its_file_does_too(self, resnet50: ResNet, resnet50_file: Path) -> None:
        """From the file to the scores, P3D-63 is ResNet-50 on a still clip."""
        network = load(resnet50_file, temporal="identity").network
        images = frames(1)
        with torch.inference_mode():
            assert torch.equal(network(still(images)), resnet50.fc(resnet50.features(images)))

    def test_the_wrong_stride_or_pooling_is_not_equal(self) -> None:
        """The two settings that depend on the source format matter: with either one wrong the features differ."""
        network, flat = tiny()
        images = frames(1)
        with torch.inference_mode():
            wanted = flat.features(images)
            for change in ({"stride_on": "1x1"}, {"graph": "caffe"}):
                other = inflated(dataclasses.replace(network.config, **change), tensors_of(flat))
                found = other.features(still(images))
                assert (found - wanted).norm() > 0.01 * wanted.norm()


@pytest.mark.parametrize("graph", ["port", "caffe"])
def test_the_encoder_keeps_it_to_rounding(graph: str) -> None:
    """With oneDNN and folded normalisations a still clip's row is the 2-D network's within 1e-5 of its length."""
    network, flat = tiny(graph=graph)
    recipe = dataclasses.replace(PORT_RGB, resize_hw=(64, 64), crop_hw=(64, 64))
    image_HWC = np.random.RandomState(3).randint(0, 256, (1, 64, 64, 3), np.uint8)
    weights = Weights(network.eval(), recipe, (), "a test")
    row = Encoder(weights, batch_size=2).encode(image_HWC, np.zeros((1, 16), np.int64))
    image = torch.from_numpy(image_HWC).permute(0, 3, 1, 2) / 255
    image = (image - torch.tensor(recipe.mean).view(3, 1, 1)) / torch.tensor(recipe.std).view(3, 1, 1)
    with torch.inference_mode():
        wanted = flat.features(image)
        assert_same_rows(torch.from_numpy(row), wanted)
        assert_same_rows(network.features(still(image)), wanted)


def test_what_moves_is_pooled_over_pairs_of_frames() -> None:
    """The inflated network sees frames and not their order: swapping the two frames of a pair changes nothing."""
    network, _ = tiny()
    clip = frames(16).permute(1, 0, 2, 3)[None]
    swapped = clip.unflatten(2, (8, 2)).flip(3).flatten(2, 3)
    with torch.inference_mode():
        assert torch.equal(network.features(clip), network.features(swapped))
        assert not torch.equal(network.features(clip), network.features(clip.roll(1, 2)))


@pytest.fixture(scope="module")
def resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3), classes=7)


@pytest.fixture(scope="module")
def resnet50_file(resnet50: ResNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flat") / "resnet50.pth"
    torch.save(resnet50.state_dict(), path)
    return path


def counterpart(key: str) -> str | None:
    """Our key for a 2-D key, derived from the specification and not from the code."""
    stage, _, rest = key.partition(".")
    if stage == "conv1":
        return "conv1_custom." + rest
    if not stage.startswith("layer"):
        return key
    i, part, leaf = rest.split(".", 2)
    last = {"conv2": "conv_normal", "bn2": "bn_normal"} if stage == "layer4" else {}
    return ".".join([stage, i, ({"conv3": "conv4", "bn3": "bn4"} | last).get(part, part), leaf])


def test_every_tensor_is_taken_over(resnet50: ResNet, resnet50_file: Path) -> None:
    """Each of the 2-D network's 267 tensors is in the P3D, unchanged and under our name; only temporal ones are new."""
    weights = load(resnet50_file, temporal="identity")
    state = tensors_of(weights.network)
    flat = tensors_of(resnet50)
    assert len(flat) == 267
    for key, value in flat.items():
        ours = state.pop(counterpart(key))
        assert torch.equal(ours.reshape(value.shape), value), key
    assert {key.split(".")[2] for key in state} == {"conv3", "bn3"}
    assert len(state) == 13 * 5


def test_a_2d_file_sets_graph_stride_and_recipe(resnet50_file: Path, tmp_path: Path) -> None:
    """torchvision's conventions are the default, the origin records the inflation, and the native format keeps both."""
    weights = load(resnet50_file, temporal="identity")
    config = weights.config
    assert (weights.name, config.graph, config.stride_on, config.num_classes) == ("p3d63", "port", "3x3", 7)
    assert weights.recipe == PORT_RGB
    digest = hashlib.sha256(resnet50_file.read_bytes()).hexdigest()
    assert weights.origin == (
        f"inflated from ResNet-50 resnet50.pth, sha256 {digest}, temporal identity: sees frames, not motion"
    )
    save(tmp_path / "w.safetensors", weights)
    again = load(tmp_path / "w.safetensors")
    assert (again.config, again.recipe, again.origin) == (config, weights.recipe, weights.origin)
    first, second = weights.network.state_dict(), again.network.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_caffe_style_2d_file_is_the_callers_to_say(resnet50_file: Path) -> None:
    """Variant, graph, stride, recipe and class names override the defaults."""
    names = tuple("abcdefg")
    asked = {"name": "p3d63-c", "graph": "caffe", "stride_on": "1x1", "recipe": CAFFE_RGB, "class_names": names}
    weights = load(resnet50_file, temporal="identity", **asked)
    config = weights.config
    assert (config.name, config.kinds, config.graph, config.stride_on) == ("p3d63-c", "C", "caffe", "1x1")
    assert (weights.recipe, weights.class_names) == (CAFFE_RGB, names)


def hollow(blocks: tuple[int, int, int, int]) -> State:
    """Every key and shape of a 2-D network with these bottleneck counts, all zeros that need no space in a file."""
    shapes = flat_shapes(P3DConfig(name="x", blocks=blocks, num_classes=7))
    return {key: torch.zeros((), dtype=torch.float16).expand(shape) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("blocks", "name", "suffix"), [((3, 4, 23, 3), "p3d131", "pth"), ((3, 8, 36, 3), "p3d199", "safetensors")]
)
def test_the_depth_is_told_by_the_keys(
    tmp_path: Path, blocks: tuple[int, int, int, int], name: str, suffix: str
) -> None:
    """ResNet-101 and -152, as a checkpoint under DataParallel's prefix or as timm's safetensors; no counters needed."""
    path = tmp_path / f"flat.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in hollow(blocks).items()}}, path)
    else:
        tensors = {key: value.contiguous() for key, value in hollow(blocks).items()}
        path.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    assert identify(path).format == "resnet"
    assert load(path, temporal="identity").name == name
    with pytest.raises(WeightsError, match=f"a 2-D network for {name} and p3d63 was asked for"):
        load(path, name="p3d63", temporal="identity")


def test_nothing_is_inflated_unless_asked_by_name(resnet50_file: Path) -> None:
    """A 2-D file alone, as given to a launch, is refused with an error that names the command to convert it."""
    for read in (lambda: load(resnet50_file), lambda: resolve(str(resnet50_file))):
        with pytest.raises(WeightsError, match=r"no temporal filters.*p3d weights import .*frames, not motion"):
            read()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"temporal": "i3d"}, "one of identity, gaussian, not 'i3d'"),
        ({"temporal": "gaussian"}, "need a seed"),
        ({"temporal": "gaussian", "seed": -1}, "need a seed"),
        ({"temporal": "identity", "seed": 1}, "identity takes none"),
        ({"temporal": "identity", "name": "p3d63-flow"}, "p3d63-flow was asked for"),
        ({"temporal": "identity", "name": "p3d64"}, "did you mean p3d63"),
        ({"temporal": "identity", "graph": "tf"}, "graph must be one of"),
        ({"temporal": "identity", "class_names": ("a",)}, "7 classes but 1 names"),
    ],
)
def test_what_cannot_be_asked_of_a_2d_file_is_refused(
    resnet50_file: Path, asked: dict[str, object], message: str
) -> None:
    """Options that do not fit are reported together with the file's name."""
    with pytest.raises(WeightsError, match=rf"resnet50\.pth.*{message}"):
        load(resnet50_file, **asked)


def with_keys(**changes: Tensor | None) -> State:
    """The keys of ResNet-50 with some replaced, or dropped where the value is None; "__" stands for a dot."""
    state = hollow((3, 4, 6, 3))
    for key, value in changes.items():
        state.pop(key.replace("__", "."), None)
        if value is not None:
            state[key.replace("__", ".")] = value
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: with_keys(conv1__weight=None, conv1__0__weight=torch.zeros(32, 3, 3, 3)), "deep stem"),
        (lambda: {key: v for key, v in with_keys().items() if ".conv3." not in key}, "basic blocks"),
        (lambda: hollow((2, 2, 2, 2)), r"\(2, 2, 2, 2\) bottlenecks"),
        (lambda: with_keys(fc__weight=None, fc__bias=None), "no classifier"),
        (lambda: with_keys(fc__bias=None), "does not fit a 2-D ResNet-50 with 7 classes: missing fc.bias"),
        (lambda: with_keys(fc__weight=torch.zeros(())), "1 to a million classes"),
        (lambda: with_keys(layer1__0__bn3__running_var=None), "missing layer1.0.bn3.running_var"),
        (lambda: with_keys(layer1__0__se__fc1__bias=torch.zeros(8)), "unexpected layer1.0.se.fc1.bias"),
        (
            lambda: with_keys(layer2__0__conv2__weight=torch.zeros(256, 256, 3, 3)),
            r"mis-shaped layer2.0.conv2.weight \(256x256x3x3 for 128x128x3x3\)",
        ),
        (lambda: with_keys(bn1__weight=torch.full((64,), float("inf"))), "not finite in bn1.weight"),
    ],
)
@pytest.mark.fault(48)
def test_2d_networks_that_do_not_fit_are_refused(tmp_path: Path, content: Callable[[], State], message: str) -> None:
    """Deep stems, basic blocks, other depths, no classifier, wide variants or attention: the error names each."""
    path = tmp_path / "w.pth"
    torch.save(content(), path)
    with pytest.raises(WeightsError, match=rf"w\.pth .*{message}"):
        load(path, temporal="identity")


def test_files_with_filters_in_time_take_no_others(tmp_path: Path) -> None:
    """Requesting temporal filters for a P3D file is refused, because it has them already."""
    network = P3D(P3DConfig(name="p3d63", blocks=(3, 4, 6, 3), num_classes=2))
    save(tmp_path / "w.safetensors", Weights(network.eval(), PORT_RGB, (), "test"))
    with pytest.raises(WeightsError, match="temporal filters of its own"):
        load(tmp_path / "w.safetensors", temporal="identity")


# A change here changes the meaning of a seed in every file that was ever made from one.
SEED_3_SHA256 = "8d20bd67fce2b527bceef8d2ee9bab5055fb4e7bebb6c19068210480fbec6a7c"


def test_gaussian_filters_are_small_and_pinned() -> None:
    """Mean 0, deviation 0.001, initial normalisations, identical on every machine, different for another seed."""
    config = P3DConfig(name="tiny", blocks=(1, 1, 1, 1), num_classes=7)
    flat = {key: value.float() for key, value in hollow((1, 1, 1, 1)).items()}
    state = inflate(config, flat, seed=3)
    filters = state["layer3.0.conv3.weight"]
    assert abs(filters.mean()) < 1e-5
    assert filters.std().item() == pytest.approx(0.001, rel=0.01)
    assert torch.equal(state["layer3.0.bn3.running_var"], torch.ones(256))
    assert hashlib.sha256(filters.numpy().tobytes()).hexdigest() == SEED_3_SHA256
    assert not torch.equal(inflate(config, flat, seed=4)["layer3.0.conv3.weight"], filters)


@pytest.mark.parametrize(
    ("kinds", "graph", "seed", "alive"),
    [
        ("B", "port", None, False),
        ("C", "port", None, False),
        ("A", "port", None, True),
        ("B", "port", 0, True),
        ("C", "port", 0, True),
        ("ABC", "caffe", None, True),
    ],
)
def test_which_temporal_filters_can_be_trained(kinds: str, graph: str, seed: int | None, alive: bool) -> None:
    """In the port's graph a zero branch ends in a ReLU of zero and gets no gradient; gaussian ones and caffe's do."""
    blocks = (3, 1, 1, 1) if kinds == "ABC" else (1, 1, 1, 1)
    config = P3DConfig(name="tiny", blocks=blocks, kinds=kinds, graph=graph, stride_on="3x3", num_classes=5)
    network = inflated(config, tensors_of(ResNet(blocks)), seed)
    network(frames(16).permute(1, 0, 2, 3)[None]).sum().backward()
    for key, parameter in network.named_parameters():
        if ".conv3." in key:
            assert bool(parameter.grad.abs().max() > 0) == alive, key
