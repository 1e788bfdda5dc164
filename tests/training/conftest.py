"""Small labelled videos, and trainings that run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from demo.train import make_videos
from p3d.jobs.scheduler import control
from p3d.jobs.training.options import LabelOptions, TrainOptions, TrainRun
from p3d.jobs.training.plan import TrainSpec, plan
from p3d.jobs.training.process import train
from p3d.jobs.training.pulse import Process
from p3d.jobs.training.record import TrainRecord
from p3d.pipeline.storage.store import DEFAULTS, Store
from p3d.pipeline.storage.urls import open_store

# a few steps of the network of the demo: seconds on one core
OPTIONS = TrainOptions(steps=6, batch_size=4, optimizer="adamw", lr=3e-3, schedule="one-cycle", test_clips=2)
RUN = TrainRun(workers=1, device="cpu", threads=1, micro_batch=4, decode_tasks=1)
# the name of a file says what breaks its decode; children read the sitecustomize of a folder on their path
BREAK = """
import faulthandler, threading
import p3d.pipeline.decode.messages as messages
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import Failure
whole = messages.decode_messages
def decode_messages(video, *given, **named):
    if "crash" in video.path:
        faulthandler._sigsegv()
    if "odd" in video.path and given[1].seed is not None and given[1].seed % 2:
        yield Failure(Reason.CORRUPT_FRAMES, "in this epoch")
        return
    if "hang" in video.path:
        threading.Event().wait()
    yield from whole(video, *given, **named)
messages.decode_messages = decode_messages
"""


@pytest.fixture(scope="session")
def motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of eight motions: three of each to train on, one to test."""
    folder = tmp_path_factory.mktemp("motions")
    make_videos(folder, train=3, test=1, n_frames=24)
    return folder


def linked(motions: Path, folder: Path) -> Path:
    """The same videos in a folder of its own, to which a test adds others."""
    for path in motions.rglob("*.mp4"):
        to = folder / path.relative_to(motions)
        to.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, to)
    return folder


@pytest.fixture
def broken_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children that decode a video with crash or hang in its path crash or hang."""
    folder = tmp_path / "on-path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BREAK)
    monkeypatch.syspath_prepend(str(folder))


def planned(src: Path, out: Path, options: TrainOptions = OPTIONS, **spec: object) -> tuple[Store, TrainRecord]:
    """A training of random weights at an output, ready to run."""
    store = open_store(str(out), DEFAULTS)
    given = TrainSpec(str(src), "random:0", "p3d-demo", None, LabelOptions(), options)
    return store, plan(store, replace(given, **spec), DEFAULTS, lambda _: None)


def run_here(store: Store, record: TrainRecord, run: TrainRun = RUN) -> None:
    """Run a training in this process, as one of its own would."""
    epoch = control.claim(store, run.to_dict(), takeover=True, say=lambda _: None)
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        train(store.url, record, run, Process(0, 1, torch.device("cpu"), epoch.number))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


Planned = Callable[..., tuple[Store, TrainRecord]]
