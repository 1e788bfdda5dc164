"""ShardWorker: the Ray actor that owns a device and turns shards into committed rows.

driver ──run_shard──> ShardWorker ──submits, streams from──> decode_video (`p3d.jobs.worker.decoding`)
                          │ encode, commit
                          └──────> Done | Trouble
"""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from p3d.jobs.job import read_job, stored_weights
from p3d.jobs.machine import code_digest, gpu_software, inference_threads_of, software, usable_cpus
from p3d.jobs.worker.autoscale import DecodeAutoscaler, Load
from p3d.jobs.worker.concurrency import DecodeConcurrency, Withdrawn
from p3d.jobs.worker.decode_task import DecodeSpec
from p3d.jobs.worker.decoding import DECODE_BYTES, Decoding, decodes_that_fit
from p3d.jobs.worker.encode import encode_of
from p3d.pipeline.dataset.commit import clips_key, commit_shard, derive
from p3d.pipeline.dataset.totals import Ended, ended
from p3d.pipeline.decode.routes.nvdec import free_bytes, gpu_name, not_here, sample_problem
from p3d.pipeline.errors import JobError, NodeFault, StoreDenied, StoreError, StoreUnknown
from p3d.pipeline.extract import Encode, InferenceThreads, Progress, extract_shard
from p3d.pipeline.recipe import Recipe, RunOptions
from p3d.pipeline.storage.urls import open_store
from p3d.pipeline.types import FLOAT32, INT64, UINT8, ShardPlan, ShardRows

if TYPE_CHECKING:
    from p3d.device import BusyTime

