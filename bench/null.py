"""`p3d launch` with a network that computes nothing: only decoding and orchestration are left.

    python -m bench.null launch SRC OUT ...

Two environment variables change what is measured: P3D_BENCH_GPUS=N declares N GPUs to Ray, on which nothing is
computed, and P3D_BENCH_READY=N replaces decoding by ready frames, N per video.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import ray

from p3d.jobs.cli import main
from p3d.jobs.planning import prepare
from p3d.jobs.scheduler import loop as scheduler
from p3d.jobs.worker import decoding
from p3d.jobs.worker.actor import Ready, ShardWorker
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD, DecodeSpec
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.networks.fused import keep_freed_memory
from p3d.pipeline.decode.blocks import MESSAGE_FRAMES
from p3d.pipeline.extract import plain_buffer
from p3d.pipeline.types import FLOAT32, INT64, UINT8, DecodeMessage, FrameBlock, VideoEnd, VideoInfo, VideoStart

GPUS, READY = "P3D_BENCH_GPUS", "P3D_BENCH_READY"
FPS = 25.0


class _NullEncoder:
    """An encoder whose features are all 1."""

    device, busy = "cpu", None
    new_buffer = staticmethod(plain_buffer)

    def __init__(self, batch_size: int, feature_dim: int) -> None:
        self.batch_size, self.feature_dim = batch_size, feature_dim

    def encode(self, frames_NHWC: UINT8, index_BT: INT64) -> FLOAT32:
        return np.ones((len(index_BT), self.feature_dim), np.float32)


class NullWorker(ShardWorker):
    """A worker without a network."""

    def setup(self) -> Ready:
        if GPUS not in os.environ:
            keep_freed_memory()  # as an Encoder on a CPU does
        if READY in os.environ:
            send_ready_frames()
        self.encoder: Any = _NullEncoder(self.spec.options.batch_size, self.spec.recipe.feature_dim)
        self.inference_threads = self.inference_threads_on("cuda" if GPUS in os.environ else "cpu")
        return Ready("cpu", platform.node(), os.getpid())


def send_ready_frames() -> None:
    """Let the decodes of this process send ready frames instead of decoding."""
    for name, task in (("_decode_video", ready_video), ("_decode_group", ready_group)):
        options: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": BLOCKS_AHEAD}
        setattr(decoding, name, ray.remote(num_cpus=1, max_retries=0, **options)(task))


def ready_video(_: Any, spec: DecodeSpec, *given: Any) -> Iterator[MessageBatch]:
    """The messages of one video."""
    yield from message_batches(ready_messages(spec))


def ready_group(videos: tuple[Any, ...], spec: DecodeSpec, *given: Any) -> Iterator[MessageBatch]:
    """The messages of several videos."""
    yield from message_batches((one for _ in videos for one in ready_messages(spec)), of_a_group=True)


def ready_messages(spec: DecodeSpec) -> Iterator[DecodeMessage]:
    n_frames, (height, width) = int(os.environ[READY]), spec.frames.crop_hw
    frames_NHWC = np.ones((MESSAGE_FRAMES, height, width, 3), np.uint8)
    yield VideoStart(os.getpid())
    yield VideoInfo(n_frames, 320, 240, 0, FPS, n_frames / FPS, "mp4", "h264", 0, "ready")
    for first in range(0, n_frames, MESSAGE_FRAMES):
        numbers_N = np.arange(first, min(first + MESSAGE_FRAMES, n_frames))
        yield FrameBlock(numbers_N, numbers_N / FPS, (numbers_N + 1) / FPS, frames_NHWC[: len(numbers_N)])
    yield VideoEnd(n_frames, n_frames / FPS)


def declare_gpus(n: int) -> None:
    """Let a launch of this process find `n` GPUs, and Ray give them to its workers."""
    ray.init = partial(ray.init, num_gpus=n)
    prepare.gpus_here = lambda: n
    prepare.kind_of_device = lambda *_: "cuda"


if __name__ == "__main__":
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    scheduler.ShardWorker = NullWorker  # type: ignore[misc]
    if GPUS in os.environ:
        declare_gpus(int(os.environ[GPUS]))
    main()
