"""`p3d weights choose` finds the one convention under which weights classify labelled videos correctly."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import p3d.weights
from p3d import zoo
from p3d.encoder import Encoder
from p3d.jobs.cli import cli
from p3d.jobs.cli.choose_weights import _next
from p3d.jobs.planning.weights_convention import (
    Labelled,
    Trial,
    _decoded,
    _in_convention,
    _warnings,
    at_least,
    labelled_videos,
    sign_test,
)
from p3d.networks.network import GRAPHS
from p3d.pipeline.errors import InputError
from p3d.preprocessing import CHANNEL_ORDERS
from p3d.weights import Weights
from tests.zoo import corpus, make

NAMES = ("Riding a Bike", "diving", "juggling-balls")
TRUE = ("port", "rgb", 255)  # the only convention in which the test weights are right; their file states another


def textured(path: Path, seed: int) -> Path:
    """A video of moving coloured squares, different for each seed."""
    rng = np.random.default_rng(seed)
    squares = rng.integers(0, 256, (6, 9, 3), np.uint8).repeat(16, axis=0).repeat(16, axis=1)
    pictures = (np.ascontiguousarray(np.roll(squares, 2 * at, axis=1)) for at in range(20))
    return corpus.write(path, pictures, corpus.Codec("libx264", options={"preset": "ultrafast"}))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder per class: two videos of the first class, one of each other, and a broken one."""
    root = tmp_path_factory.mktemp("labelled")
    for label, name in enumerate(("riding_a_bike", "Diving", "juggling balls")):
        (root / name).mkdir()
        for at in range(2 if label == 0 else 1):
            textured(root / name / f"{at}.mp4", 10 * label + at)
    make.cut(root / "Diving" / "0.mp4", root / "Diving" / "broken.mp4", 0.2)
    return root


def planted(weights: Weights, videos: list[Labelled]) -> Weights:
    """The same network with a classifier that is right under TRUE and gives class 3 under all other conventions."""
    clips = [(one.label, found) for one, found in _decoded(weights, videos, 1, lambda _: None)]
    frames, index = np.concatenate([found[0] for _, found in clips]), np.arange(16 * len(clips)).reshape(-1, 16)
    features, wanted = [], []
    for convention in [(graph, order, value) for graph in GRAPHS for order in CHANNEL_ORDERS for value in (255, 1)]:
        features.append(Encoder(_in_convention(weights, *convention), batch_size=4, threads=1).encode(frames, index))
        wanted += [label if convention == TRUE else 3 for label, _ in clips]
    given = np.concatenate(features).astype(np.float64)
    given = np.c_[given, np.ones(len(given))]
    solved = np.linalg.lstsq(given, 20 * np.eye(4)[wanted], rcond=None)[0].T
    state = weights.network.state_dict()
    state["fc.weight"], state["fc.bias"] = torch.from_numpy(solved[:, :-1]), torch.from_numpy(solved[:, -1])
    network = weights.config.build().eval()
    network.load_state_dict(state)
    return dataclasses.replace(weights, network=network, class_names=(*NAMES, "nothing"))


@pytest.fixture(scope="module")
def weights() -> Weights:
    """A small network with the convention of P3D-63."""
    made = p3d.weights.random_weights("p3d-demo", 0, graph="caffe", num_classes=4)
    recipe = dataclasses.replace(zoo.recipe("p3d63", "caffe"), resize_hw=(72, 108), crop_hw=(64, 64))
    return dataclasses.replace(made, recipe=recipe)


