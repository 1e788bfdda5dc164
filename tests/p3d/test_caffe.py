"""The authors' caffemodels: every blob gets its key, and any other file is refused with one error message."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from p3d import zoo
from p3d.preprocessing import CAFFE_FLOW, CAFFE_RGB, PORT_RGB
from p3d.weights import WeightsError, caffe, load
from p3d.weights.record import expected_shapes
from tests import samples
from tests.p3d.caffe_writer import Row, blob, caffemodel, message, number, rows, tag, text, varint
from tests.p3d.tiny_nets import State, assert_bits_equal, drawn, state_of, tiny_zoo


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "w.caffemodel"
    path.write_bytes(content)
    return path


def tiny(name: str = "tiny", blocks: tuple[int, int, int, int] = (1, 1, 1, 1)) -> tuple[list[Row], State]:
    """The layers and numbers of a tiny network with three classes."""
    with tiny_zoo(blocks):
        config = zoo.config(name, num_classes=3)
        return list(rows(config)), drawn(config, 5)


def test_every_blob_of_the_authors_p3d199_has_the_key_of_the_published_table() -> None:
    """All 1012 (layer, type, blob, shape, key) rows agree with the reader, with the writer and with the network."""
    path = samples.need("spec/p3d199_caffe_map.tsv")
    table = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    shapes = expected_shapes(zoo.config("p3d199"))
    for layer, kind, at, shape, key in table:
        name = caffe._BLOBS[kind][int(at.removeprefix("blob"))]
        assert f"{caffe.key_of(layer)}.{name}" == key
        dims = tuple(map(int, shape.split("x")))
        assert caffe._our_dims(kind, key, dims) == shapes[key]
    assert sorted(row[4] for row in table) == sorted(shapes)
    written = [
        (row.name, row.kind, f"blob{at}", key) for row in rows(zoo.config("p3d199")) for at, key in enumerate(row.keys)
    ]
    assert sorted(written) == sorted((layer, kind, at, key) for layer, kind, at, _, key in table)


@pytest.mark.parametrize(("name", "numbered"), [("p3d63", False), ("p3d63", True), ("p3d131", True), ("p3d199", True)])
def test_layer_names_of_every_depth_give_every_key_once(name: str, numbered: bool) -> None:
    """Blocks may be counted a, b, c as in ResNet-50 or a, b1, b2 as in ResNet-101; both cover the network exactly."""
    config = zoo.config(name)
    keys = [
        f"{caffe.key_of(row.name)}.{blob}" for row in rows(config, numbered=numbered) for blob in caffe._BLOBS[row.kind]
    ]
    assert len(keys) == len(set(keys))
    assert set(keys) == expected_shapes(config).keys()


@pytest.mark.parametrize(
    "layer",
    "conv2 bn1 res1a_branch2a res6a_branch2a res3b0_branch2a res3c1_branch2a res3B_branch2a res3a_branch2d".split(),
)
def test_other_layer_names_have_no_key(layer: str) -> None:
    """The pattern matches the authors' names and no similar ones."""
    assert caffe.key_of(layer) is None


@pytest.mark.parametrize("vectors", ["1xC", "1xCx1x1", "C"])
@pytest.mark.parametrize(("old_dims", "doubles"), [(False, False), (True, False), (False, True)])
def test_blobs_in_every_form_that_caffe_stored_give_the_same_network(
    tmp_path: Path, vectors: str, old_dims: bool, doubles: bool
) -> None:
    """Dimensions as a list or as four numbers, vectors as rows, float32 or float64: the same bits."""
    layers, state = tiny()
    path = write(tmp_path, caffemodel(layers, state, vectors=vectors, old_dims=old_dims, doubles=doubles))
    with tiny_zoo():
        assert_bits_equal(state_of(load(path)), state)


def test_res5_may_be_stored_with_a_time_axis(tmp_path: Path) -> None:
    """2-D filters written as (out, in, 1, h, w) are the same filters."""
    layers, state = tiny()
    stored = {
        key: value.unsqueeze(2) if key.startswith("layer4") and value.ndim == 4 else value
        for key, value in state.items()
    }
    with tiny_zoo():
        assert_bits_equal(state_of(load(write(tmp_path, caffemodel(layers, stored)))), state)


