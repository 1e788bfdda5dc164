"""A training gives the same bits however often it is stopped, and two processes give what one gives."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import multiprocessing

import p3d.weights
from p3d.encoder import Encoder
from p3d.jobs.scheduler import control
from p3d.jobs.training import checkpoints, evaluation, snapshot
from p3d.jobs.training.checkpoints import METRICS
from p3d.jobs.training.loop import Training
from p3d.jobs.training.network import frozen_norms, network_of
from p3d.jobs.training.options import LabelOptions, TrainOptions, TrainRun
from p3d.jobs.training.process import read_start, train
from p3d.jobs.training.pulse import Process
from p3d.jobs.training.record import TrainRecord, read_record, read_samples
from p3d.jobs.training.sampling import drawn
from p3d.jobs.training.snapshot import Stopped
from p3d.pipeline.errors import AlreadyRunning, DamagedJob, InputError, Unfinished
from p3d.pipeline.recipe import MaxFailures
from p3d.pipeline.storage.store import Store
from tests.training.conftest import OPTIONS, RUN, linked, planned, run_here

TESTED = ("clip_hit1", "video_hit1", "video_hit5")


class Killed(BaseException):
    """What stands for a process that ends without a word."""


def _until(stop: int) -> Callable[[Training, Any], tuple[bool, bool]]:
    """A step of a training whose process ends before step number `stop`."""
    step = Training._step

    def until(self: Training, clips: Any) -> tuple[bool, bool]:
        if self.step == stop:
            raise Killed
        return step(self, clips)

    return until


def result(store: Store) -> bytes:
    return store.read("weights.safetensors")


@pytest.fixture(scope="module")
def whole(motions: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A training that ran from its begin to its end."""
    store, record = planned(motions, tmp_path_factory.mktemp("whole") / "out")
    run_here(store, record)
    return store


def test_the_result_has_all_that_a_user_needs(whole: Store) -> None:
    """Weights with class names and origin, one row of metrics per step, one prediction per test video, no failure."""
    out = Path(whole.url)
    weights = p3d.weights.load(out / "weights.safetensors")
    assert weights.class_names == read_record(whole).class_names and len(weights.class_names) == 8
    assert "6 steps of 4 clips of 24 videos" in weights.origin and "of 8 test videos" in weights.origin
    metrics, predictions = pq.read_table(out / "metrics.parquet"), pq.read_table(out / "predictions.parquet")
    assert metrics["step"].to_pylist() == [1, 2, 3, 4, 5, 6] and metrics.column_names == list(METRICS)
    assert metrics["clips"].to_pylist() == [4] * 6 and metrics["epoch"].to_pylist()[-1] == 1.0
    assert sorted(predictions["label"].to_pylist()) == list(range(8))
    assert set(predictions["clips"].to_pylist()) == {2}
    (tested,) = pq.read_table(out / "tests.parquet").to_pylist()
    assert tested["video_hit1"] == np.mean([one == 0 for one in predictions["rank"].to_pylist()])
    assert pq.read_table(out / "failures.parquet").num_rows == 0
    now = snapshot.read(whole, 1)
    assert now is not None and (now.state, now.exit_code, now.step) == ("finished", 0, 6)


def test_the_predictions_are_those_of_the_file(whole: Store, motions: Path) -> None:
    """A job with the resulting file gives the same scores: the mean over uniform clips of the softmax."""
    from p3d import embed_file

    row = pq.read_table(Path(whole.url, "predictions.parquet")).to_pylist()[3]
    weights = p3d.weights.load(Path(whole.url, "weights.safetensors"))
    found = embed_file(motions / row["path"], weights, clips="uniform:2", scores=True, threads=1)
    mean_K = found.layers["prob"].mean(axis=0)
    assert int(mean_K.argmax()) == row["predicted"] and abs(float(mean_K.max()) - row["probability"]) < 1e-6