def test_the_one_right_convention_is_found(
    folder: Path, weights: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights that are right in the port's graph with RGB bytes are recognised, whatever their file states."""
    file = tmp_path / "made.safetensors"
    videos = labelled_videos(str(folder), (*NAMES, "nothing"), 4, limit=40)
    p3d.weights.save(file, planted(weights, videos))
    words = ["weights", "choose", str(file), "--labelled", str(folder), "--clips", "1", "--device", "cpu", "--json"]
    assert cli.main(words, standalone_mode=False) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert (found["videos"], found["clips"], len(found["trials"])) == (4, 4, 8)
    assert "left out: Diving/broken.mp4: " in said.err
    best, *others = found["trials"]
    assert (best["graph"], best["channel_order"], best["value_range"], best["right"]) == (*TRUE, 4)
    assert [trial["right"] for trial in others] == [0] * 7
    assert found["next"] == (
        f"import the source of {file} (random:0) again, with --graph port --channel-order rgb --range 255"
    )
    (warning,) = found["warnings"]  # four videos are too few to be sure
    assert "p = 0.12, on 4 videos" in warning
    (tmp_path / "wrong.txt").write_text("\n".join(("nothing", *NAMES)))
    assert cli.main([*words, "--class-names", str(tmp_path / "wrong.txt")], standalone_mode=False) == 0
    assert json.loads(capsys.readouterr().out)["next"].startswith("undecided: nothing is better than chance")


def test_the_classes_take_turns(folder: Path) -> None:
    """A limit takes one of each class before a second of any; names match regardless of case and spaces."""
    found = labelled_videos(str(folder), NAMES, 3, limit=4)
    assert sorted(one.label for one in found[:3]) == [0, 1, 2]
    assert [one.label for one in found[3:]] == [1]


def test_a_list_with_a_column_of_labels(folder: Path, tmp_path: Path) -> None:
    """Labels may come from a list, and may be class numbers if there are no names."""
    table = tmp_path / "list.csv"
    table.write_text(f"path,label\n{folder / 'Diving' / '0.mp4'},2\n{folder / 'juggling balls' / '0.mp4'},0\n")
    assert [one.label for one in labelled_videos(str(table), (), 3, limit=9)] == [2, 0]


@pytest.mark.parametrize(
    ("names", "classes", "says"),
    [
        (("a", "b"), 2, "not a class of these weights; rename it"),
        ((), 400, "not a class number below 400; give their names with --class-names"),
        (("a", "b"), 3, "3 classes and 2 names"),
    ],
)
def test_labels_without_a_class_are_refused(folder: Path, names: tuple[str, ...], classes: int, says: str) -> None:
    """A label without a class is reported, with a remedy, before any video is decoded."""
    with pytest.raises(InputError, match=says):
        labelled_videos(str(folder), names, classes, limit=9)


def test_a_video_without_a_folder_has_no_label(folder: Path) -> None:
    """A folder of videos is not a folder of classes."""
    with pytest.raises(InputError, match="has no label"):
        labelled_videos(str(folder / "Diving"), NAMES, 3, limit=9)


def test_what_comes_next_depends_on_the_file(weights: Weights) -> None:
    """A checkpoint is imported under the best convention; a file that already states it needs nothing."""
    best = Trial("caffe", "bgr", 255, (True,))
    line = "p3d weights import 'a b.pth' -o OUT.safetensors --graph caffe --channel-order bgr --range 255"
    assert _next("a b.pth", weights, best) == line
    assert _next("own.safetensors", weights, best) == "nothing to do: own.safetensors already says so"


def trial(right: str) -> Trial:
    return Trial("caffe", "bgr", 255, tuple(letter == "y" for letter in right))


def test_an_uncertain_choice_gives_a_warning() -> None:
    """Few videos, or two conventions that are right on nearly the same ones, give a warning; a clear case does not."""
    assert _warnings([trial("yyyyyyyyyn"), trial("nnnnnnnnnn")], 400) == ()
    assert "by chance with p = 0.5" in _warnings([trial("yyyyyyyyyy"), trial("yyyyyyyynn")], 400)[0]
    assert "better than chance (1 of 4 right at 4 classes)" in _warnings([trial("ynnn"), trial("nnnn")], 4)[0]


def test_the_two_probabilities_are_the_textbooks() -> None:
    """10 coins: 8 or more heads in 56 of 1024 throws; 8 against 2 discordant videos is twice that (two-sided)."""
    assert at_least(8, 10, 0.5) == pytest.approx(56 / 1024)
    assert sign_test([True] * 8 + [False] * 2, [False] * 8 + [True] * 2) == pytest.approx(112 / 1024)
    assert sign_test([True, False], [True, False]) == 1
