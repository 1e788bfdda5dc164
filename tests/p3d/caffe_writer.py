"""Writes `.caffemodel` bytes field by field from the specification, independently of the reader.

The layers are in the order of the authors' prototxt, interleaved with layers without weights. Each layer also has
fields that a reader of weights does not need.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from p3d.networks.model import P3DConfig


@dataclass(frozen=True, slots=True)
class Row:
    """One layer with weights: its name and type, and the key of each of its blobs."""

    name: str
    kind: str
    keys: tuple[str, ...]


def rows(config: P3DConfig, classifier: str = "fc_kinetics", numbered: bool = True) -> Iterator[Row]:
    """The layers of a network; `numbered` counts blocks a, b1, b2 .. in res3 and res4 as Caffe's ResNet-101 does."""
    yield Row("conv1", "Convolution", ("conv1_custom.weight",))
    yield _norm("bn_conv1", "bn1")
    for stage, count in enumerate(config.blocks, start=2):
        for block in range(count):
            plain = "abcdefghijklmnopqrstuvwxyz"[block] if block < 26 else "?"
            place = f"b{block}" if numbered and block and stage in (3, 4) else plain
            yield from _block(f"{stage}{place}", f"layer{stage - 1}.{block}", first=block == 0, flat=stage == 5)
    yield Row(classifier, "InnerProduct", ("fc.weight", "fc.bias"))


def _block(place: str, ours: str, first: bool, flat: bool) -> Iterator[Row]:
    pairs = [("2a", "conv1", "bn1")]
    pairs += [("2b", "conv_normal", "bn_normal")] if flat else [("2b", "conv2", "bn2"), ("2b_t", "conv3", "bn3")]
    pairs += [("2c", "conv4", "bn4")]
    if first:
        pairs = [("1", "downsample.0", "downsample.1"), *pairs]
    for branch, conv, norm in pairs:
        yield Row(f"res{place}_branch{branch}", "Convolution", (f"{ours}.{conv}.weight",))
        yield _norm(f"bn{place}_branch{branch}", f"{ours}.{norm}")


def _norm(name: str, ours: str) -> Row:
    return Row(name, "BN", tuple(f"{ours}.{what}" for what in ("weight", "bias", "running_mean", "running_var")))


def caffemodel(
    layers: Sequence[Row],
    state: Mapping[str, torch.Tensor],
    *,
    vectors: str = "1xC",
    old_dims: bool = False,
    doubles: bool = False,
) -> bytes:
    """A NetParameter. `vectors` stores vectors such as slopes as "1xC", "1xCx1x1" or "C"; `old_dims` uses the four
    numbers from before 2015 for at most four dimensions; `doubles` stores float64."""
    parts = [text(1, "P3D"), message(100, text(1, "data") + text(2, "VideoData"))]
    for row in layers:
        blobs = b""
        for key in row.keys:
            tensor = state[key]
            blobs += message(7, blob(_dims(key, row.kind, tensor, vectors, old_dims), tensor, old_dims, doubles))
        # bottom = 3, top = 4, param = 6, and a custom parameter with fields of every wire type
        extras = text(3, "below") + text(4, row.name) + message(6, number(1, 7))
        custom = message(140, number(1, 1) + tag(2, 5) + struct.pack("<f", 0.9) + tag(3, 1) + struct.pack("<d", 0.1))
        parts.append(message(100, text(1, row.name) + text(2, row.kind) + extras + blobs + custom))
        parts.append(message(100, text(1, f"{row.name}_relu") + text(2, "ReLU") + text(3, row.name)))
    return b"".join([*parts, message(100, text(1, "prob") + text(2, "Softmax"))])


def _dims(key: str, kind: str, tensor: torch.Tensor, vectors: str, old_dims: bool) -> tuple[int, ...]:
    dims = tuple(tensor.shape)
    if kind == "BN":
        return {"1xC": (1, *dims), "1xCx1x1": (1, *dims, 1, 1), "C": dims}[vectors]
    return (1,) * (4 - len(dims)) + dims if old_dims and len(dims) < 4 else dims


def blob(dims: Sequence[int], tensor: torch.Tensor, old_dims: bool = False, doubles: bool = False) -> bytes:
    values = tensor.flatten().tolist()
    data = struct.pack(f"<{len(values)}{'d' if doubles else 'f'}", *values)
    if old_dims and len(dims) <= 4:
        padded = (*dims, 1, 1, 1, 1)[:4]
        shape = b"".join(number(field, dim) for field, dim in enumerate(padded, start=1))
    else:
        shape = message(7, message(1, b"".join(varint(dim) for dim in dims)))
    return message(8 if doubles else 5, data) + shape


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def tag(field: int, wire: int) -> bytes:
    return varint(field << 3 | wire)


def number(field: int, value: int) -> bytes:
    return tag(field, 0) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return tag(field, 2) + varint(len(content)) + content


def text(field: int, value: str) -> bytes:
    return message(field, value.encode())