@pytest.mark.parametrize(
    ("name", "classifier", "recipe"), [("tiny", "fc_sports1m", CAFFE_RGB), ("tiny-flow", "fc_kinetics", CAFFE_FLOW)]
)
def test_a_caffemodel_is_the_authors_graph_and_recipe(
    tmp_path: Path, name: str, classifier: str, recipe: object
) -> None:
    """Graph "caffe", BGR or flow according to the channels of conv1, and the classifier's number of classes."""
    with tiny_zoo():
        config = zoo.config(name, num_classes=4)
        path = write(tmp_path, caffemodel(list(rows(config, classifier)), drawn(config, 3)))
        weights = load(path)
        assert weights.config == dataclasses.replace(config, graph="caffe")
        assert weights.recipe == recipe
        assert weights.origin.startswith("caffemodel w.caffemodel, sha256 ")
        assert load(path, graph="port").recipe == recipe  # the recipe does not depend on the graph
        asked = load(path, graph="port", class_names=tuple("wxyz"), **({"recipe": PORT_RGB} if name == "tiny" else {}))
        assert (asked.config.graph, asked.class_names) == ("port", tuple("wxyz"))


def net_parameter() -> Any:
    """The protobuf library's NetParameter, with the fields that weights need."""
    file = descriptor_pb2.FileDescriptorProto(name="weights.proto", package="weights", syntax="proto2")
    kinds = descriptor_pb2.FieldDescriptorProto
    fields = {
        "BlobShape": [("dim", 1, kinds.TYPE_INT64, True, True, "")],
        "BlobProto": [
            *((axis, at, kinds.TYPE_INT32, False, False, "") for at, axis in enumerate(("n", "c", "h", "w"), start=1)),
            ("data", 5, kinds.TYPE_FLOAT, True, True, ""),
            ("shape", 7, kinds.TYPE_MESSAGE, False, False, "BlobShape"),
            ("double_data", 8, kinds.TYPE_DOUBLE, True, True, ""),
        ],
        "LayerParameter": [
            ("name", 1, kinds.TYPE_STRING, False, False, ""),
            ("type", 2, kinds.TYPE_STRING, False, False, ""),
            ("blobs", 7, kinds.TYPE_MESSAGE, True, False, "BlobProto"),
        ],
        "NetParameter": [("layer", 100, kinds.TYPE_MESSAGE, True, False, "LayerParameter")],
    }
    for message_name, found in fields.items():
        made = file.message_type.add(name=message_name)
        for field, at, kind, repeated, packed, type_name in found:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            one = made.field.add(name=field, number=at, type=kind, label=label)
            if packed:
                one.options.packed = True
            if type_name:
                one.type_name = f".weights.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("weights.NetParameter"))


@pytest.mark.parametrize("old_dims", [False, True])
def test_the_reader_sees_what_the_protobuf_library_sees(old_dims: bool) -> None:
    """In the writer's bytes and in the library's, both readers find the same layers, dimensions and numbers."""
    layers, state = tiny()
    written = caffemodel(layers, state, old_dims=old_dims)
    parsed = net_parameter().FromString(written)
    for content in (written, parsed.SerializeToString()):
        found = caffe.read_layers(memoryview(bytearray(content)))
        assert [(layer.name, layer.kind) for layer in found] == [(layer.name, layer.type) for layer in parsed.layer]
        for mine, its in zip(found, parsed.layer, strict=True):
            assert len(mine.blobs) == len(its.blobs)
            for one, other in zip(mine.blobs, its.blobs, strict=True):
                dims = other.shape.dim if other.HasField("shape") else (other.n, other.c, other.h, other.w)
                assert one.dims == tuple(dims)
                assert torch.equal(one.numbers, torch.tensor(list(other.data)))


def without(name: str) -> bytes:
    layers, state = tiny()
    return caffemodel([row for row in layers if row.name != name], state)


def with_layer(name: str, kind: str, *keys: str) -> bytes:
    layers, state = tiny()
    return caffemodel([*layers, Row(name, kind, keys)], state)


def with_tensor(key: str, tensor: torch.Tensor) -> bytes:
    layers, state = tiny()
    return caffemodel(layers, {**state, key: tensor})


def with_blob(content: bytes) -> bytes:
    """A layer whose only blob is these bytes."""
    return message(100, text(1, "conv1") + text(2, "Convolution") + message(7, content))


