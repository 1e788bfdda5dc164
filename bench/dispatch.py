"""What it costs to give a video to a decode, and who pays: the worker that owns it, Ray, or the process that decodes.

    python -m bench.dispatch                1 and 8 workers, 2 000 videos of 10 MB and of 100 kB, stub decodes

The stubs send one clip of 8x8 pixels. Of files of 10 MB each is a task of its own; short ones go several to a task.
The workers read the real `worker.decoding.Decoding`; only the task is a stub. Each submits its own, so what a worker's
process pays bounds its videos/s wherever the decodes run, and workers add up; on this machine all share the cores. The
last row is submission alone: tasks that Ray can never place, so that nothing else is done for them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import bench.dispatch as me  # by name: functions of a main module could not be told to Ray by value
from bench.family import cpu_s
from bench.rounds import REPO, Report, Rounds, Spread, Table
from p3d.jobs.worker.decode_task import BLOCKS_AHEAD, DecodeSpec
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.pipeline.clips.rules import parse_sampling
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import (
    DecodeMessage,
    FrameBlock,
    FrameSpec,
    ShardPlan,
    VideoEnd,
    VideoInfo,
    VideoRef,
    VideoStart,
)

SHARD_VIDEOS = 64
LONG, SHORT = 10_000_000, 100_000  # bytes of a video
CONCURRENCY = 2  # decodes at a time of each worker
WHO = ("worker", "decode processes", "Ray's own")


def black(video: VideoRef) -> list[DecodeMessage]:
    """A video of one black clip of 8x8 pixels."""
    times = np.arange(16) / 25
    info = VideoInfo(16, 8, 8, 0, 25.0, 0.64, "mp4", "h264", 0, "none")
    block = FrameBlock(np.arange(16), times, times + 0.04, np.zeros((16, 8, 8, 3), np.uint8))
    return [VideoStart(os.getpid()), info, block, VideoEnd(16, 0.64)]


def nothing(video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Any = None) -> Iterator[MessageBatch]:
    """A stub of the task of one video."""
    yield from message_batches(black(video))


def nothing_of_a_run(
    videos: tuple[VideoRef, ...], spec: DecodeSpec, scratch: Path, note: Path
) -> Iterator[MessageBatch]:
    """A stub of the task of several."""
    yield from message_batches((message for video in videos for message in black(video)), of_a_group=True)


def shard(number: int, n_videos: int = SHARD_VIDEOS, size_bytes: int = LONG) -> ShardPlan:
    ids = [f"{number * n_videos + at:032x}" for at in range(n_videos)]
    refs = (VideoRef(i, f"a/folder/{i}.mp4", f"file:///archive/a/folder/{i}.mp4", "0" * 16, size_bytes) for i in ids)
    return ShardPlan(1, "0" * 8, number, tuple(refs))


def decode_spec() -> DecodeSpec:
    sampling = parse_sampling("every:16", clip_frames=16)
    frames = FrameSpec((160, 160), (182, 242))
    return DecodeSpec(
        frames, sampling, DecodePolicy("auto", "fail"), DecodeLimits(), StoreOptions(), CONCURRENCY, 300.0
    )


class Worker:
    """What a ShardWorker does for its decodes, and nothing else."""

    def __init__(self) -> None:
        import ray

        from p3d.jobs.worker import decoding

        remote = ray.remote(
            num_cpus=1, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=BLOCKS_AHEAD
        )
        decoding._decode_video, decoding._decode_group = remote(nothing), remote(nothing_of_a_run)
        self.task, self.decoding = decoding._decode_video, decoding.Decoding

    def pid(self) -> int:
        return os.getpid()

    def read(self, first: int, n_shards: int, size_bytes: int) -> int:
        """Decode so many shards, one after the other; how many videos ended."""
        ends = 0
        for number in range(first, first + n_shards):
            messages = self.decoding(shard(number, size_bytes=size_bytes), decode_spec(), Path("/tmp")).messages()
            ends += sum(isinstance(message, VideoEnd) for _, message in messages)
        return ends

    def submit(self, n_videos: int) -> float:
        """CPU seconds of this process for so many submissions that nobody can take."""
        task, spec, videos = self.task.options(num_cpus=1, resources={"nowhere": 1}), decode_spec(), shard(0, n_videos)
        started = time.process_time()
        refs = [task.remote(video, spec, Path("/tmp"), Path("/tmp/note"), None) for video in videos.videos]
        took = time.process_time() - started
        assert len(refs) == n_videos
        return took


def by_whom(pids: list[int]) -> dict[int, tuple[str, float]]:
    """Who each process is, and its CPU seconds so far; this process has no part in it."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            name = " ".join(child.cmdline())
            who = WHO[0] if child.pid in pids else WHO[1] if name.startswith("ray::") else WHO[2]
            found[child.pid] = (who, cpu_s(child.pid))
    return found


