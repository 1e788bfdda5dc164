"""The authors' `.caffemodel` files, read without Caffe.

    NetParameter { layer = 100: LayerParameter { name = 1, type = 2, blobs = 7: BlobProto { data = 5, shape = 7 } } }

A caffemodel is a protobuf message. Weights need only ten of its fields, so forty lines here parse them without a schema
and a library. Numbers are used in place, so memory holds the file once and the network once. Other fields (bottoms,
parameters, the custom `bn_param`) are skipped by their length.

Layers are named as in Caffe's ResNets: conv1, res2a_branch2a, res3b1_branch2b_t, fc_kinetics. The blocks of a stage are
a, b, c .. (ResNet-50) or a, b1, b2 .. (ResNet-101, -152). The normalisation of a layer has bn in place of res. It is
one layer "BN" of four blobs: slope, bias, mean, variance; epsilon 1e-5, no scale factor. Colours are BGR.
Source: caffe.proto (field numbers), the deploy prototxt and BN layer of the authors' release.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from p3d import zoo
from p3d.weights.recognise import recognise
from p3d.weights.record import ImportOptions, Weights, WeightsError, assemble

LARGEST_BYTES: Final = 1 << 30  # P3D-199 has 267 MB; protobuf itself is limited to 2 GiB
_MOST_FIELDS: Final = 1_000_000  # P3D-199 needs about ten thousand; limits the time that a malicious file can take
_MOST_DIMS: Final = 32  # Caffe's own limit

_NET_V1_LAYERS, _NET_LAYER = 2, 100
_LAYER_NAME, _LAYER_TYPE, _LAYER_BLOBS = 1, 2, 7
_BLOB_LEGACY_DIMS, _BLOB_DATA, _BLOB_SHAPE, _BLOB_DOUBLES = (1, 2, 3, 4), 5, 7, 8
_SHAPE_DIM = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_BLOCK: Final = re.compile(
    r"(?P<what>res|bn)(?P<stage>[2-5])(?:(?P<letter>[a-z])|b(?P<number>[1-9]\d?))_branch(?P<branch>1|2a|2b|2b_t|2c)"
)
_CLASSIFIER: Final = re.compile(r"fc(_\w+)?")
# branch -> our names of convolution and normalisation; in res5 the middle one is 2-D and called conv_normal
_BRANCHES: Final = {
    "1": ("downsample.0", "downsample.1"),
    "2a": ("conv1", "bn1"),
    "2b": ("conv2", "bn2"),
    "2b_t": ("conv3", "bn3"),
    "2c": ("conv4", "bn4"),
}
_MIDDLE_2D: Final = ("conv_normal", "bn_normal")
# layer type -> names of its blobs, in order
_BLOBS: Final = {
    "Convolution": ("weight",),
    "BN": ("weight", "bias", "running_mean", "running_var"),
    "InnerProduct": ("weight", "bias"),
}


class _DamageError(Exception):
    """The bytes are not a valid message of the expected type; the message says why."""


@dataclass(frozen=True, slots=True)
class Blob:
    """One array of a layer as stored: its dimensions as written, and its numbers as a flat tensor."""

    dims: tuple[int, ...]
    numbers: Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer's name and type, and its blobs in order; `blobs` is empty for layers without weights."""

    name: str
    kind: str
    blobs: tuple[Blob, ...]


def load(
    path: Path,
    asked: ImportOptions,
) -> Weights:
    """Load a caffemodel. The layer names identify the network; options not given in `asked` default to the authors'.

    Every blob is used exactly once. Raises WeightsError and OSError.
    """
    source = str(path)
    content = _content(path)
    try:
        layers = read_layers(content)
    except _DamageError as error:
        raise WeightsError(f"{path} is not a whole caffemodel ({error}); fetch it again") from error
    tensors = _named(source, layers)
    config = recognise(source, tensors, name=asked.name, graph=asked.graph or "caffe", stride_on=asked.stride_on)
    return assemble(
        source,
        config,
        asked.recipe or zoo.recipe(config.name, "caffe"),
        tensors,
        class_names=asked.class_names or (),
        origin=f"caffemodel {path.name}, sha256 {hashlib.sha256(content).hexdigest()}",
    )


def key_of(layer: str) -> str | None:
    """Our name of the module for a Caffe layer, or None if unknown: "res3b1_branch2a" is "layer2.1.conv1"."""
    fixed = {"conv1": "conv1_custom", "bn_conv1": "bn1"}.get(layer)
    if fixed or _CLASSIFIER.fullmatch(layer):
        return fixed or "fc"
    found = _BLOCK.fullmatch(layer)
    if not found:
        return None
    names = _MIDDLE_2D if found["stage"] + found["branch"] == "52b" else _BRANCHES[found["branch"]]
    block = int(found["number"]) if found["number"] else ord(found["letter"]) - ord("a")
    return f"layer{int(found['stage']) - 1}.{block}.{names[found['what'] == 'bn']}"


def _content(path: Path) -> memoryview:
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        raise WeightsError(
            f"{path} has {size} bytes, but a caffemodel may have at most {LARGEST_BYTES}; give a file of one network"
        )
    content = memoryview(bytearray(size))
    with path.open("rb") as file:
        if file.readinto(content) != size:
            raise WeightsError(f"{path} became shorter while it was read; try again when no process writes to it")
    return content