ONE = torch.ones(1)
DATA = message(5, struct.pack("<f", 1.0))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda: without("conv1"), r"no known P3D \(\(1, 1, 1, 1\) blocks per stage, 0 input"),
        (lambda: without("bn4a_branch2b_t"), "missing layer3.0.bn3.bias, layer3.0.bn3.running_mean"),
        (lambda: without("fc_kinetics"), "missing fc.bias, fc.weight"),
        (
            lambda: with_layer("res5a_branch2b_t", "Convolution", "layer3.0.conv3.weight"),
            "unexpected layer4.0.conv3.weight",
        ),
        (lambda: with_layer("res9a_branch2a", "Convolution", "fc.bias"), "1 blobs in the layer 'res9a_branch2a'"),
        (lambda: with_layer("fc_sports1m", "InnerProduct", "fc.weight", "fc.bias"), "holds fc.weight twice"),
        (lambda: with_layer("bn2a_branch2a", "BatchNorm", "fc.bias", "fc.bias", "fc.bias"), "of type 'BatchNorm'"),
        (lambda: with_layer("scale_conv1", "Scale", "fc.bias", "fc.bias"), "layer 'scale_conv1' of type 'Scale'"),
        (lambda: with_layer("bn2a_branch2a", "BN", "fc.bias", "fc.bias"), "2 blobs in the layer 'bn2a_branch2a'"),
        (lambda: with_tensor("bn1.bias", torch.ones(2)), r"mis-shaped bn1.bias \(2 for 1\)"),
        (
            lambda: with_tensor("layer1.0.conv2.weight", torch.ones(1, 1, 3, 3)),
            r"conv2.weight \(1x1x3x3 for 1x1x1x3x3\)",
        ),
        (lambda: with_tensor("bn1.bias", torch.tensor([float("nan")])), "not finite in bn1.bias"),
        (lambda: with_tensor("bn1.bias", torch.tensor([float("inf")])), "not finite in bn1.bias"),
        (
            lambda: message(2, message(6, blob((1,), ONE))),
            "not a whole caffemodel .*before 2014.*upgrade_net_proto_binary",
        ),
        (lambda: message(100, text(1, "data") + text(2, "Data")), "no layers with weights"),
        (lambda: b"", "no layers with weights"),
        (lambda: message(1, bytes(100)), "no layers with weights"),
        (lambda: with_blob(message(7, message(1, varint(1)))), "0 arrays instead of one"),
        (lambda: with_blob(blob((1,), ONE) + blob((1,), ONE, doubles=True)), "2 arrays instead of one"),
        (lambda: with_blob(DATA + message(7, message(1, varint(2)))), "4 bytes claims to be 2 torch.float32"),
        (lambda: with_blob(DATA + message(7, message(1, varint(0)))), "4 bytes claims to be 0"),
        (lambda: with_blob(DATA + message(7, message(1, varint((1 << 64) - 1)))), "4 bytes claims to be 1844"),
        (lambda: with_blob(DATA + message(7, message(1, varint(1) * 33))), "4 bytes claims to be 1x1"),
        (lambda: with_blob(DATA + number(7, 1)), "a number was found where bytes were expected"),
        (lambda: with_blob(DATA + message(1, b"x")), "bytes were found where a number was expected"),
        (lambda: tag(100, 2) + varint(1 << 40), "ends within a field"),
        (lambda: tag(100, 2) + b"\xff" * 10, "a number does not end"),
        (lambda: tag(9, 3), "the unknown wire type 3"),
        (lambda: tag(0, 0) + b"\1", "a field has no number"),
        (lambda: b"hello world, this is text\n" * 40, "not a whole caffemodel"),
    ],
)
@pytest.mark.fault(48)
def test_a_caffemodel_that_does_not_fit_is_refused(tmp_path: Path, content: Callable[[], bytes], reason: str) -> None:
    """Missing, extra, repeated, mis-shaped or foreign layers and broken bytes are named in the error with the file."""
    path = write(tmp_path, content())
    with tiny_zoo(), pytest.raises(WeightsError, match=rf"w\.caffemodel .*({reason})"):
        load(path)
    assert list(tmp_path.iterdir()) == [path]


def test_every_truncation_of_a_caffemodel_is_refused(tmp_path: Path) -> None:
    """Wherever the file ends early, also between two layers, the error says what is missing."""
    layers, state = tiny()
    whole = caffemodel(layers, state)
    needed = whole.rindex(b"fc_kinetics_relu") - 4  # past it come layers without weights
    for size in range(0, needed, 37):
        with tiny_zoo(), pytest.raises(WeightsError, match=r"w\.caffemodel "):
            load(write(tmp_path, whole[:size]))


@pytest.mark.fault(48)
def test_a_caffemodel_without_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file larger than any P3D is refused unread, and parsing stops after a million fields."""
    layers, state = tiny()
    path = write(tmp_path, caffemodel(layers, state))
    monkeypatch.setattr(caffe, "LARGEST_BYTES", path.stat().st_size - 1)
    with pytest.raises(WeightsError, match=r"w\.caffemodel has \d+ bytes, but a caffemodel may have at most"):
        load(path)
    monkeypatch.undo()
    with pytest.raises(WeightsError, match="more than 1000000 fields"):
        load(write(tmp_path, number(1, 1) * 1_000_001))