def once(workers: list[Any], pids: list[int], n_shards: int, size_bytes: int) -> dict[str, float]:
    """CPU ms a video by who took them, and videos/s, of these workers at the same time."""
    import ray

    before, started = by_whom(pids), time.perf_counter()
    each = n_shards // len(workers)
    ends = sum(ray.get([w.read.remote(at * each, each, size_bytes) for at, w in enumerate(workers)]))
    seconds, took = time.perf_counter() - started, dict.fromkeys(WHO, 0.0)
    for pid, (who, now) in by_whom(pids).items():
        took[who] += 1e3 * (now - before.get(pid, (who, 0.0))[1]) / ends
    assert ends == each * len(workers) * SHARD_VIDEOS, ends
    return took | {"videos/s": ends / seconds}


def main() -> int:
    import ray
    from ray import cloudpickle

    from p3d.jobs.scheduler.cluster import local_cluster

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--videos", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=4, help="that Ray is told of: so many decodes run at once")
    parser.add_argument("--out", type=Path, default=REPO / "bench" / "out")
    given = parser.parse_args()
    cloudpickle.register_pickle_by_value(me)
    report = Report("dispatch", "Videos given to decodes")
    cases = [(size_bytes, n) for size_bytes in (LONG, SHORT) for n in given.workers]
    found: dict[tuple[int, int], list[dict[str, float]]] = {case: [] for case in cases}
    alone = []
    with local_cluster(cpus=given.cpus):
        workers = [ray.remote(num_cpus=0)(me.Worker).remote() for _ in range(max(given.workers))]
        pids = ray.get([worker.pid.remote() for worker in workers])
        ray.get([worker.read.remote(0, 1, LONG) for worker in workers])  # every process is there
        for number in range(given.rounds):
            for size_bytes, n in cases:
                shards = -(-given.videos // SHARD_VIDEOS // n) * n
                got = once(workers[:n], pids, shards, size_bytes)
                found[size_bytes, n].append(got)
                print(f"round {number + 1}, {size_bytes} bytes, {n} workers: {got}", file=sys.stderr, flush=True)
        for _ in range(given.rounds):
            loner = ray.remote(num_cpus=0)(me.Worker).remote()
            alone.append(1e3 * ray.get(loner.submit.remote(given.videos)) / given.videos)
            ray.kill(loner)
    rows = []
    for (size_bytes, n), rounds in found.items():
        of = {name: [one[name] for one in rounds] for name in (*WHO, "videos/s")}
        bound = Spread.of(1e3 / one["worker"] for one in rounds)
        rows.append((f"{size_bytes / 1e6:g}", str(n), *(str(Spread.of(values)) for values in of.values()), str(bound)))
    columns = ("MB of a video", "workers", *WHO, "videos/s here", "videos/s of a core of one worker")
    report.add(Table("CPU ms a video", columns, tuple(rows)))
    rows = [("submission alone, CPU ms of the worker", str(Spread.of(alone)))]
    report.add(Table("A task", ("what", "figure"), tuple(rows), Rounds("ms", {"submission": tuple(alone)})))
    print(report.write(given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
