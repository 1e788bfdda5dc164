"""Decode the clips of a training in child processes, several ahead of the process that trains.

    Feeder ──thread──> child 0: positions 0, C, 2C ...     clips, or a Failure, through a pipe
           ──thread──> child 1: positions 1, C+1 ...       (p3d.pipeline.decode.child)
    for position, clip in feeder: in order

A child that crashes or hangs loses the video that it was decoding, and another child continues with the next. The
routes, clip rules and reasons of failures are those of a job.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa

from p3d.jobs.training.sampling import Share, changed, clip_seed, drawn
from p3d.jobs.worker.memory import memory_limit
from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.child import in_a_child
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import Reason
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.sources.listing_buffer import FIELDS
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import FLOAT32, INT64, UINT8, DecodeMessage, Failure, FrameSpec, ShardPlan, VideoAlive, VideoRef
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from p3d.preprocessing import ClipRecipe

Clips = UINT8  # [N, T, H, W, 3]
# number of a video -> the position at which it failed, and how. Another clip of it may be whole: which ones are used
# must depend on positions alone, and not on which child was faster
Known = dict[int, tuple[int, Failure]]
BEFORE = -1  # the position of a failure of an earlier run
STDERR = 2
REF = [field.name for field in FIELDS]


@dataclass(frozen=True, slots=True)
class ClipSource:
    """Everything that decides the clips of a set of videos. `videos` has the columns of a VideoRef."""

    videos: pa.Table
    frames: FrameSpec
    sampling: Sampling
    s3: StoreOptions
    scratch: Path
    timeout_s: float
    memory_bytes: int

    def __len__(self) -> int:
        return int(self.videos.num_rows)

    def video(self, at: int) -> VideoRef:
        """The video with a number."""
        return VideoRef(**{name: self.videos[name][at].as_py() for name in REF})

    def clips(self, video: VideoRef, sampling: Sampling) -> Iterator[VideoAlive | Clips | Failure]:
        """The clips of a video as one array at the end, or a Failure; VideoAlive before, while it makes progress."""
        messages: list[tuple[int, DecodeMessage]] = []  # the frames of these clips alone
        for message in decode_messages(
            video,
            self.frames,
            sampling,
            policy=DecodePolicy(),
            limits=DecodeLimits(),
            store_options=self.s3,
            scratch=self.scratch,
            deadline_s=self.timeout_s,
        ):
            if isinstance(message, VideoAlive):
                yield message
            else:
                messages.append((0, message))
        kept: list[Clips] = []

        def keep(frames_NHWC: UINT8, index_BT: INT64) -> tuple[FLOAT32, FLOAT32]:
            kept.append(frames_NHWC[index_BT])
            return np.ones((len(index_BT), 1), np.float32), np.empty((len(index_BT), 0), np.float32)

        rows = extract_shard(
            ShardPlan(0, "", 0, (video,)),
            messages,
            keep,
            sampling=sampling,
            batch_size=1,
            feature_dim=1,
            n_scores=0,
            embedding_dtype="float32",
        )
        (outcome,) = rows.outcomes
        # a decoder that was restarted has sent clips that no longer count before those of the rows
        yield outcome.failure or np.concatenate(kept)[-len(rows.clips) :]


@dataclass(frozen=True, slots=True)
class TrainingClips:
    """Yields one changed clip per position: `changed` says how."""

    source: ClipSource
    crop_hw: tuple[int, int]
    flip: bool
    seed: int

    def number(self, position: int) -> int:
        """The number of the video at a position."""
        return drawn(self.seed, position, len(self.source))[1]

    def at(self, position: int) -> Iterator[VideoAlive | Clips | Failure]:
        """The clip at a position, [1, T, crop_h, crop_w, 3]."""
        epoch, number = drawn(self.seed, position, len(self.source))
        sampling = replace(self.source.sampling, rule="random", value=1, seed=clip_seed(self.seed, epoch))
        for found in self.source.clips(self.source.video(number), sampling):
            if isinstance(found, np.ndarray):
                yield changed(found[0], self.crop_hw, self.flip, self.seed, position)[None]
            else:
                yield found


@dataclass(frozen=True, slots=True)
class UniformClips:
    """Yields all clips of the video with the number of the position."""

    source: ClipSource

    def number(self, position: int) -> int:
        """The number of the video at a position, which is the position itself."""
        return position

    def at(self, position: int) -> Iterator[VideoAlive | Clips | Failure]:
        """The clips of a video, [N, T, crop_h, crop_w, 3]."""
        yield from self.source.clips(self.source.video(position), self.source.sampling)


def largest_frames(clip: ClipRecipe) -> FrameSpec:
    """How frames are resized to the largest ones from which a crop may be drawn.

    Of frames whose short side is fixed, that is the square in the centre.
    """
    side = (clip.short_side, clip.short_side) if clip.short_side else None
    return FrameSpec(clip.resize_hw or side or clip.crop_hw, clip.resize_hw, clip.short_side)


def decode_positions(
    clips: TrainingClips | UniformClips, share: Share, first: int, step: int, known: Known
) -> Iterator[tuple[int, Clips | Failure | None]]:
    """(position, clips or Failure) of a share, every `step`-th from `first`; (position, None) while one makes progress.

    Runs in a child. A video that has failed at an earlier position is not decoded again.
    """
    known = dict(known)
    for position in share.every(first, step):
        number = clips.number(position)
        if number in known and known[number][0] < position:
            yield position, known[number][1]
            continue
        with memory_limit(clips.source.memory_bytes, STDERR):
            for found in clips.at(position):
                if isinstance(found, Failure):
                    known[number] = position, found
                yield position, None if isinstance(found, VideoAlive) else found


class Feeder:
    """The clips of a process's share of the positions, in order, decoded by `children` processes.

    Each child is at most `ahead` positions ahead of the reader. Iterating yields (position, clips or Failure). A
    context manager: its end kills the children. `known` are failures of earlier epochs, by the number of the video.
    """

    def __init__(
        self,
        clips: TrainingClips | UniformClips,
        share: Share,
        *,
        children: int,
        ahead: int,
        known: dict[int, Failure] | None = None,
    ) -> None:
        self._clips, self._share, self._children = clips, share, max(1, min(children, len(share)))
        self._known: Known = {number: (BEFORE, one) for number, one in (known or {}).items()}
        self._processes = dict[int, subprocess.Popen[bytes]]()
        self._queues = [queue.Queue[Any](maxsize=max(1, ahead)) for _ in range(self._children)]
        self._ended, self._lock = threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=self._read, args=(child,), name=f"clips-{child}", daemon=True)
            for child in range(self._children)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for process in list(self._processes.values()):  # a thread may wait for a video that hangs
            process.kill()
        for one in self._queues:  # a thread may wait for space
            with contextlib.suppress(queue.Empty):
                while True:
                    one.get_nowait()
        for thread in self._threads:
            thread.join()

    def __iter__(self) -> Iterator[tuple[int, Clips | Failure]]:
        for k in range(len(self._share)):
            found = self._queues[k % self._children].get()
            if isinstance(found, BaseException):
                raise found
            yield found

    def _read(self, child: int) -> None:
        """Put what child number `child` decodes into its queue; start it again after a crash. Runs in a thread."""
        try:
            k, tried = child, False
            while k < len(self._share) and not self._ended.is_set():
                k, tried = self._read_child(child, k, tried)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that iterates
            self._put(child, error)

    def _read_child(self, child: int, k: int, tried: bool) -> tuple[int, bool]:
        """Read one child from its position k on. Returns where to continue, and whether that was tried before."""
        timeout_s = self._clips.source.timeout_s
        with self._lock:
            given = (self._clips, self._share, k, self._children, dict(self._known))

        def begun(process: subprocess.Popen[bytes]) -> None:
            self._processes[child] = process
            if self._ended.is_set():
                process.kill()

        with closing(in_a_child(decode_positions, given, {}, timeout_s=timeout_s, begun=begun)) as messages:
            for message in messages:
                position = self._share.position(k)
                if isinstance(message, Failure):  # of the child itself, which has died or is silent
                    if message.reason != Reason.DECODE_TIMEOUT and not tried:
                        return k, True  # the machine may have been short of memory
                    found: Clips | Failure = message
                elif message[1] is None:
                    continue
                else:
                    found = message[1]
                if isinstance(found, Failure):
                    self._remember(self._clips.number(position), position, found)
                if not self._put(child, (position, found)):
                    return len(self._share), False
                k, tried = k + self._children, False
        return k, False

    def _remember(self, number: int, position: int, failure: Failure) -> None:
        with self._lock:
            if number not in self._known or position < self._known[number][0]:
                self._known[number] = position, failure

    def _put(self, child: int, found: Any) -> bool:
        """Wait for space in the queue of a child. False if nobody reads any more."""
        while not self._ended.is_set():
            with contextlib.suppress(queue.Full):
                self._queues[child].put(found, timeout=0.1)
                return True
        return False
