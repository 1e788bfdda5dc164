"""`p3d weights`: every known format can be imported, nothing is overwritten, and errors are one message."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

import p3d.weights
from p3d.jobs.cli.weights import FORMATS
from p3d.preprocessing import CAFFE_RGB, PORT_RGB, in_convention
from tests.jobs.test_cli import in_process
from tests.p3d.test_resnet import ResNet


@pytest.fixture(scope="module")
def flat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 2-D ResNet-50 with three classes, as torchvision saves it."""
    path = tmp_path_factory.mktemp("flat") / "resnet50.pth"
    torch.save(ResNet((3, 4, 6, 3), classes=3).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def port_file(real_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random weights of all tests as a checkpoint of the port."""
    path = tmp_path_factory.mktemp("port") / "p3d.pth.tar"
    torch.save({"state_dict": p3d.weights.load(real_weights).network.state_dict()}, path)
    return path


def test_a_2d_file_is_imported_with_a_warning_about_motion(flat_file: Path, tmp_path: Path) -> None:
    """The file is what the library makes; stderr has the warning; the same command again changes nothing."""
    out = tmp_path / "w.safetensors"
    code, shown, said = in_process("weights", "import", str(flat_file), "-o", str(out))
    assert code == 0, said
    assert "frames, not motion" in said
    assert "p3d63, graph port, stride on the 3x3" in shown
    made = p3d.weights.load(flat_file, temporal="identity")
    assert out.read_bytes() == p3d.weights.to_bytes(made)
    assert hashlib.sha256(out.read_bytes()).hexdigest() in shown
    assert in_process("weights", "import", str(flat_file), "-o", str(out))[0] == 0
    assert [each.name for each in tmp_path.iterdir()] == ["w.safetensors"]


def test_an_import_takes_every_option(flat_file: Path, tmp_path: Path) -> None:
    """Model, graph, stride, temporal, seed, order, range and class names are in the file, and in the JSON."""
    names = tmp_path / "names.txt"
    names.write_text("Katze\nHund\nKäfer\n", encoding="utf-8")
    out = tmp_path / "w.safetensors"
    words = (
        f"--model p3d63-b --graph caffe --stride-on 1x1 --temporal gaussian --seed 5 --range 255 --class-names {names}"
    )
    code, shown, said = in_process("weights", "import", str(flat_file), "-o", str(out), *words.split(), "--json")
    assert code == 0, said
    assert "random" in said
    record = json.loads(shown)
    weights = p3d.weights.load(out)
    config = weights.config
    assert (config.name, config.graph, config.stride_on) == ("p3d63-b", "caffe", "1x1")
    assert (record["network"], record["graph"], record["stride_on"]) == ("p3d63-b", "caffe", "1x1")
    assert weights.class_names == tuple(record["class_names"]) == ("Katze", "Hund", "Käfer")
    assert (weights.recipe.mean, weights.recipe.channel_order) == ((123.0, 117.0, 104.0), "rgb")
    assert "gaussian of std 0.001, seed 5" in weights.origin
    assert record["recipe"] == weights.recipe.to_dict()


def test_a_2d_file_stays_2d_where_that_network_is_named(flat_file: Path, tmp_path: Path) -> None:
    """--model resnet50 imports the 2-D network itself, without temporal filters and without a warning."""
    out = tmp_path / "w.safetensors"
    code, shown, said = in_process("weights", "import", str(flat_file), "-o", str(out), "--model", "resnet50")
    assert (code, said) == (0, "")
    assert p3d.weights.load(out).name == "resnet50"
    assert "sees frames" not in shown


def test_a_2d_file_becomes_an_lstm_where_that_network_is_named(flat_file: Path, tmp_path: Path) -> None:
    """--model resnet50-lstm needs a seed, adds an LSTM with the named classes, and warns that it is random."""
    names, out = tmp_path / "names.txt", tmp_path / "w.safetensors"
    names.write_text("left\nright\n")
    words = ("weights", "import", str(flat_file), "-o", str(out), "--model", "resnet50-lstm")
    code, _, said = in_process(*words)
    assert code == 2 and "--model resnet50-lstm --temporal gaussian --seed 0" in said
    code, shown, said = in_process(*words, "--temporal", "gaussian", "--seed", "0", "--class-names", str(names))
    assert code == 0 and "LSTM are random" in said and "called left .. right" in shown
    weights = p3d.weights.load(out)
    assert (weights.name, weights.config.num_classes) == ("resnet50-lstm", 2)


def test_a_checkpoint_of_the_port_is_imported(port_file: Path, real_weights: Path, tmp_path: Path) -> None:
    """The tensors are the checkpoint's, the convention is the requested one, and nothing is warned of."""
    out = tmp_path / "w.safetensors"
    words = ("--graph", "caffe", "--channel-order", "bgr", "--range", "255")
    code, _, said = in_process("weights", "import", str(port_file), "-o", str(out), *words)
    assert (code, said) == (0, "")
    weights = p3d.weights.load(out)
    assert (weights.config.graph, weights.recipe) == ("caffe", CAFFE_RGB)
    wanted = p3d.weights.load(real_weights).network.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in weights.network.state_dict().items())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("{flat} -o {here}/w.pth", "must end in .safetensors"),
        ("{flat} -o {here}/full.safetensors", "already exists with other content"),
        ("{flat} -o {here}/folder.safetensors", "already exists"),
        ("{flat} -o {here}/no/w.safetensors", "could not be written"),
        ("{flat} -o {here}/w.safetensors --temporal gaussian", "need a seed"),
        ("{flat} -o {here}/w.safetensors --seed 1", "identity takes none"),
        ("{flat} -o {here}/w.safetensors --model p3d199", "p3d199 was asked for"),
        ("{flat} -o {here}/w.safetensors --class-names {here}/two.txt", "3 classes but 2 names"),
        ("{flat} -o {here}/w.safetensors --class-names {here}/hole.txt", "no empty line"),
        ("{flat} -o {here}/w.safetensors --class-names {here}/bytes.txt", "UTF-8"),
        ("{port} -o {here}/w.safetensors --temporal identity", "temporal filters of its own"),
        ("{small} -o {here}/w.safetensors --graph port", "graph caffe and port was asked for"),
        ("{small} -o {here}/w.safetensors --range 1", "states that it takes bgr in 0..255"),
        ("{here}/two.txt -o {here}/w.safetensors", "has an unknown suffix"),
        ("{here}/none.pth -o {here}/w.safetensors", "there is no weights file"),
        ("{here}/cut.pth -o {here}/w.safetensors", "not a whole torch checkpoint"),
    ],
)
def test_what_cannot_be_imported_gives_one_message(
    flat_file: Path, port_file: Path, real_weights: Path, tmp_path: Path, words: str, says: str
) -> None:
    """Exit 2, one message, and no file changes."""
    for name, content in {"two.txt": b"a\nb\n", "hole.txt": b"a\n\nc\n", "bytes.txt": b"\xff\n"}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "full.safetensors").write_bytes(b"dear aunt")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "cut.pth").write_bytes(flat_file.read_bytes()[: 1 << 20])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = words.format(flat=flat_file, port=port_file, small=real_weights, here=tmp_path)
    code, out, err = in_process("weights", "import", *command.split())
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_launch_with_a_2d_file_names_the_import(flat_file: Path, archive: Path, tmp_path: Path) -> None:
    """A 2-D file is not used in a job without notice: exit 2, the import command in the message, no output."""
    code, _, err = in_process("launch", str(archive), str(tmp_path / "out"), "--weights", str(flat_file))
    assert code == 2
    assert f"p3d weights import {flat_file} -o OUT.safetensors" in err
    assert list(tmp_path.iterdir()) == []


