"""The commands of docs/how-to/train.md, on made videos in the layout of UCF101 and a ResNet-50 of random weights."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from p3d import zoo
from tests.conftest import REPO, p3d
from tests.zoo import make

PAGE = (REPO / "docs/how-to/train.md").read_text()
CLASSES = ("ApplyEyeMakeup", "YoYo")
SHORT = "--steps 1 --batch-size 2 --micro-batch 2 --test-clips 1 --threads 2".split()


def commands(heading: str) -> list[list[str]]:
    """The p3d commands of the first code block below a heading, as words."""
    block = re.search(r"```[^\n]*\n(.*?)```", PAGE.partition(heading)[2], re.S)
    assert block is not None
    return [shlex.split(line)[1:] for line in block[1].splitlines() if line.startswith("p3d ")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the downloads of the page leave in a folder."""
    home = tmp_path_factory.mktemp("home")
    lists = home / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{at} {name}\n" for at, name in enumerate(CLASSES, 1)))
    train, test = [], []
    for at, name in enumerate(CLASSES, 1):
        (home / "UCF-101" / name).mkdir(parents=True)
        for group in (1, 2, 3):
            video = f"{name}/v_{name}_g0{group}_c01.avi"
            make.video(home / "UCF-101" / video, "mpeg4", 20, hw=(240, 320))
            (test if group == 1 else train).append(f"{video}\n" if group == 1 else f"{video} {at}\n")
    (lists / "trainlist01.txt").write_text("".join(train))
    (lists / "testlist01.txt").write_text("".join(test))
    network = zoo.build("resnet50", graph="port", stride_on="3x3", num_classes=5)
    torch.save(network.state_dict(), home / "resnet50.pth")
    return home


def test_ucf101_from_its_lists_to_hit_at_1(home: Path) -> None:
    """The page's command trains on the official split, and tests on the other part."""
    (words,) = commands("## UCF101")
    ran = p3d(*words, *SHORT, cwd=home)
    assert ran.code == 0, ran.err
    assert "4 training videos and 2 test videos of 2 classes" in ran.err and "video hit@1" in ran.err
    predictions = pq.read_table(home / "ucf101/predictions.parquet")
    assert predictions["path"].to_pylist() == [f"{name}/v_{name}_g01_c01.avi" for name in CLASSES]


def test_every_command_of_the_page_is_one_of_the_program() -> None:
    """Each option that the page names is in the help of `p3d train`."""
    helped = p3d("train", "--help").out
    for flag in set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--watch", "--weights", "--scores"}:
        assert flag in helped, flag
