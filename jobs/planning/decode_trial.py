"""Decode a few videos to measure what decoding an archive costs, for `p3d plan`.

    estimate ──videos──> one child per core: decode_messages, keeps the frames of one clip ──pickles──> Tried

A decoder may crash or hang, so it runs in child processes. They are killed when the time is up, and videos finished by
then count. A video that crashes its child has failed, and another child decodes the rest. They run concurrently, as
decodes do in a job, and report the CPU seconds of each video.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.child import in_a_child
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import JobError, Reason
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import UINT8, Failure, FrameBlock, FrameSpec, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy


@dataclass(frozen=True, slots=True)
class Tried:
    """One video: CPU seconds of its decode, and the result. `frames_NHWC` (uint8) are the frames of its first clip."""

    video: VideoRef
    cpu_s: float
    info: VideoInfo | None
    end: VideoEnd | Failure
    frames_NHWC: UINT8


@dataclass(frozen=True, slots=True)
class How:
    """The decode settings of a job."""

    frames: FrameSpec
    sampling: Sampling
    policy: DecodePolicy
    store_options: StoreOptions


def trial(
    videos: list[VideoRef], how: How, *, children: int, longest_s: float, on_done: Callable[[], None] = lambda: None
) -> list[Tried]:
    """Decode videos in parallel children, and return those that ended within `longest_s` seconds.

    `on_done` is called after each video, by any thread.
    """
    with TemporaryDirectory(prefix="p3d-plan-") as scratch, ThreadPoolExecutor(children) as pool:
        shares = [videos[at::children] for at in range(min(children, len(videos)))]
        ends = time.monotonic() + longest_s

        def run(share: list[VideoRef]) -> list[Tried]:
            done: list[Tried] = []
            with contextlib.suppress(RuntimeError, JobError):
                while len(done) < len(share) and (left_s := ends - time.monotonic()) > 0:
                    for one in _in_child(share[len(done) :], how, scratch, left_s):
                        done.append(one)
                        on_done()
                    if time.monotonic() >= ends:
                        break
            return done

        return [one for done in pool.map(run, shares) for one in done]


def _in_child(videos: list[VideoRef], how: How, scratch: str, longest_s: float) -> Iterator[Tried]:
    """Decode videos in one child until all are done, the time is up, or one has crashed it, which is the last then."""
    given = (videos, how, Path(scratch))
    left = iter(videos)
    with closing(in_a_child(decode_and_time, given, {}, timeout_s=longest_s, total_s=longest_s)) as tried:
        for one in tried:
            video = next(left)
            if not isinstance(one, Failure):
                yield one
            elif one.reason != Reason.DECODE_TIMEOUT:  # that is the time of the trial
                yield Tried(video, 0.0, None, one, np.empty((0, *how.frames.crop_hw, 3), np.uint8))


def decode_and_time(videos: list[VideoRef], how: How, scratch: Path) -> Iterator[Tried]:
    """Each video, decoded in this process. The first is decoded twice, because libraries load slowly."""
    _decode(videos[0], how, scratch)
    for video in videos:
        yield _decode(video, how, scratch)


def _decode(video: VideoRef, how: How, scratch: Path) -> Tried:
    started = time.process_time()
    info: VideoInfo | None = None
    end: VideoEnd | Failure = Failure(Reason.NO_FRAMES, "the decoder sent no result")
    frames: list[UINT8] = []
    for message in decode_messages(
        video,
        how.frames,
        how.sampling,
        policy=how.policy,
        limits=DecodeLimits(),
        store_options=how.store_options,
        scratch=scratch,
    ):
        match message:
            case VideoInfo():
                info, frames = message, []
            case FrameBlock():
                frames.extend(message.frames_NHWC[: max(0, how.sampling.clip_frames - len(frames))])
            case VideoEnd() | Failure():
                end = message
    cpu_s = time.process_time() - started
    return Tried(video, cpu_s, info, end, np.array(frames, np.uint8))
