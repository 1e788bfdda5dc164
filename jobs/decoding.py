"""The decodes of one worker: a Ray task each, in a process that may die, streaming to the actor that owns it.

A decode is a process of its own because native decoders crash and hang on real archives: one that dies is tried again
and convicted only on evidence, one that hangs is killed, and neither takes another video with it. Retries are ours,
counted per video; Ray's own are off.

A task whose video is on S3 first fetches it, so as many again are started as may decode. One that has its copy sends
more messages than may be unread, which halts it; its owner goes on reading when another decode has ended.
"""

from __future__ import annotations

import faulthandler
import os
import platform
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)

from jobs.machine import is_alive
from jobs.memory import NOTE, memory_limit
from pipeline.clips import Sampling
from pipeline.decode import DecodeLimits, DecodePolicy
from pipeline.decode.messages import decode_messages
from pipeline.errors import Reason, StoreError
from pipeline.store import StoreOptions
from pipeline.types import DecodeMessage, Failure, FrameSpec, ShardPlan, VideoEnd, VideoFetched, VideoInfo, VideoRef

FETCHED_AHEAD = 2  # times `decode_tasks` that run at once, those that only fetch included
BLOCKS_AHEAD = 2  # blocks of <= 64 frames (5 MB at 160x160) that a decode may be ahead of its reader
FETCHED_BYTES = 8 * 1024**3  # of the videos in work, above which none is fetched ahead
CRASHES_WITH_NOTE = 2  # native crashes on one video that convict it
MOST_ATTEMPTS = 10  # of one video, nodes that were lost included
DEATHS = 3  # of its decode process for unknown reasons that convict it, all but the first of them alone
MEMORY_BYTES = 4 * 1024**3  # of one decode: 8K in 10 bits takes under 2 GiB
GPU_SHARE = 0.01  # that a decode on a GPU asks of Ray: enough to be sent to one, with the worker's own share beside it
POLL_S = 0.5
SLOWEST_READ = 10e6  # bytes/s of a source that is still worth waiting for


def gpus_of_a_worker(decoder: str, decode_tasks: int) -> float:
    """What a worker asks of its GPU, so that its decodes find room on it too where they need one."""
    return 1 - FETCHED_AHEAD * decode_tasks * GPU_SHARE if decoder == "nvdec" else 1


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """How a job decodes: what to make of a frame, which frames, by which rules, and how long to wait for one.

    `decode_tasks` videos at a time; `video_timeout_s` is the longest silence of one decode before it is killed, and
    `memory_bytes` what it may take beyond what its process had before.
    """

    frames: FrameSpec
    sampling: Sampling
    policy: DecodePolicy
    limits: DecodeLimits
    store_options: StoreOptions
    decode_tasks: int
    video_timeout_s: float
    memory_bytes: int = MEMORY_BYTES


