"""2-D ImageNet ResNets as torchvision and timm save them: ResNet-50, -101, -152 -> P3D-63, -131, -199, or an LSTM.

The 2-D file has every filter except the temporal ones. As in the paper, spatial filters are copied and temporal ones
are created. The caller must choose how, because it determines the features:

    temporal    T and its normalisation                    resulting features
    identity    identity or zero, as in the table below    per-frame 2-D features, with the maximum of each two frames
                                                           at the four temporal pools: they see frames, not motion
    gaussian    N(0, 0.001^2) from a seed, initial BN      the paper's start of training, not useful as features

    block   graph "port"    graph "caffe"
    A       T is identity   T is identity
    B       T is zero       T is zero
    C       T is zero       T is identity, because s / 2 + s / 2 = s

With "identity", a clip of equal frames gives in float32 the same bits as the 2-D ResNet with the same stride position
and first pooling gives for the frame. This requires that 2-D and 3-D convolutions sum in the same order: torch's own
do, oneDNN's do not and differ by 1e-6. For an exact identity the centre tap is one, and so is every factor of the
normalisation, in whatever order a device multiplies them: gamma is 1 and the variance is 1 - eps.

torchvision strides in the 3x3 and pads its first pooling, hence the defaults; a Caffe-style ResNet needs graph "caffe",
stride_on "1x1" and its own recipe. Note: their `conv3` and `bn3` are our `conv4` and `bn4`; our `conv3` is temporal.

If a network with an LSTM is named, the file is its frame network. Its LSTM and classifier are drawn from the seed, with
the deviation of torch's own initialisation, and biases of 0, or 1 at forget gates. The file's classifier is not used.
Sources: paper, section 4 (initialisation); torchvision's resnet.py for the keys; Jozefowicz, Zaremba, Sutskever, "An
Empirical Exploration of Recurrent Network Architectures", ICML 2015, for the forget gates.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from p3d import zoo
from p3d.networks.lstm import LSTMConfig
from p3d.networks.model import P3DConfig
from p3d.preprocessing import PORT_RGB
from p3d.weights.record import (
    ImportOptions,
    Weights,
    WeightsError,
    assemble,
    check_asked,
    check_tensors,
    expected_shapes,
    network_config,
    sha256_of,
)
from p3d.weights.seeded import normal

TEMPORAL: Final = ("identity", "gaussian")
GAUSSIAN_STD: Final = 0.001
BN_EPS: Final = 1e-5
_DEPTHS: Final = {(3, 4, 6, 3): ("50", "p3d63"), (3, 4, 23, 3): ("101", "p3d131"), (3, 8, 36, 3): ("152", "p3d199")}
_THEIRS: Final = {"conv1_custom": "conv1", "conv4": "conv3", "bn4": "bn3", "conv_normal": "conv2", "bn_normal": "bn2"}
_WANTED: Final = "give a plain ResNet-50, -101 or -152 with torchvision's keys"


def fits(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the tensors of any 2-D ResNet: its stem is a 2-D convolution called conv1."""
    stem = tensors.get("conv1.weight", tensors.get("conv1.0.weight"))
    return stem is not None and stem.ndim == 4