def _named(source: str, layers: list[Layer]) -> dict[str, Tensor]:
    """Every blob under our key for it, in our shape. Layers without blobs are skipped."""
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        if not layer.blobs:
            continue
        module, names = key_of(layer.name), _BLOBS.get(layer.kind, ())
        expected = "BN" if layer.name.startswith("bn") else "InnerProduct" if module == "fc" else "Convolution"
        if module is None or layer.kind != expected or len(layer.blobs) != len(names):
            raise WeightsError(
                f"{source} has {len(layer.blobs)} blobs in the layer {layer.name[:60]!r} of type {layer.kind[:60]!r}, "
                "which no P3D of the authors has; give their release, or a net finetuned from it"
            )
        for name, blob in zip(names, layer.blobs, strict=True):
            key = f"{module}.{name}"
            if key in tensors:
                raise WeightsError(f"{source} holds {key} twice, once in {layer.name[:60]}; give a file of one network")
            tensors[key] = blob.numbers.reshape(_our_dims(layer.kind, key, blob.dims))
    if not tensors:
        raise WeightsError(f"{source} holds no layers with weights; give a caffemodel, not a prototxt or solver state")
    return tensors


def _our_dims(kind: str, key: str, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Our shape of a blob, without the axes of size one that Caffe may have added.

    Vectors may be (1, C) or (1, C, 1, 1), and in the old four dimensions a matrix is preceded by ones. The authors'
    README calls all their blobs 5-D, so the 2-D filters of res5 may have a time axis.
    """
    if (kind == "BN" or key == "fc.bias") and sum(dim != 1 for dim in dims) <= 1:
        return (math.prod(dims),)
    if kind == "InnerProduct" and math.prod(dims[:-2]) == 1:
        return dims[-2:]
    if key.startswith("layer4.") and len(dims) == 5 and dims[2] == 1:
        return dims[:2] + dims[3:]
    return dims


def read_layers(content: memoryview) -> list[Layer]:
    """The layers of a NetParameter. Their numbers share memory with `content`. Raises _DamageError."""
    budget = [_MOST_FIELDS]
    layers = []
    for number, value in _fields(content, budget):
        if number == _NET_V1_LAYERS:
            raise _DamageError(
                "its layers are in the format from before 2014, which cannot hold a P3D: see Caffe's "
                "upgrade_net_proto_binary"
            )
        if number == _NET_LAYER:
            layers.append(_layer(_bytes(value), budget))
    return layers


def _layer(content: memoryview, budget: list[int]) -> Layer:
    name = kind = ""
    blobs = []
    for number, value in _fields(content, budget):
        if number == _LAYER_NAME:
            name = str(_bytes(value), "utf-8", "replace")
        elif number == _LAYER_TYPE:
            kind = str(_bytes(value), "utf-8", "replace")
        elif number == _LAYER_BLOBS:
            blobs.append(_blob(_bytes(value), budget))
    return Layer(name, kind, tuple(blobs))


def _blob(content: memoryview, budget: list[int]) -> Blob:
    """Parse a BlobProto. Raises _DamageError if its numbers and dimensions do not agree."""
    legacy: dict[int, int] = {}
    dims: tuple[int, ...] | None = None
    arrays: list[tuple[torch.dtype, memoryview]] = []
    for number, value in _fields(content, budget):
        if number in _BLOB_LEGACY_DIMS:
            legacy[number] = _number(value)
        elif number == _BLOB_SHAPE:
            dims = tuple(islice(_dims(_bytes(value), budget), _MOST_DIMS + 1))
        elif number == _BLOB_DATA:
            arrays.append((torch.float32, _bytes(value)))
        elif number == _BLOB_DOUBLES:
            arrays.append((torch.float64, _bytes(value)))
    if dims is None:
        dims = tuple(legacy.get(each, 1) for each in _BLOB_LEGACY_DIMS)
    if len(arrays) != 1:
        raise _DamageError(f"a blob has {len(arrays)} arrays instead of one")
    dtype, data = arrays[0]
    if not 1 <= len(dims) <= _MOST_DIMS or min(dims) < 1 or math.prod(dims) * dtype.itemsize != len(data):
        raise _DamageError(f"a blob of {len(data)} bytes claims to be {'x'.join(map(str, dims[:8]))} {dtype}")
    return Blob(dims, torch.frombuffer(data, dtype=dtype))


def _dims(content: memoryview, budget: list[int]) -> Iterator[int]:
    """A BlobShape's dimensions, stored packed or as single fields."""
    for number, value in _fields(content, budget):
        if number == _SHAPE_DIM and isinstance(value, int):
            yield value
        elif number == _SHAPE_DIM:
            packed, at = _bytes(value), 0
            while at < len(packed):
                dim, at = _varint(packed, at)
                yield dim


def _fields(content: memoryview, budget: list[int]) -> Iterator[tuple[int, int | memoryview]]:
    """The (number, value) pairs of a message: an int for a varint, else the bytes. Decrements `budget[0]` per field."""
    at, end = 0, len(content)
    while at < end:
        budget[0] -= 1
        if budget[0] < 0:
            raise _DamageError(f"it has more than {_MOST_FIELDS} fields")
        tag, at = _varint(content, at)
        number, wire = tag >> 3, tag & 7
        if not number:
            raise _DamageError("a field has no number")
        if wire == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(content, at)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise _DamageError(f"a field has the unknown wire type {wire}")
        if length > end - at:
            raise _DamageError("it ends within a field")
        yield number, content[at : at + length]
        at += length


def _varint(content: memoryview, at: int) -> tuple[int, int]:
    """A number of at most 64 bits, seven per byte, and the offset after it."""
    value = 0
    for shift, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at + shift + 1
    raise _DamageError("a number does not end")


def _bytes(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise _DamageError("a number was found where bytes were expected")
    return value


def _number(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise _DamageError("bytes were found where a number was expected")
    return value