def decode_video(video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
    """The task: one video. If a fatal signal ends this process, the file `note` says which (same machine only)."""
    scratch.mkdir(parents=True, exist_ok=True)  # where the owner is on another machine
    _sweep(scratch)
    mapped_too = spec.policy.decoder != "nvdec"
    with note.open("w") as file, memory_limit(spec.memory_bytes, file.fileno(), mapped_too=mapped_too):
        faulthandler.enable(file)
        for message in decode_messages(
            video,
            spec.frames,
            spec.sampling,
            policy=spec.policy,
            limits=spec.limits,
            store_options=spec.store_options,
            scratch=scratch,
        ):
            yield message
            if isinstance(message, VideoFetched) and _is_remote(video):
                for _ in range(BLOCKS_AHEAD):  # no `yield from`: Ray sends into its generators
                    yield message  # here it halts this process, until its owner reads on
        faulthandler.disable()
    note.unlink(missing_ok=True)


def _sweep(scratch: Path) -> None:
    """Remove the copies of decodes that were killed on this machine."""
    for folder in scratch.glob(f"video-{platform.node()}-*"):
        pid = int(folder.name.rsplit("-", 2)[1])
        if pid == os.getpid() or not is_alive(pid):
            shutil.rmtree(folder, ignore_errors=True)


def _is_remote(video: VideoRef) -> bool:
    return video.uri.startswith("s3://")


_decode_video: Any = ray.remote(
    num_cpus=1, num_returns="streaming", max_retries=0, _generator_backpressure_num_objects=BLOCKS_AHEAD
)(decode_video)


@dataclass(slots=True)
class _Case:
    """One video of the shard: how often its decode was started, and how it died."""

    at: int
    video: VideoRef
    attempts: int = 0
    crashes: int = 0
    deaths: int = 0


@dataclass(slots=True)
class _Stream:
    """A decode that runs: its generator, its fatal-signal note, and since when it has been silent.

    `fetching` a copy, then `halted` until another has ended, then decoding; a local video is decoded from the start.
    """

    case: _Case
    note: Path
    fetching: bool
    halted: bool = False
    silent_since: float | None = None  # None until its process has begun, and while it is halted
    opened: bool = False
    ended: bool = False


@dataclass(slots=True)
class Decoding:
    """The decodes of one shard: at most `decode_tasks` at a time, each in a process of its own."""

    shard: ShardPlan
    spec: DecodeSpec
    scratch: Path
    streams: dict[Any, _Stream] = field(default_factory=dict)

    def messages(self) -> Generator[tuple[int, DecodeMessage], None, None]:
        """(position in the shard, message) as they come; every video ends with a VideoEnd or a Failure."""
        waiting = deque(_Case(at, video) for at, video in enumerate(self.shard.videos))
        suspects: deque[_Case] = deque()  # their process died without a note: tried again alone
        try:
            while waiting or suspects or self.streams:
                while waiting and self._room_for(waiting[0].video):
                    self._submit(waiting.popleft())
                if suspects and not self.streams:
                    self._submit(suspects.popleft())
                self._go_on()
                generators = [generator for generator, stream in self.streams.items() if not stream.halted]
                ready, _ = ray.wait(generators, num_returns=len(generators), timeout=0)
                if not ready:
                    ready, _ = ray.wait(generators, num_returns=1, timeout=POLL_S)
                for generator in ready:
                    yield from self._next(generator, suspects)
                for generator in generators:
                    if generator not in ready and self._overdue(generator):
                        yield from self._kill(generator)
        finally:
            for generator in list(self.streams):
                self._end(generator)

    def _room_for(self, video: VideoRef) -> bool:
        """May one more be started? Beyond those that decode, only to be fetched, and not without bound."""
        if len(self.streams) < self.spec.decode_tasks or not _is_remote(video):
            return len(self.streams) < self.spec.decode_tasks
        size_bytes = video.size_bytes + sum(stream.case.video.size_bytes for stream in self.streams.values())
        return len(self.streams) < FETCHED_AHEAD * self.spec.decode_tasks and size_bytes <= FETCHED_BYTES

    def _submit(self, case: _Case) -> None:
        case.attempts += 1
        note = self.scratch / f"{case.at}-{case.attempts}.crash"
        fetching = _is_remote(case.video)
        gpus = GPU_SHARE if self.spec.policy.decoder == "nvdec" else 0
        task = _decode_video.options(num_cpus=0.5 if fetching else 1, num_gpus=gpus)
        self.streams[task.remote(case.video, self.spec, self.scratch, note)] = _Stream(case, note, fetching)

    def _go_on(self) -> None:
        """Let those that have their copy decode, as far as there is room, the first first."""
        room = self.spec.decode_tasks - sum(not (s.fetching or s.halted) for s in self.streams.values())
        for stream in [stream for stream in self.streams.values() if stream.halted][: max(room, 0)]:
            stream.halted, stream.silent_since = False, time.monotonic()

    def _next(self, generator: Any, suspects: deque[_Case]) -> Iterator[tuple[int, DecodeMessage]]:
        """The message that is ready, or what follows from the end or the death of the stream."""
        stream = self.streams[generator]
        try:
            message: DecodeMessage = ray.get(next(generator))
        except StopIteration:
            del self.streams[generator]
            if not stream.ended:
                yield from self._died(stream, suspects, None)
            return
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, StoreError):
                raise cause from None
            raise
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError, ObjectLostError, TaskCancelledError) as error:
            del self.streams[generator]
            yield from self._died(stream, suspects, error)
            return
        stream.silent_since = time.monotonic()
        if isinstance(message, VideoFetched):
            if stream.fetching:
                stream.fetching, stream.halted, stream.silent_since = False, True, None
            return
        if isinstance(message, Failure):
            message = Failure(message.reason, message.detail, stream.case.attempts)
        stream.opened = stream.opened or isinstance(message, VideoInfo)
        stream.ended = isinstance(message, (VideoEnd, Failure))
        yield stream.case.at, message

    def _died(
        self, stream: _Stream, suspects: deque[_Case], error: Exception | None
    ) -> Iterator[tuple[int, DecodeMessage]]:
        """A decode process is gone. A note of too much memory convicts at once; a fatal signal's at the second time;
        unknown deaths at the third.

        The loss of a node is nobody's fault, but not for ever either.
        """
        case = stream.case
        innocent = isinstance(error, (NodeDiedError, ObjectLostError)) and case.attempts < MOST_ATTEMPTS
        note = stream.note.read_text() if stream.note.exists() else ""
        stream.note.unlink(missing_ok=True)
        if note.startswith(NOTE):
            detail = f"its decode took {note.removeprefix(NOTE).strip()} (max_decode_memory)"
            yield case.at, Failure(Reason.DECODE_MEMORY, detail, case.attempts)
            return
        if note:
            case.crashes += 1
        elif not innocent:
            case.deaths += 1
        if case.crashes >= CRASHES_WITH_NOTE or case.deaths >= DEATHS:
            if isinstance(error, OutOfMemoryError):
                detail = f"its process was ended {case.deaths} times because the machine ran out of memory"
                yield case.at, Failure(Reason.DECODE_MEMORY, detail, case.attempts)
                return
            how = note.strip().splitlines()[0] if note else f"its process was killed {case.deaths} times"
            yield case.at, Failure(Reason.DECODER_CRASH, f"the decoder crashed: {how}", case.attempts)
        else:
            suspects.append(case)

    def _overdue(self, generator: Any) -> bool:
        """Silent for too long? Until the first frames, time to fetch and index the whole file is allowed on top."""
        stream = self.streams[generator]
        if stream.silent_since is None:
            return False
        reading_s = 0.0 if stream.opened else max(stream.case.video.size_bytes, 0) / SLOWEST_READ
        return time.monotonic() - stream.silent_since > self.spec.video_timeout_s + reading_s

    def _kill(self, generator: Any) -> Iterator[tuple[int, DecodeMessage]]:
        """It hangs; only while it is closed, if all frames are there."""
        stream = self._end(generator)
        if not stream.ended:
            detail = f"gave no frame for {self.spec.video_timeout_s:g} s and was stopped"
            yield stream.case.at, Failure(Reason.DECODE_TIMEOUT, detail, stream.case.attempts)

    def _end(self, generator: Any) -> _Stream:
        """Kill its process. What it copied is swept by the next task there, for it may live a moment longer."""
        stream = self.streams.pop(generator)
        ray.cancel(generator, force=True)
        stream.note.unlink(missing_ok=True)
        return stream
