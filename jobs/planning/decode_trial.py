"""A few videos decoded for real, to learn what decoding an archive costs: `p3d plan` asks.

    estimate ──videos──> one child a core: decode_messages, frames thrown away but for one clip ──pickles──> Tried

A decoder may crash or hang, so it runs in children that are killed when the time is up; what they had done by then
counts. They run side by side, as decodes do in a job, and say what each video took in seconds of a processor.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.errors import Reason
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import UINT8, Failure, FrameBlock, FrameSpec, VideoEnd, VideoInfo, VideoRef

_PACKAGES = Path(__file__).resolve().parents[1]  # the folder that `pipeline` and `jobs` are in


@dataclass(frozen=True, slots=True)
class Tried:
    """One video: processor seconds of its decode, and what came out; `frames_NHWC` are the first of a clip's length."""

    video: VideoRef
    cpu_s: float
    info: VideoInfo | None
    end: VideoEnd | Failure
    frames_NHWC: UINT8


@dataclass(frozen=True, slots=True)
class How:
    """How a job would decode them."""

    frames: FrameSpec
    sampling: Sampling
    policy: DecodePolicy
    store_options: StoreOptions


def trial(videos: list[VideoRef], how: How, *, children: int, longest_s: float) -> list[Tried]:
    """Decode them, a share in each child; those that were done within `longest_s`."""
    with TemporaryDirectory(prefix="p3d-plan-") as scratch, ThreadPoolExecutor(children) as pool:
        shares = [videos[at::children] for at in range(min(children, len(videos)))]
        return [
            one for done in pool.map(lambda share: _in_child(share, how, scratch, longest_s), shares) for one in done
        ]


def _in_child(videos: list[VideoRef], how: How, scratch: str, longest_s: float) -> list[Tried]:
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", "from p3d.jobs.planning.decode_trial import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(_PACKAGES)])},
    )
    assert child.stdin is not None and child.stdout is not None  # both were asked for
    done: list[Tried] = []
    clock = threading.Timer(longest_s, child.kill)
    with child:
        clock.start()
        try:
            pickle.dump((videos, how, scratch), child.stdin)
            child.stdin.close()
            while True:
                done.append(pickle.load(child.stdout))
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            return done  # all are done, or it was killed, or it crashed
        finally:
            clock.cancel()
            child.kill()


def main() -> None:
    """The child. The first video is decoded once more beforehand, for libraries take their time to load."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    videos, how, scratch = pickle.load(sys.stdin.buffer)
    for number, video in enumerate([videos[0], *videos]):
        found = _decode(video, how, Path(scratch))
        if number:
            pickle.dump(found, answers)
            answers.flush()
    os._exit(0)  # a decoder's own threads may not end


def _decode(video: VideoRef, how: How, scratch: Path) -> Tried:
    started = time.process_time()
    info: VideoInfo | None = None
    end: VideoEnd | Failure = Failure(Reason.NO_FRAMES, "nothing was said of it")
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
