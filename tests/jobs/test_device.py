"""A device that fails during a job: no video fails because of it, and a failed device is not used again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

import p3d.encoder
import p3d.jobs.scheduler.loop
import p3d.jobs.worker.actor
from p3d.device import BusyTime, DeviceFull
from p3d.jobs.cli import cli
from p3d.jobs.job import read_job
from p3d.jobs.machine import usable_cpus
from p3d.jobs.planning.prepare import default_batch
from p3d.jobs.worker import actor
from p3d.jobs.worker.actor import Ready, Refused, ShardError, ShardWorker, shard_error_of
from p3d.jobs.worker.autoscale import DecodeAutoscaler
from p3d.jobs.worker.concurrency import DecodeConcurrency, Use
from p3d.jobs.worker.decoding import DECODE_BYTES
from p3d.pipeline.dataset.verify import audit
from p3d.pipeline.extract import InferenceThreads
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import ShardPlan
from tests.sim.store import MemoryStore


def worker_that(mischief: Callable[[int], None], before_setup: Callable[[], None] = lambda: None) -> type[ShardWorker]:
    """A worker that calls `before_setup()` before its setup, and `mischief(its pid)` before every batch of a shard."""

    class Worker(ShardWorker):
        def setup(self):
            import os

            before_setup()
            ready = super().setup()
            if not isinstance(ready, Ready):
                return ready
            true = type(self.encoder)._encode

            def encode(encoder, *given):
                mischief(os.getpid())
                return true(encoder, *given)

            type(self.encoder)._encode = encode
            return ready

    return Worker


def launch(archive: Path, out: Path, weights: Path) -> int:
    words = ["launch", str(archive), str(out), "--weights", str(weights), "--shard-videos", "3"]
    words += ["--threads", str(usable_cpus())]  # so that there is only one inference thread
    return cli.main(words, standalone_mode=False)


@pytest.mark.fault(9, 10)
def test_a_device_that_fails_is_replaced_and_one_short_of_memory_continues(
    tmp_path: Path, archive: Path, small_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access a process is never used again: three workers are replaced. After an out-of-memory error
    half the batch is used, as the footers say. No video fails because of either. A worker whose device fails while it
    starts is replaced, too. At its end the run removes a partial
    file that a dead worker left after the first cleanup."""
    seen, out = tmp_path / "seen", tmp_path / "out"
    seen.mkdir()

    def mischief(pid: int) -> None:
        import torch

        used = {path.name for path in seen.iterdir()}
        if f"failed-{pid}" in used:
            (seen / f"reused-{pid}").touch()
        if len([name for name in used if name.startswith("failed")]) < 3:
            (seen / f"failed-{pid}").touch()
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        if "tight" not in used and list((out / "clips").glob("*")):  # a shard was done with full batches
            (seen / "tight").touch()
            (out / "_job" / "tmp" / "1-0123456789abcdef0123456789abcdef.tmp").write_bytes(b"PAR1")
            raise torch.OutOfMemoryError("CUDA out of memory")

    def before_setup() -> None:
        import torch

        import p3d.encoder

        def broken(*_: object, **__: object) -> None:
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")

        if not (seen / "setup").exists():
            (seen / "setup").touch()
            p3d.encoder.Encoder = broken

    monkeypatch.setattr(p3d.jobs.scheduler.loop, "ShardWorker", worker_that(mischief, before_setup))
    assert launch(archive, out, small_weights) == 0
    names = sorted(path.name.partition("-")[0] for path in seen.iterdir())
    assert names == ["failed"] * 3 + ["setup", "tight"]
    assert not list((out / "_job" / "tmp").glob("*"))
    store = open_store(str(out))
    found = audit(store, read_job(store))
    assert (found.ok, found.failed, found.damaged) == (12, 0, False)
    footers = [pq.read_metadata(path).metadata[b"p3d.stats"] for path in (out / "clips").iterdir()]
    whole = default_batch("cpu")
    assert {json.loads(footer)["batch_size"] for footer in footers} == {whole, whole // 2}


@pytest.mark.fault(10)
def test_a_device_that_failed_under_one_shard_computes_nothing_for_the_other() -> None:
    """The next batch of any shard is refused with the same error, and never reaches the device."""
    worker, calls = ShardWorker.__new__(ShardWorker), []
    worker.broken = None

    def encode(*given: object) -> tuple[str, str]:
        calls.append(given)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: device-side assert triggered")
        return "features", "probs"

    one, other = worker._trusted(encode), worker._trusted(encode)
    assert one(1, 1) == ("features", "probs")
    for shard in (other, one, other):
        with pytest.raises(RuntimeError, match="CUDA error"):
            shard(1, 1)
    assert len(calls) == 2


@pytest.mark.fault(10)
def test_nothing_is_committed_after_the_device_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard whose last batch was computed before the device failed under another shard is not committed either."""
    worker, lost = ShardWorker.__new__(ShardWorker), RuntimeError("CUDA error: device-side assert triggered")
    worker.concurrency, worker.in_hand, worker.broken, worker.scratch = DecodeConcurrency(1), {}, None, tmp_path
    worker.spec, worker.store = SimpleNamespace(decoding=None), MemoryStore()

    def extract(*_: object) -> None:
        worker.broken = lost

    monkeypatch.setattr(worker, "_extract", extract)
    monkeypatch.setattr(p3d.jobs.worker.actor, "commit_shard", lambda *_: pytest.fail("it was committed"))
    trouble = worker.run_shard(ShardPlan(1, "0" * 8, 0, ()), None)
    assert isinstance(trouble, ShardError) and trouble.kind == "device"


@pytest.mark.fault(9)
def test_no_memory_for_one_clip_stops_the_job_resumable() -> None:
    """All clips have one size, so no video causes this: the shard stays open and the job stops."""
    trouble = shard_error_of(DeviceFull("cuda cannot fit one clip of p3d63 in memory"))
    assert trouble.kind == "store" and "resume" in trouble.detail


@pytest.mark.fault(9)
def test_the_free_memory_of_a_gpu_limits_the_decodes_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the load asks for more. Where not even one decode fits, the worker is refused with the GPU's name."""
    worker = ShardWorker.__new__(ShardWorker)
    worker.spec = SimpleNamespace(recipe=SimpleNamespace(decoder="nvdec"), options=SimpleNamespace(workers_per_gpu=1))
    worker.concurrency, worker.in_hand, worker.inference_threads = DecodeConcurrency(32), {}, InferenceThreads(2)
    worker.autoscaler, worker.encoder = DecodeAutoscaler(32, 1), SimpleNamespace(busy=None)
    monkeypatch.setattr(actor, "gpu_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(actor, "free_bytes", lambda: (4 * DECODE_BYTES, 15 * 10**9))
    assert worker._limit_decodes() == ""
    assert worker.concurrency.n == 4
    worker.progress(most_decodes=32)
    assert worker.concurrency.n == worker.autoscaler.concurrency == 4
    monkeypatch.setattr(actor, "free_bytes", lambda: (10**9, 15 * 10**9))
    assert "NVIDIA T4: 1.0 of 15.0 GB are free next to the network" in worker._limit_decodes()


@pytest.mark.parametrize(
    ("text", "kind"),
    [("CUDA error: device-side assert triggered", "device"), ("mat1 and mat2 shapes cannot be multiplied", "internal")],
)
def test_older_torch_is_recognised_by_its_message(text: str, kind: str) -> None:
    """Where torch has no class for it, a device error is recognised by its message."""
    assert shard_error_of(RuntimeError(text)).kind == kind


@pytest.mark.parametrize(
    "error", [RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"), DeviceFull("cuda is full")]
)
def test_a_device_that_cannot_start_stops_the_job_with_its_words(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises in `setup` becomes the reason that the run ends with, and not the death of one worker after
    another. The text names the machine and what to check."""
    worker = ShardWorker.__new__(ShardWorker)
    worker.spec = SimpleNamespace(
        code=p3d.jobs.worker.actor.code_digest(),
        recipe=SimpleNamespace(decoder="auto", precision="fp32"),
        options=SimpleNamespace(device="cpu", batch_size=2, threads=1),
        golden=(),
        job_id="",
    )
    worker.store = None

    def no_encoder(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(p3d.encoder, "Encoder", no_encoder)
    monkeypatch.setattr(p3d.jobs.worker.actor, "stored_weights", lambda *_: None)
    refused = worker.setup()
    assert isinstance(refused, Refused) and not refused.outage
    assert refused.detail.startswith("the network could not be started on ") and str(error) in refused.detail
    assert "nvidia-smi" in refused.detail


def test_a_gpu_that_starves_does_not_count_as_busy() -> None:
    """Inference threads that gather frames or wait are under way while the GPU has nothing to do: by its own clock it
    computes a tenth of the time, so decoding is the limit and its concurrency is raised, not lowered."""
    worker = ShardWorker.__new__(ShardWorker)
    worker.inference_threads = SimpleNamespace(under_way=2, n=2)
    busy = BusyTime()
    worker.encoder, worker.sampled = SimpleNamespace(busy=busy), (time.monotonic() - 10, 0.0)
    busy.seconds = 1.0
    assert worker._inference() == pytest.approx(0.1, abs=0.01)
    autoscaler = DecodeAutoscaler(4, 1)
    use = Use(running=4, begun=4, at_work=4)
    for _ in range(5):
        n = autoscaler.sample(0.1, use, 8)
    assert n == 5
    worker.encoder = SimpleNamespace(busy=None)  # a CPU
    assert worker._inference() == 1.0
