"""One process of a training, from its start to the results. Ray Train starts it (`run`), and so may a test."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import p3d.weights
from p3d.device import set_tf32
from p3d.jobs.training.evaluation import finish, test
from p3d.jobs.training.loop import Training
from p3d.jobs.training.options import TrainRun
from p3d.jobs.training.pulse import Process, Pulse
from p3d.jobs.training.record import RESTORE, TrainRecord, read_samples
from p3d.networks.fused import keep_freed_memory
from p3d.pipeline.dataset.files import local_path, sha256_of
from p3d.pipeline.errors import DamagedJob
from p3d.pipeline.storage.store import Store
from p3d.pipeline.storage.urls import open_store
from p3d.weights import Weights


def train(url: str, record: TrainRecord, run: TrainRun, process: Process) -> None:
    """Train from the newest checkpoint to the last step, test, and write what rank 0 writes. JobError, Stopped.

    `url` is the output, reached by the store options of `run`.
    """
    store = open_store(url, run.s3)
    _prepare(run, process)
    start = read_start(store, record)
    with tempfile.TemporaryDirectory(prefix="p3d-train-") as scratch, Pulse(store, process) as pulse:
        videos = read_samples(store, record)
        training = Training(store, record, run, process, start, videos, Path(scratch), pulse)
        training.train(test)
        finish(training)


def read_start(store: Store, record: TrainRecord) -> Weights:
    """The weights that a training starts from. DamagedJob if they are not those of its record."""
    with local_path(store, record.start_key) as path:
        if sha256_of(path) != record.start_sha256:
            raise DamagedJob(f"{store.url}/{record.start_key} is damaged: its sha256 differs from its name; {RESTORE}")
        return p3d.weights.load(path)


def _prepare(run: TrainRun, process: Process) -> None:
    """Settings of this process: threads, and arithmetic that gives equal bits on a CPU."""
    if process.device.type == "cpu":
        torch.set_num_threads(run.threads)
        torch.use_deterministic_algorithms(True)
        keep_freed_memory()
    if process.device.type == "cuda":
        torch.cuda.set_device(process.device)
        set_tf32(False)