SHOWN = 300  # characters of an error of the device


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a worker needs to start, on any machine."""

    out_url: str
    recipe: Recipe
    options: RunOptions
    golden: tuple[float, ...]
    code: str
    scratch: str
    job_id: str = ""  # of the driver's job.json; empty for a job that has none

    @property
    def decoding(self) -> DecodeSpec:
        """The part that concerns decoding."""
        recipe, options = self.recipe, self.options
        return DecodeSpec(
            recipe.frame_spec,
            recipe.sampling,
            recipe.decode_policy,
            options.decode_limits,
            options.s3,
            options.decode_tasks,
            options.video_timeout_s,
            options.max_decode_memory,
            options.workers_per_gpu,
        )


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that can be used: its device, host and process."""

    device: str
    host: str
    pid: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A worker that must not be used, and why. `outage` is true if the only reason is a store that did not answer."""

    detail: str
    outage: bool = False


@dataclass(frozen=True, slots=True)
class Spent:
    """What a shard took: its last counters, seconds, and the bytes of its videos (read) and rows (written).

    `fetch_s` and `decode_s` are sums over all its decodes.
    """

    progress: Progress
    fetch_s: float
    decode_s: float
    commit_s: float
    shard_s: float
    read_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """A shard that is committed, with its derived files. How each of its videos ended, and what it took."""

    videos: tuple[Ended, ...]
    spent: Spent


@dataclass(frozen=True, slots=True)
class ShardError:
    """A shard or a setup that is not done, while the worker is still alive.

    Kinds are those of `scheduler.state.ShardTrouble`. One more is `device`: the device context of this process can no
    longer be trusted, so the worker must end.
    """

    kind: str
    detail: str


def is_of_device(error: Exception) -> bool:
    """Is this a device error, after which the device can no longer be used in this process?"""
    detail = f"{type(error).__name__}: {error}"  # torch < 2.8 has no class for it, only a message
    return type(error).__name__ == "AcceleratorError" or detail.startswith("RuntimeError: CUDA error")


def shard_error_of(error: Exception) -> ShardError:
    """Classify an exception that a shard raised: what it means for the shard and its worker."""
    from p3d.device import DeviceFull, NoKernel

    match error:
        case StoreUnknown() | StoreDenied():
            return ShardError("outage", str(error))
        case StoreError() | NodeFault():
            return ShardError("store", str(error))
        case JobError():
            return ShardError("job", str(error))
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or tempfile.gettempdir()
            return ShardError("store", f"{platform.node()}: {where}: the disk is full; free some space and resume")
        case DeviceFull() | NoKernel():
            return ShardError("store", f"{platform.node()}: {error}. Free its memory, then resume")
    detail = f"{type(error).__name__}: {error}"
    if is_of_device(error):
        return ShardError("device", f"{platform.node()}: {detail}")
    return ShardError("internal", detail)


class ShardWorker:
    """The actor that owns a device: decodes, encodes and commits shards.

    It may process several at once, each in its own thread (one more thread is needed for `progress`). They share the
    concurrent decodes, where older shards have priority, and the inference threads.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.spec = spec
        self.store = open_store(spec.out_url, spec.options.s3)
        self.concurrency = DecodeConcurrency(spec.options.decode_tasks)
        # a worker that is alone on its machine need not leave cores to other workers
        self.autoscaler = DecodeAutoscaler(self.concurrency.n, 1 if spec.options.workers > 1 else self.concurrency.n)
        self.in_hand: dict[tuple[int, int], Progress] = {}  # (plan_seq, shard) -> its counters so far
        self.sampled = (time.monotonic(), 0.0)  # when the GPU's busy time was last read, and its seconds
        self.most_decodes = self.concurrency.n  # of NVDEC at a time, by the free memory of the GPU
        self.software = software()
        self.broken: Exception | None = None  # the device error after which nothing is computed or committed
        here = Path(spec.scratch).is_dir()  # the run's folder, if this is the driver's machine
        home = spec.scratch if here else None
        self.scratch = Path(tempfile.mkdtemp(prefix="p3d-worker-", dir=home))

    def setup(self) -> Ready | Refused | ShardError:
        """Load the weights, and check the code version and the device. Without this the network is not used."""
        from p3d.device import device_for, is_full
        from p3d.encoder import Encoder, GoldenMismatch, check_golden

        if code_digest() != self.spec.code:
            return Refused(
                f"the worker on {platform.node()} imports other code of p3d, pipeline or jobs than the driver; "
                "install the same version there, and check that no other folder with one of these names is on its path"
            )
        nvdec = self.spec.recipe.decoder == "nvdec"
        if nvdec and (why := not_here() or sample_problem()):
            return Refused(f"--decoder nvdec on {platform.node()}: {why}")
        try:
            device = str(device_for(self.spec.options.device))
            self.encoder = Encoder(
                stored_weights(self.store, self.spec.recipe),
                device=device,
                batch_size=self.spec.options.batch_size,
                threads=self.spec.options.threads if device == "cpu" else None,
                precision=self.spec.recipe.precision,
            )
            self.inference_threads = self.inference_threads_on(device)
            golden_D = np.array(self.spec.golden, np.float32)
            # in every thread, since each chooses cuDNN's algorithms for itself
            self.inference_threads.run_in_each(lambda: check_golden(self.encoder, golden_D))
            if nvdec and (why := self._limit_decodes()):
                return Refused(f"--decoder nvdec on {platform.node()}: {why}")
            if nvdec or device.startswith("cuda"):
                self.software |= gpu_software(gpu_name())
            self.store.hold_to("job.json")
            if self.spec.job_id and read_job(self.store).job_id != self.spec.job_id:
                return Refused(f"{self.store.url} on {platform.node()} is the output of another job than on the driver")
        except (StoreUnknown, StoreDenied) as error:
            return Refused(str(error), outage=True)
        except (GoldenMismatch, ValueError, JobError) as error:
            return Refused(str(error))
        except RuntimeError as error:
            if is_of_device(error) and not is_full(error):
                return shard_error_of(error)
            return Refused(
                f"the network could not be started on {platform.node()}: {' '.join(str(error).split())[:SHOWN]}. Check "
                "the GPU with `nvidia-smi`, the driver and the build of torch there, or choose another --precision or "
                "--device"
            )
        return Ready(device, platform.node(), os.getpid())

    def inference_threads_on(self, device: str) -> InferenceThreads:
        """As many as fit on this worker's share of the machine."""
        n = inference_threads_of(device, usable_cpus() // self.spec.options.workers, self.spec.options.threads)
        return InferenceThreads(n, self.encoder.new_buffer)

    def _limit_decodes(self) -> str:
        """Lower the number of concurrent decodes to what fits next to the network. Why none does, in words; else empty.

        Each inference thread has computed a batch already, and torch has kept its memory.
        """
        free, total = free_bytes()
        fit = decodes_that_fit(free // self.spec.options.workers_per_gpu)
        if not fit:
            space = f"{max(free, 0) / 1e9:.1f} of {total / 1e9:.1f} GB are free next to the network"
            return f"{gpu_name()}: {space}, and a decode takes {DECODE_BYTES / 1e9:.1f}; use a smaller --batch-size"
        self.most_decodes = min(fit, self.concurrency.n)
        self.concurrency.resize(self.most_decodes)
        self.autoscaler.concurrency = self.most_decodes
        return ""

    def run_shard(self, shard: ShardPlan, user_columns: pa.Table, moved: ShardPlan | None = None) -> Done | ShardError:
        """Compute and commit a shard. Any error is returned as a record, never raised.

        `moved` is the shard with its videos as they are to be opened, if they have moved since they were planned.
        """
        progress = self.in_hand[shard.plan_seq, shard.shard] = Progress()
        try:
            if (earlier := self._committed(shard, user_columns)) is not None:
                return earlier
            with self.concurrency.turn() as turn:
                turn.await_turn()
                started, decoding = time.monotonic(), Decoding(moved or shard, self.spec.decoding, self.scratch, turn)
                rows = self._extract(shard, decoding, progress)
            if self.broken is not None:  # the device failed under another shard
                raise self.broken
            computed = time.monotonic()
            committed = commit_shard(self.store, rows, self.spec.recipe, user_columns)
            now = time.monotonic()
            times = (decoding.fetch_s, decoding.decode_s, now - computed, now - started)
        except Withdrawn:
            return ShardError("withdrawn", "not started")
        except Exception as error:  # noqa: BLE001 - the worker's boundary: the scheduler retries, counts and reports
            return shard_error_of(error)
        finally:
            del self.in_hand[shard.plan_seq, shard.shard]
        read_bytes = sum(max(video.size_bytes, 0) for video in shard.videos)
        return Done(ended(committed.outcomes), Spent(progress, *times, read_bytes, committed.size_bytes))

    def _committed(self, shard: ShardPlan, user_columns: pa.Table) -> Done | None:
        """What a run has committed that ended before it could tell, or another run; None if the shard is to do."""
        if self.store.head(clips_key(shard.name)) is None:
            return None
        found = derive(self.store, shard, self.spec.recipe, user_columns)
        return Done(ended(found.outcomes), Spent(Progress(), 0.0, 0.0, 0.0, 0.0, 0, found.size_bytes))

    def _extract(self, shard: ShardPlan, decoding: Decoding, progress: Progress) -> ShardRows:
        started, recipe = time.monotonic(), self.spec.recipe
        with contextlib.closing(decoding.messages()) as messages:
            rows = extract_shard(
                shard,
                messages,
                self._trusted(encode_of(self.encoder, recipe)),
                sampling=recipe.sampling,
                batch_size=self.spec.options.batch_size,
                feature_dim=recipe.feature_dim,
                n_scores=recipe.n_scores,
                embedding_dtype=recipe.embedding_dtype,
                progress=progress,
                inference_threads=self.inference_threads,
            )
        rows.stats.update(self._stats(progress, time.monotonic() - started))
        return rows

    def _trusted(self, encode: Encode) -> Encode:
        """`encode`, but it raises once the device has failed, whichever shard the failure came from."""

        def trusted(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
            if self.broken is not None:
                raise self.broken
            try:
                return encode(frames_NHWC, index_BT)
            except Exception as error:
                if is_of_device(error):
                    self.broken = error
                raise

        return trusted

    def drain(self) -> None:
        """Start no further shard. Shards that have not started are returned to the scheduler."""
        self.concurrency.drain()

    def progress(self, most_decodes: int) -> tuple[dict[tuple[int, int], Progress], Load]:
        """The counters so far of the current shards, by (plan_seq, shard), and the load of the worker.

        Also adjusts the number of concurrent decodes to the load, to at most `most_decodes`.
        """
        if self.spec.recipe.decoder == "nvdec":
            most_decodes = min(most_decodes, self.most_decodes)
        self.concurrency.resize(self.autoscaler.sample(self._inference(), self.concurrency.use, most_decodes))
        return self.in_hand.copy(), self.autoscaler.load

    def _inference(self) -> float:
        """The share of its capacity, 0 to 1, that inference uses.

        On a CPU, of the inference threads, now. On a GPU, of the time since the last call, by the GPU's own clock: a
        thread that gathers frames or waits for the interpreter is busy while the GPU has nothing to do.
        """
        busy: BusyTime | None = self.encoder.busy
        if busy is None:
            return min(self.inference_threads.under_way / self.inference_threads.n, 1.0)
        (then, before_s), self.sampled = self.sampled, (time.monotonic(), busy.seconds)
        return min((busy.seconds - before_s) / max(self.sampled[0] - then, 1e-3), 1.0)

    def _stats(self, progress: Progress, seconds: float) -> dict[str, Any]:
        """What goes into the shard's footer: seconds by stage, counts, and the settings in effect."""
        realised = {"device": str(self.encoder.device), "host": platform.node(), "pid": os.getpid()}
        realised |= {
            "batch_size": self.encoder.batch_size,
            "inference_threads": self.inference_threads.n,
            "software": self.software,
        }
        options = {"threads": self.spec.options.threads, "decode_tasks": self.concurrency.n}
        when = {
            "ended": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds"),
            "shard_s": round(seconds, 3),
        }
        return {**asdict(progress), **when, **realised, **options}