def load(
    path: Path,
    tensors: Mapping[str, Tensor],
    asked: ImportOptions,
) -> Weights:
    """A P3D with the 2-D filters of `tensors`, which were read from `path`; `asked.name` may name a variant.

    `asked.temporal` must be given, and with "gaussian" a `seed`. A name with an LSTM gives that network, with as many
    classes as `asked.class_names`, or 400. Raises WeightsError and OSError.
    """
    source = str(path)
    if asked.name in zoo.LSTM_NAMES:
        return _load_with_lstm(path, tensors, asked)
    depth, held = _network(source, tensors)
    _check_temporal(source, depth, asked.temporal, asked.seed)
    name = asked.name
    if name in zoo.P3D_NAMES and not name.endswith("-flow"):
        held = name if zoo.p3d_config(name).blocks == zoo.p3d_config(held).blocks else held
    check_asked(source, "a 2-D network for", name, held)
    if "fc.weight" not in tensors:
        raise WeightsError(f"{source} has no classifier (fc.weight, fc.bias); give the file that still has it")
    config = network_config(
        source,
        held,
        graph=asked.graph or "port",
        num_classes=len(tensors["fc.weight"]) if tensors["fc.weight"].ndim else 0,
        stride_on=asked.stride_on or "3x3",
    )
    assert isinstance(config, P3DConfig), "the name is a P3D's"
    check_tensors(source, f"a 2-D ResNet-{depth} with {config.num_classes} classes", flat_shapes(config), tensors)
    means = (
        "temporal identity: sees frames, not motion"
        if asked.temporal == "identity"
        else f"temporal gaussian of std {GAUSSIAN_STD}, seed {asked.seed}: to be trained"
    )
    return assemble(
        source,
        config,
        asked.recipe or PORT_RGB,
        inflate(config, tensors, seed=asked.seed),
        class_names=asked.class_names or (),
        origin=f"inflated from ResNet-{depth} {path.name}, sha256 {sha256_of(path)}, {means}",
    )


