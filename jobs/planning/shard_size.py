"""What a video costs one worker, estimated while a job is launched, so that a shard is about a minute of work.

    listing ──a few videos──> child process: clips, pixels to decode ─┐
    weights ──golden clip, timed──> clips/s of this machine's CPU ────┴──> ShardSizing, recorded in the plan

A shard is what an interrupt can lose. Where nothing is known, such as the speed of another machine or of a GPU, shards
have a fixed number of videos.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from p3d.jobs.machine import usable_cpus
from p3d.pipeline.clips.rules import Sampling, clip_spans, laid_over
from p3d.pipeline.dataset.plans import total_bytes
from p3d.pipeline.decode.child import in_a_child
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.errors import JobError, VideoError
from p3d.pipeline.recipe import PlanRecord, ShardSizing
from p3d.pipeline.storage.local import scratch_folder
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import Failure, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

SAMPLED = 16  # videos at most
LARGEST_DOWNLOAD = 32 * 1024**2  # bytes; a larger object on S3 is not sampled
LEAST_BYTES = 1024**2  # of all videos; fewer are not worth a probe
PROBE_S = 5.0  # for all of them; the child is killed then
WAIT_S = 1.0  # that a launch waits for the child, at most
PIXELS_PER_S = 250e6  # that one core decodes of common H.264 files, about; docs/explanation/performance.md
CPU = "cpu"
MEASURED_VIDEOS = 4096  # in a shard at most, if its seconds are known


@dataclass(frozen=True, slots=True)
class Cost:
    """What a video takes: its clips, and the pixels to decode for them."""

    size_bytes: int
    n_clips: int
    n_pixels: float


def costs(videos: list[VideoRef], sampling: Sampling, s3: StoreOptions, scratch: Path) -> Iterator[Cost]:
    """The cost of each video that can be read, from its container. Runs in a child process."""
    for video in videos:
        of_video = sampling.for_video(video.video_id)
        with contextlib.suppress(VideoError, JobError, OSError), local_file(video, s3, scratch) as path:
            seen = probe(path, DecodeLimits())
            n_clips = len(clip_spans(of_video, laid_over(of_video, seen.n_frames, seen.duration_s)))
            n_frames = min(seen.n_frames, n_clips * (of_video.span + seen.largest_gop))
            yield Cost(video.size_bytes, n_clips, float(n_frames) * seen.coded_width * seen.coded_height)


class Sample:
    """The costs of a few of the videos, probed by a child process while the launch goes on. A context manager.

    Nothing is probed if `sizing`, what is known without it, says enough.
    """

    def __init__(self, videos: pa.Table, sampling: Sampling, s3: StoreOptions, sizing: ShardSizing | None) -> None:
        self.found: list[Cost] = []
        self._sampling, self._s3, self._sizing = sampling, s3, sizing
        self._videos = _chosen(videos) if sizing is None else []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._probe, name="shard-size", daemon=True)

    def __enter__(self) -> Sample:
        if self._videos:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def sizing(self, clips_per_s: Callable[[], float], workers: int) -> ShardSizing:
        """What is known, else the sizing by the costs that are known within WAIT_S and the speed of this machine."""
        if self._sizing is not None or not self._videos:
            return self._sizing or ShardSizing()
        rate = clips_per_s()
        self._thread.join(WAIT_S)
        return sizing_of(self.found.copy(), self._sampling, workers=workers, cpus=usable_cpus(), clips_per_s=rate)

    def _probe(self) -> None:
        # what cannot be read here is not known, and the job itself reports it
        with contextlib.suppress(RuntimeError, JobError, OSError), scratch_folder("p3d-sample-") as scratch:
            given = (self._videos, self._sampling, self._s3, scratch)
            with contextlib.closing(in_a_child(costs, given, {}, timeout_s=PROBE_S, total_s=PROBE_S)) as found:
                for one in found:
                    if isinstance(one, Failure) or self._over.is_set():
                        break
                    self.found.append(one)


def _chosen(videos: pa.Table) -> list[VideoRef]:
    """Videos to probe, drawn with a fixed seed; none if their cost does not matter."""
    sizes_N = videos["size_bytes"].to_numpy()
    if len(sizes_N) < 2 or total_bytes(sizes_N) < LEAST_BYTES:
        return []
    drawn = np.random.default_rng(0).permutation(len(sizes_N))[: 8 * SAMPLED]
    refs = [VideoRef(**row) for row in videos.take(drawn).select(VideoRef.__slots__).to_pylist()]
    largest = {True: LARGEST_DOWNLOAD, False: math.inf}
    return [one for one in refs if 0 < one.size_bytes <= largest[one.uri.startswith("s3://")]][:SAMPLED]


def known_sizing(shard_videos: int | None, plans: Iterable[PlanRecord], device: str) -> ShardSizing | None:
    """The sizing that needs no measurement: as chosen, that of an earlier plan for this kind of device, or none.

    The speed of a device other than this machine's CPU is not measured. None if a measurement is worth its time.
    """
    if shard_videos is not None:
        return ShardSizing(shard_videos)
    earlier = [plan.sizing for plan in plans if plan.sizing.is_known and plan.sizing.device == device]
    return earlier[-1] if earlier else None if device == CPU else ShardSizing()


def sizing_of(found: list[Cost], sampling: Sampling, *, workers: int, cpus: int, clips_per_s: float) -> ShardSizing:
    """The sizing for workers that share the `cpus` cores of this machine, whose network does `clips_per_s` in all.

    The cost of a video is proportional to its size, or constant for a rule that takes a number of clips.
    """
    network_s = sum(one.n_clips for one in found) / clips_per_s
    decode_s = sum(one.n_pixels for one in found) / PIXELS_PER_S / cpus
    seconds, mb = (network_s + decode_s) * workers, sum(one.size_bytes for one in found) / 1e6
    return cpu_sizing(sampling, seconds, len(found), mb)


def cpu_sizing(sampling: Sampling, seconds: float, n_videos: int, mb: float) -> ShardSizing:
    """The sizing if `n_videos` videos of `mb` megabytes in all take `seconds` of one worker on a CPU."""
    if not seconds or not n_videos or not mb:
        return ShardSizing()
    if sampling.needs_the_count:
        return ShardSizing(MEASURED_VIDEOS, CPU, seconds_per_video=seconds / n_videos)
    return ShardSizing(MEASURED_VIDEOS, CPU, seconds_per_mb=seconds / mb)
