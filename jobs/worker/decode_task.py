"""The task that decodes one video, or a share of one, in a process that may die: `decode_video`.

ShardWorker ──`p3d.jobs.worker.decoding` submits──> decode_video ──streams DecodeMessages──> the same ShardWorker
"""

from __future__ import annotations

import faulthandler
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p3d.jobs.machine import is_alive
from p3d.jobs.worker.memory import memory_limit
from p3d.jobs.worker.message_batches import MessageBatch, NodeFailed, message_batches
from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.gop_chunks import Share
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.errors import NodeFault
from p3d.pipeline.recipe import MAX_DECODE_MEMORY
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import DecodeMessage, FrameSpec, VideoFetched, VideoRef, VideoStart
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy

AT_ONCE = 8  # concurrent requests to a store by one group of short videos
BLOCKS_AHEAD = 2  # message batches (at most 8 to 13 MB at 160x160) that a decode may be ahead of its reader


@dataclass(frozen=True, slots=True)
class DecodeSpec:
    """How a job decodes: the frame format, which frames, the decoder policy, and the limits.

    `decode_tasks` videos are decoded at a time. A decode that is silent for `video_timeout_s` is killed. It may
    allocate `memory_bytes` in addition to what its process used before. `workers_per_gpu` share a GPU, also for NVDEC.
    """

    frames: FrameSpec
    sampling: Sampling
    policy: DecodePolicy
    limits: DecodeLimits
    store_options: StoreOptions
    decode_tasks: int
    video_timeout_s: float
    memory_bytes: int = MAX_DECODE_MEMORY
    workers_per_gpu: int = 1


def decode_video(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
) -> Iterator[DecodeMessage]:
    """Decode one video, or a share of it. If a fatal signal ends this process, the file `note` names the signal.

    The note can only be read on the same machine.
    """
    _tidy(scratch)
    with _crash_note(note, spec):
        for message in _messages(video, spec, scratch, share):
            if not isinstance(message, VideoFetched):
                yield message
            elif is_remote(video) and share is None:
                yield from _await_turn()


def decode_video_task(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
) -> Iterator[MessageBatch]:
    """`decode_video` as a Ray task, with several messages per Ray object."""
    yield from message_batches(with_faults(decode_video(video, spec, scratch, note, share)))


def with_faults(messages: Iterator[DecodeMessage]) -> Iterator[DecodeMessage | NodeFailed]:
    """The same messages; a NodeFault becomes NodeFailed messages at the end.

    The CUDA context of this process may be lost, and Ray would give the process to another decode. So it waits for its
    owner, which reads the first of them and kills it.
    """
    try:
        yield from messages
    except NodeFault as fault:
        for _ in range(1 + BLOCKS_AHEAD):
            yield NodeFailed(str(fault))


def decode_group_task(
    videos: tuple[VideoRef, ...], spec: DecodeSpec, scratch: Path, note: Path
) -> Iterator[MessageBatch]:
    """Decode a group of short videos in turn. Each begins with its VideoStart. Those on S3 are fetched first."""
    messages = _fetched_group if is_remote(videos[0]) else _group
    yield from message_batches(messages(videos, spec, scratch, note), of_a_group=True)


def _group(videos: Sequence[VideoRef], spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
    _tidy(scratch)
    with _crash_note(note, spec):
        for video in videos:
            yield from _of_a_group(video, spec, scratch)


def _fetched_group(videos: Sequence[VideoRef], spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
    """Fetch all copies concurrently, then wait once for permission to decode."""
    _tidy(scratch)
    yield VideoStart(os.getpid())
    with ThreadPoolExecutor(AT_ONCE) as pool:  # its end waits for all copies
        copies = [_Copy(local_file(video, spec.store_options, scratch), pool) for video in videos]
    yield from _await_turn()
    with _crash_note(note, spec):
        for at, (video, copy) in enumerate(zip(videos, copies, strict=True)):
            messages = _of_a_group(video, spec, scratch, copy)
            if at == 0:
                next(messages)  # its VideoStart was the first of all
            yield from messages


def _of_a_group(
    video: VideoRef, spec: DecodeSpec, scratch: Path, copy: AbstractContextManager[str] | None = None
) -> Iterator[DecodeMessage]:
    """The messages of one video of a group. Its copy, if any, is ready, so VideoFetched is left out."""
    return (message for message in _messages(video, spec, scratch, None, copy) if not isinstance(message, VideoFetched))


def _messages(
    video: VideoRef,
    spec: DecodeSpec,
    scratch: Path,
    share: Share | None,
    file: AbstractContextManager[str] | None = None,
) -> Iterator[DecodeMessage]:
    return decode_messages(
        video,
        spec.frames,
        spec.sampling,
        policy=spec.policy,
        limits=spec.limits,
        store_options=spec.store_options,
        scratch=scratch,
        share=share,
        file=file,
        deadline_s=spec.video_timeout_s,
    )


@contextmanager
def _crash_note(note: Path, spec: DecodeSpec) -> Iterator[None]:
    """Decoding in this context may end the process by a fatal signal or by its memory limit. `note` then says why.

    For a group of videos there is one note, which is attributed to none of them.
    """
    mapped_too = spec.policy.decoder != "nvdec"
    with note.open("w") as file, memory_limit(spec.memory_bytes, file.fileno(), mapped_too=mapped_too):
        faulthandler.enable(file)
        yield
        faulthandler.disable()
    note.unlink(missing_ok=True)


class _Copy(AbstractContextManager[str]):
    """A `local_file` that a thread of the pool enters in advance. Its errors are raised on entering this context."""

    def __init__(self, file: AbstractContextManager[str], pool: ThreadPoolExecutor) -> None:
        self.file, self.path = file, pool.submit(file.__enter__)

    def __enter__(self) -> str:
        return self.path.result()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.file.__exit__(*raised)


def _await_turn() -> Iterator[DecodeMessage]:
    """Report that the copy is ready. The first message is read; backpressure of the others halts this process."""
    for _ in range(1 + BLOCKS_AHEAD):
        yield VideoFetched()


def _tidy(scratch: Path) -> None:
    """Create the scratch folder, and remove copies left there by decodes of this machine that have ended."""
    scratch.mkdir(mode=0o700, parents=True, exist_ok=True)  # where the owner is on another machine
    for folder in scratch.glob(f"video-{platform.node()}-*"):
        pid = int(folder.name.rsplit("-", 2)[1])
        if pid == os.getpid() or not is_alive(pid):
            shutil.rmtree(folder, ignore_errors=True)


def is_remote(video: VideoRef) -> bool:
    """True if the video must be fetched before it is decoded."""
    return video.uri.startswith("s3://")