def inflate(config: P3DConfig, tensors: Mapping[str, Tensor], *, seed: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a P3D: those of the 2-D network, plus identity or zero temporal ones, or gaussian with `seed`."""
    shapes = expected_shapes(config)
    state = {key: tensors[theirs].reshape(shapes[key]) for key, theirs in flat_names(config).items()}
    return state | (_still(config, shapes) if seed is None else _gaussian(shapes, seed))


def _load_with_lstm(path: Path, tensors: Mapping[str, Tensor], asked: ImportOptions) -> Weights:
    """The LSTM network `asked.name` on the 2-D network of `tensors`."""
    source, name, temporal, seed = str(path), str(asked.name), asked.temporal, asked.seed
    if temporal != "gaussian" or seed is None or not 0 <= seed < 10**18:
        raise WeightsError(
            f"{source} holds a 2-D ResNet without the LSTM of {name}: create one, to be trained, with `p3d weights "
            f"import {source} -o OUT.safetensors --model {name} --temporal gaussian --seed 0`, "
            f"not with {temporal = }, {seed = }"
        )
    names = asked.class_names or ()
    config = network_config(
        source,
        name,
        graph=asked.graph or "port",
        num_classes=len(names) or 400,
        stride_on=asked.stride_on or "3x3",
    )
    assert isinstance(config, LSTMConfig), "the name is of a network with an LSTM"
    shapes = {key: shape for key, shape in expected_shapes(config).items() if not _after_frames(key)}
    check_tensors(
        source, f"the frames of {name}", shapes, {key: tensors[key] for key in tensors if not key.startswith("fc.")}
    )
    return assemble(
        source,
        config,
        asked.recipe or zoo.recipe(name, config.graph),
        from_frames(config, tensors, seed=seed),
        class_names=names,
        origin=f"frames of {path.name}, sha256 {sha256_of(path)}, LSTM and classifier of seed {seed}: to be trained",
    )


def from_frames(config: LSTMConfig, tensors: Mapping[str, Tensor], *, seed: int) -> dict[str, Tensor]:
    """Every tensor of an LSTM network: those of the 2-D network, and the LSTM and classifier drawn from `seed`.

    Weights are nearly normal with the variance of torch's uniform ones, 1 / (3 hidden), on every machine the same.
    """
    state = {}
    for key, shape in expected_shapes(config).items():
        if not _after_frames(key):
            state[key] = tensors[key]
        elif len(shape) == 2:
            state[key] = torch.from_numpy(normal(key, shape, seed) / math.sqrt(3 * config.hidden)).float()
        else:
            state[key] = torch.zeros(shape)
            if "bias_ih" in key:  # gates are in torch's order: input, forget, cell, output
                state[key][config.hidden : 2 * config.hidden] = 1
    return state


def _after_frames(key: str) -> bool:
    """Whether a key of an LSTM network belongs to its LSTM or classifier."""
    return key.startswith(("lstm.", "fc."))


def flat_shapes(config: P3DConfig) -> dict[str, tuple[int, ...]]:
    """Every key of the 2-D network with its shape: ours, (Cout, Cin, 1, H, W), without the time axis."""
    shapes = expected_shapes(config)
    return {
        theirs: (*shapes[key][:2], *shapes[key][3:]) if len(shapes[key]) == 5 else shapes[key]
        for key, theirs in flat_names(config).items()
    }


def flat_names(config: P3DConfig) -> dict[str, str]:
    """Our key -> key of the 2-D network, for every tensor that both have (counters excluded)."""
    return {
        key: ".".join(_THEIRS.get(part, part) for part in key.split("."))
        for key in expected_shapes(config)
        if not _in_time(key)
    }


def _in_time(key: str) -> bool:
    """Whether one of our keys belongs to a temporal convolution or its normalisation."""
    return ".conv3." in key or ".bn3." in key


def _network(source: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
    """The depth of the 2-D network and the P3D it becomes, ("50", "p3d63"). Raises WeightsError for other networks."""
    if "conv1.weight" not in tensors:
        raise WeightsError(f"{source} holds a ResNet with a deep stem (conv1.0), which P3D does not have; {_WANTED}")
    firsts = [re.fullmatch(r"layer([1-4])\.\d+\.conv1\.weight", key) for key in tensors]
    stages = [first[1] for first in firsts if first]
    blocks = tuple(stages.count(stage) for stage in "1234")
    if blocks not in _DEPTHS or "layer1.0.conv3.weight" not in tensors:
        kind = "bottlenecks" if "layer1.0.conv3.weight" in tensors else "basic blocks"
        raise WeightsError(f"{source} holds a 2-D network of {blocks} {kind} per stage, which no P3D has; {_WANTED}")
    return _DEPTHS[blocks]


def _check_temporal(source: str, depth: str, temporal: str | None, seed: int | None) -> None:
    if temporal is None:
        raise WeightsError(
            f"{source} holds a 2-D ResNet-{depth}, which has no temporal filters: convert it to a P3D first with "
            f"`p3d weights import {source} -o OUT.safetensors` (in Python temporal='identity'); it will see frames, "
            "not motion"
        )
    if temporal not in TEMPORAL:
        raise WeightsError(f"{source}: temporal must be one of {', '.join(TEMPORAL)}, not {temporal!r}")
    if (seed is not None) != (temporal == "gaussian") or (seed is not None and not 0 <= seed < 10**18):
        raise WeightsError(
            f"{source}: gaussian temporal filters need a seed of 0 or more and identity takes none, not {seed = }"
        )


def _still(config: P3DConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The temporal tensors with which a block on equal frames computes the same as a 2-D bottleneck."""
    state = {}
    for stage, kinds in enumerate(config.stage_kinds(), 1):
        for i, kind in enumerate(kinds):
            key = f"layer{stage}.{i}.conv3.weight"
            weight = torch.zeros(shapes[key])
            if kind == "A" or (kind == "C" and config.graph == "caffe"):
                weight[:, :, 1, 0, 0] = torch.eye(len(weight))
            state[key] = weight
    return state | _normalisations(shapes, 1 - BN_EPS)


def _gaussian(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """The authors' initialisation, identical on every machine (bell-shaped, within 3.5 standard deviations)."""
    state = {
        key: torch.from_numpy(GAUSSIAN_STD * normal(key, shape, seed)).float()
        for key, shape in shapes.items()
        if _in_time(key) and key.endswith("conv3.weight")
    }
    return state | _normalisations(shapes, 1.0)


def _normalisations(shapes: Mapping[str, tuple[int, ...]], variance: float) -> dict[str, Tensor]:
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": variance}
    return {
        key: torch.full(shape, values[key.rpartition(".")[2]])
        for key, shape in shapes.items()
        if _in_time(key) and ".bn3." in key
    }