def test_show_describes_each_format(flat_file: Path, port_file: Path, real_weights: Path) -> None:
    """Format, network, classes, recipe and sha256 of a 2-D file, a checkpoint and our own."""
    for path, *said in (
        (flat_file, "a 2-D ResNet", "p3d63, graph port, stride on the 3x3", "3, without names"),
        (port_file, "the PyTorch port", "p3d63, graph port, stride on the 1x1", "10, without names"),
        (
            real_weights,
            "our own .safetensors",
            "p3d63, graph caffe, stride on the 1x1",
            "10, called class 0 .. class 9",
        ),
    ):
        code, out, err = in_process("weights", "show", str(path))
        assert (code, err) == (0, "")
        for words in (*said, hashlib.sha256(path.read_bytes()).hexdigest()):
            assert words in out
    assert in_process("weights", "show", str(flat_file) + "x")[0] == 2


def test_every_format_has_a_description(tmp_path: Path) -> None:
    """`show` describes every format that `identify` may return."""
    path = tmp_path / "w.caffemodel"
    path.write_bytes(b"")
    assert {p3d.weights.identify(path).format, "native", "port", "resnet"} == FORMATS.keys()


def test_show_hints_at_range_and_motion(flat_file: Path, port_file: Path, real_weights: Path) -> None:
    """Weights of byte inputs contradict the assumed recipe of a checkpoint and fit their own. The filters of an
    inflated file look at one frame. JSON has the numbers."""
    assert "WARNING: bn1 fits inputs" in in_process("weights", "show", str(port_file))[1]
    own = in_process("weights", "show", str(real_weights))[1]
    assert "WARNING" not in own
    assert "13 of 13 temporal filters look at other frames" in own
    assert "no temporal filter looks at another frame" in in_process("weights", "show", str(flat_file))[1]
    record = json.loads(in_process("weights", "show", str(flat_file), "--json")[1])
    assert (record["format"], record["num_classes"]) == ("resnet", 3)
    assert record["hints"]["n_still"] == record["hints"]["n_untouched"] == record["hints"]["n_temporal"] == 13
    assert sum(record["hints"]["conv1_energy"]) == pytest.approx(1)


@pytest.mark.parametrize(
    ("order", "value_range", "mean"),
    [
        ("bgr", 255, (104, 117, 123)),
        ("rgb", 255, (123, 117, 104)),
        ("rgb", 1, (0.485, 0.456, 0.406)),
        ("bgr", 1, (0.406, 0.456, 0.485)),
    ],
)
def test_a_convention_keeps_frames_and_turns_colours(order: str, value_range: int, mean: tuple[float, ...]) -> None:
    """The mean stays with its channel in either order."""
    for recipe in (CAFFE_RGB, PORT_RGB):
        made = in_convention(recipe, channel_order=order, value_range=value_range)
        assert (made.channel_order, made.value_range, made.mean) == (order, value_range, mean)
        assert (made.crop_hw, made.resize_hw) == (recipe.crop_hw, recipe.resize_hw)
