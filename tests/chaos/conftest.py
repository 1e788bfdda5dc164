"""Fixtures: many short videos, the cheapest weights, and the dataset of an undisturbed job."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import p3d.weights
from tests.conftest import LONG, REPO
from tests.zoo import make

VIDEOS, SHARD_VIDEOS = (200, 8) if LONG else (48, 4)
SHARDS = VIDEOS // SHARD_VIDEOS
# the short form's network is so small that a shard needs more clips to last as long
NETWORK, CLIPS = ("p3d63-b", "every:16") if LONG else ("p3d-demo", "uniform:20")
FRAMES = (9, 12, 16, 20)


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights for the smallest clips that the network accepts: 64x64 pixels, no crop."""
    weights = p3d.weights.random_weights(NETWORK, 0, graph="caffe", num_classes=2)
    weights = replace(weights, recipe=replace(weights.recipe, resize_hw=(64, 64), crop_hw=(64, 64)))
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    p3d.weights.save(path, weights)
    return path


@pytest.fixture(scope="session")
def shorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many videos of 9 to 20 frames, 64x48."""
    root = tmp_path_factory.mktemp("shorts")
    for at in range(VIDEOS):
        n_frames = FRAMES[at % len(FRAMES)]
        make.video(root / f"{at:03d}.mp4", "libx264", n_frames, hw=(48, 64), options={"preset": "ultrafast"})
    return root


@pytest.fixture(scope="session")
def serial(tmp_path_factory: pytest.TempPathFactory, shorts: Path, tiny_weights: Path) -> Path:
    """The dataset of an undisturbed job, made in one process without Ray."""
    out = tmp_path_factory.mktemp("serial") / "out"
    command = [sys.executable, "-m", "tests.chaos.serial", shorts, out, tiny_weights, SHARD_VIDEOS, CLIPS]
    subprocess.run(list(map(str, command)), check=True, cwd=REPO)
    return out