@pytest.mark.parametrize("stops", [(2,), (1, 3, 5)])
def test_a_resumed_training_gives_the_same_bits(
    whole: Store, motions: Path, tmp_path: Path, stops: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends without a word after any step loses nothing but the steps since its checkpoint."""

    store, record = planned(motions, tmp_path / "out")
    for stop in stops:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Training, "_step", _until(stop))
            run_here(store, record, replace(RUN, checkpoint_minutes=0.0))  # there is one after each step
        assert checkpoints.newest_step(store) == stop
    run_here(store, record)
    assert result(store) == result(whole)
    assert pq.read_table(Path(store.url, "metrics.parquet"))["loss"].equals(
        pq.read_table(Path(whole.url, "metrics.parquet"))["loss"]
    )


def test_a_damaged_checkpoint_is_not_used(whole: Store, motions: Path, tmp_path: Path) -> None:
    """An older one is; without another whole one there is an error that names the file."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=2))
    run_here(store, record, replace(RUN, checkpoint_minutes=0.0))
    first, second = sorted(Path(store.url, "_job/checkpoints").iterdir())
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    state = checkpoints.newest(store)
    assert state is not None and state.step == 1
    first.write_bytes(b"")
    with pytest.raises(DamagedJob, match=second.name):
        checkpoints.newest(store)


def test_a_request_to_stop_ends_after_a_step_with_a_checkpoint(motions: Path, tmp_path: Path) -> None:
    """The request of `p3d cancel` is seen, and the state of the last step is saved."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=100_000, schedule="constant"))
    seen = threading.Event()

    def ask() -> None:
        while not (now := snapshot.read(store, 1)) or now.step < 1:
            seen.wait(0.05)
        control.ask_cancel(store, 1, now=False)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Stopped):
        run_here(store, record)
    asking.join()
    state = checkpoints.newest(store)
    assert state is not None and state.step == len(state.metrics) >= 1


def test_a_run_that_is_taken_over_stops(motions: Path, tmp_path: Path) -> None:
    """A newer run has the output: the older one ends."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=100_000, schedule="constant"))
    control.claim(store, {}, takeover=True, say=lambda _: None)
    control.claim(store, {}, takeover=True, say=lambda _: None)
    with pytest.raises(AlreadyRunning):
        train(store.url, record, RUN, Process(0, 1, torch.device("cpu"), 1))


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_lost(motions: Path, tmp_path: Path) -> None:
    """The message has the step and the last good checkpoint, whose weights are finite."""
    options = replace(OPTIONS, steps=50, optimizer="sgd", lr=1e30, schedule="constant")
    store, record = planned(motions, tmp_path / "out", options)
    with pytest.raises(
        InputError,
        match=r"the loss or its gradient is (nan|inf) in step \d+.*last good checkpoint is that of step \d+.*--lr",
    ):
        run_here(store, record, replace(RUN, checkpoint_minutes=0.0))
    state = checkpoints.newest(store)
    assert state is not None and np.isfinite(state.metrics[:, 2]).all()


def _training_paths(store: Store, record: TrainRecord) -> list[str]:
    videos = read_samples(store, record)
    return videos.filter(pc.equal(videos["split"], "train"))["path"].to_pylist()


@pytest.mark.usefixtures("broken_children")
def test_broken_videos_are_named_and_nothing_else_is_lost(motions: Path, tmp_path: Path) -> None:
    """A crash, a hang and a broken file among the videos: each is a row of the failures, and the training ends well."""
    folder = linked(motions, tmp_path / "videos")
    for name in ("crash", "hang"):
        os.link(motions / "train/up/0000.mp4", folder / f"train/up/{name}.mp4")
    (folder / "train/down/broken.mp4").write_bytes(b"not a video")
    os.link(motions / "train/up/0000.mp4", folder / "test/up/crash.mp4")
    store, record = planned(folder, tmp_path / "out", replace(OPTIONS, steps=7))
    run_here(store, record, replace(RUN, video_timeout_s=8.0))
    rows = pq.read_table(Path(store.url, "failures.parquet")).to_pylist()
    assert {(row["path"], row["split"], row["reason"]) for row in rows} == {
        ("train/up/crash.mp4", "train", "decoder_crash"),
        ("train/up/hang.mp4", "train", "decode_timeout"),
        ("train/down/broken.mp4", "train", "not_a_video"),
        ("test/up/crash.mp4", "test", "decoder_crash"),
    }
    clips = pq.read_table(Path(store.url, "metrics.parquet"))["clips"].to_pylist()
    numbers = [drawn(0, position, 27)[1] for position in range(28)]
    broken = [
        at for at, path in enumerate(_training_paths(store, record)) if Path(path).stem in ("crash", "hang", "broken")
    ]
    assert sum(clips) == 28 - sum(number in broken for number in numbers)
    now = snapshot.read(store, 1)
    assert now is not None and (now.exit_code, now.failed) == (3, 4)


@pytest.mark.usefixtures("broken_children")
def test_a_video_that_fails_now_and_then_gives_the_same_bits(motions: Path, tmp_path: Path) -> None:
    """Clips are used by position, whatever the number of children, and however often the training was stopped."""
    folder = linked(motions, tmp_path / "videos")
    for number in range(3):  # each fails in every second epoch
        os.link(motions / "train/up/0000.mp4", folder / f"train/up/odd-{number}.mp4")
    results = set()
    for tasks, stops in ((1, ()), (3, ()), (2, (3, 5))):
        store, record = planned(folder, tmp_path / f"out-{tasks}", replace(OPTIONS, steps=16))
        run = replace(RUN, decode_tasks=tasks, checkpoint_minutes=0.0)
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
                patch.setattr(Training, "_step", _until(stop))
                run_here(store, record, run)
        run_here(store, record, run)
        results.add(result(store))
    assert len(results) == 1


def test_a_step_without_clips_changes_nothing(motions: Path, tmp_path: Path) -> None:
    """Its loss is unknown and not zero, and neither weights nor statistics change."""
    folder = tmp_path / "videos"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            (folder / name / f"{number}.mp4").write_bytes(b"not a video")
        os.link(motions / "train/up/0000.mp4", folder / name / "whole.mp4")
    options = replace(OPTIONS, steps=2, batch_size=1, optimizer="sgd")
    store, record = planned(folder, tmp_path / "out", options, labels=LabelOptions(holdout=0.0))
    run_here(store, record, replace(RUN, max_failures=MaxFailures(count=100)))
    metrics = pq.read_table(Path(store.url, "metrics.parquet")).to_pylist()
    empty = [row for row in metrics if not row["clips"]]
    assert empty and all(np.isnan(row["loss"]) for row in empty)
    if len(empty) == 2:
        start = read_start(store, record).network.state_dict()
        end = p3d.weights.load(Path(store.url, "weights.safetensors")).network.state_dict()
        assert all(torch.equal(start[key], end[key]) for key in start)


def test_a_kill_between_two_results_mixes_nothing(
    whole: Store, motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last test is made once, so that all results are of the same videos."""
    folder = linked(motions, tmp_path / "videos")
    store, record = planned(folder, tmp_path / "out")
    create = evaluation.create_table

    def until(store: Store, key: str, table: object) -> None:
        if key == "failures.parquet":
            raise Killed
        create(store, key, table)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluation, "create_table", until)
        run_here(store, record)
    for path in (folder / "test").rglob("*.mp4"):
        path.unlink()
    run_here(store, record)
    assert pq.read_table(Path(store.url, "predictions.parquet")).num_rows == 8
    assert pq.read_table(Path(store.url, "failures.parquet")).num_rows == 0
    assert b"of 8 test videos" in result(store)


def test_other_start_weights_are_refused(motions: Path, tmp_path: Path) -> None:
    """The start is that of the record, whose name is its digest."""
    store, record = planned(motions, tmp_path / "out")
    p3d.weights.save(Path(store.url, record.start_key), p3d.weights.random_weights("p3d-demo", 5, num_classes=8))
    with pytest.raises(DamagedJob, match="differs from its name"):
        run_here(store, record)


def test_a_test_now_and_then_is_kept(motions: Path, tmp_path: Path) -> None:
    """With `test_every` there is a row per test, also for one at the step of a checkpoint after which a kill came."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=5))
    run = replace(RUN, test_every=2, checkpoint_minutes=0.0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, "_step", _until(2))
        run_here(store, record, run)
    run_here(store, record, run)
    assert pq.read_table(Path(store.url, "tests.parquet"))["step"].to_pylist() == [2, 4, 5]


def test_too_many_failures_stop_the_training(motions: Path, tmp_path: Path) -> None:
    """More than the user allows end it, with a message that names one; the state is kept."""
    folder = linked(motions, tmp_path / "videos")
    for number in range(20):
        (folder / f"train/up/broken-{number}.mp4").write_bytes(b"not a video")
    store, record = planned(folder, tmp_path / "out", replace(OPTIONS, steps=40))
    with pytest.raises(
        Unfinished, match=r"3 of 44 training videos failed, such as .*broken.*not_a_video.*--max-failures"
    ):
        run_here(store, record, replace(RUN, max_failures=MaxFailures(count=2), micro_batch=1))
    assert checkpoints.newest_step(store) is not None


def _one_of_two(rank: int, port: int, url: str, record: TrainRecord, run: TrainRun) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    train(url, record, run, Process(rank, 2, torch.device("cpu"), 1))
    torch.distributed.destroy_process_group()


def test_two_processes_equal_one_with_twice_the_batch(motions: Path, tmp_path: Path) -> None:
    """Losses of 50 steps within 1e-4, with all normalisations frozen and no dropout; so do parts of a batch."""
    options = TrainOptions(
        steps=50,
        batch_size=4,
        lr=1e-3,
        optimizer="sgd",
        schedule="steps",
        lr_every=20,
        freeze="all-bn",
        dropout=0.0,
        test_clips=1,
    )
    losses = {}
    for name, run in (
        ("one", RUN),
        ("parts", replace(RUN, micro_batch=3)),
        ("two", replace(RUN, workers=2, micro_batch=2)),
    ):
        store, record = planned(motions, tmp_path / name, options)
        if run.workers == 1:
            run_here(store, record, run)
        else:
            control.claim(store, run.to_dict(), takeover=True, say=lambda _: None)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            multiprocessing.spawn(_one_of_two, (port, store.url, record, run), nprocs=2)
        losses[name] = pq.read_table(Path(store.url, "metrics.parquet"))["loss"].to_numpy()
        predictions = pq.read_table(Path(store.url, "predictions.parquet"))
        assert sorted(predictions["label"].to_pylist()) == list(range(8))
    assert np.abs(losses["two"] - losses["one"]).max() < 1e-4
    assert np.abs(losses["parts"] - losses["one"]).max() < 1e-4
    assert np.ptp(losses["one"]) > 0.1  # it does train


@pytest.mark.parametrize(("freeze", "trained_norms"), [("none", 26), ("bn", 1), ("all-bn", 0), ("backbone", 0)])
def test_what_is_frozen(freeze: str, trained_norms: int) -> None:
    """Frozen normalisations keep scale, shift and statistics; with `backbone` only the classifier is trained."""
    start = p3d.weights.random_weights("p3d-demo", 0)
    network = network_of(start, OPTIONS, freeze)
    norms = [one for one in network.modules() if isinstance(one, torch.nn.modules.batchnorm._BatchNorm)]
    frozen = list(frozen_norms(network, freeze))
    assert len(norms) - len(frozen) == (0 if freeze == "backbone" else min(trained_norms, len(norms)))
    if freeze == "backbone":
        assert {name for name, one in network.named_parameters() if one.requires_grad} == {"fc.weight", "fc.bias"}
    assert not any(one.requires_grad for norm in frozen for one in norm.parameters())


def test_frozen_statistics_do_not_change(motions: Path, tmp_path: Path) -> None:
    """After a training with frozen normalisations, all their tensors are those of the start."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=2, freeze="all-bn"))
    run_here(store, record)
    start = read_start(store, record).network.state_dict()
    end = p3d.weights.load(Path(store.url, "weights.safetensors")).network.state_dict()
    same = {key for key in start if torch.equal(start[key], end[key])}
    assert {key for key in start if ".bn" in key or key.startswith("bn1")} <= same
    assert "fc.weight" not in same and "conv1_custom.weight" not in same


def test_bf16_multiplies_with_fewer_digits(whole: Store, motions: Path, tmp_path: Path) -> None:
    """The first loss is near that of fp32 but not equal to it, and the result has fp32 weights that are finite."""
    store, record = planned(motions, tmp_path / "out", replace(OPTIONS, steps=1, precision="bf16"))
    run_here(store, record)
    (loss,) = pq.read_table(Path(store.url, "metrics.parquet"))["loss"].to_pylist()
    exact = pq.read_table(Path(whole.url, "metrics.parquet"))["loss"].to_pylist()[0]
    assert 0 < abs(loss - exact) < 0.2 * exact, (loss, exact)
    assert p3d.weights.load(Path(store.url, "weights.safetensors")).origin.startswith("trained by p3d")


def test_gradients_in_bf16_are_near_those_in_fp32(
    motions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No gradient contains what was in memory before, also where two frames are padded (see `pad_frames_first`)."""
    found = list[list[torch.Tensor]]()
    gradients = Training._gradients

    def kept(self: Training, *given: Any) -> tuple[float, float]:
        answer = gradients(self, *given)
        found.append([one.grad.flatten().clone() for one in self._trained if one.grad is not None])
        return answer

    monkeypatch.setattr(Training, "_gradients", kept)
    for precision in ("fp32", "bf16", "bf16"):
        options = replace(OPTIONS, steps=1, test_clips=1, precision=precision, freeze="all-bn")
        run_here(*planned(motions, tmp_path / str(len(found)), options))
    exact, first, second = found
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    near = [float(torch.cosine_similarity(one, other, dim=0)) for one, other in zip(first, exact, strict=True)]
    assert min(near) > 0.9, near


def test_the_weights_run_in_an_encoder(whole: Store) -> None:
    """Nothing of the training mode is left in the result."""
    weights = p3d.weights.load(Path(whole.url, "weights.safetensors"))
    frames = np.zeros((16, 64, 64, 3), np.uint8)
    index = np.arange(16, dtype=np.int64)[None]
    first, second = (Encoder(weights, batch_size=1).encode(frames, index) for _ in range(2))
    assert np.array_equal(first, second) and np.isfinite(first).all()
