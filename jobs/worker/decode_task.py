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
from p3d.jobs.worker.message_batches import MessageBatch, message_batches
from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.gop_chunks import Share
from p3d.pipeline.decode.messages import decode_messages
from p3d.pipeline.decode.policy import DecodeLimits, DecodePolicy
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import DecodeMessage, FrameSpec, VideoFetched, VideoRef, VideoStart

AT_ONCE = 8  # requests to a store of one run of short videos
BLOCKS_AHEAD = 2  # parcels (8 to 13 MB at 160x160, or less) that a decode may be ahead of its reader
MEMORY_BYTES = 4 * 1024**3  # of one decode: 8K in 10 bits takes under 2 GiB


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


def decode_video(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
) -> Iterator[DecodeMessage]:
    """The task: one video, or a share of it. If a fatal signal ends this process, the file `note` says which (same
    machine only)."""
    _tidy(scratch)
    with _last_words(note, spec):
        for message in _messages(video, spec, scratch, share):
            if not isinstance(message, VideoFetched):
                yield message
            elif is_remote(video) and share is None:
                yield from _await_turn()


def decode_video_task(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
) -> Iterator[MessageBatch]:
    """`decode_video`, in as few objects of Ray as need be."""
    yield from message_batches(decode_video(video, spec, scratch, note, share))


def decode_group_task(
    videos: tuple[VideoRef, ...], spec: DecodeSpec, scratch: Path, note: Path
) -> Iterator[MessageBatch]:
    """Several short videos, one after the other; each begins with its VideoStart. Those on S3 are fetched first."""
    messages = _fetched_group if is_remote(videos[0]) else _group
    yield from message_batches(messages(videos, spec, scratch, note), of_a_group=True)


def _group(videos: Sequence[VideoRef], spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
    _tidy(scratch)
    with _last_words(note, spec):
        for video in videos:
            yield from _of_a_group(video, spec, scratch)


def _fetched_group(videos: Sequence[VideoRef], spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[DecodeMessage]:
    """All copies are fetched side by side, and then the turn to decode is waited for, once."""
    _tidy(scratch)
    yield VideoStart(os.getpid())
    with ThreadPoolExecutor(AT_ONCE) as pool:  # ends when all are here
        copies = [_Copy(local_file(video, spec.store_options, scratch), pool) for video in videos]
    yield from _await_turn()
    with _last_words(note, spec):
        for at, (video, copy) in enumerate(zip(videos, copies, strict=True)):
            messages = _of_a_group(video, spec, scratch, copy)
            if at == 0:
                next(messages)  # its VideoStart was the first of all
            yield from messages


def _of_a_group(
    video: VideoRef, spec: DecodeSpec, scratch: Path, copy: AbstractContextManager[str] | None = None
) -> Iterator[DecodeMessage]:
    """One whose copy, if it needs one, is here: nobody waits for it."""
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
    )


@contextmanager
def _last_words(note: Path, spec: DecodeSpec) -> Iterator[None]:
    """What is decoded meanwhile may end this process: by a fatal signal or by too much memory, of which `note` tells.

    Of a run all videos together: it convicts none of them.
    """
    mapped_too = spec.policy.decoder != "nvdec"
    with note.open("w") as words, memory_limit(spec.memory_bytes, words.fileno(), mapped_too=mapped_too):
        faulthandler.enable(words)
        yield
        faulthandler.disable()
    note.unlink(missing_ok=True)


class _Copy(AbstractContextManager[str]):
    """A `local_file` that a thread of the pool has entered beforehand; what is wrong with it is raised on entering."""

    def __init__(self, file: AbstractContextManager[str], pool: ThreadPoolExecutor) -> None:
        self.file, self.path = file, pool.submit(file.__enter__)

    def __enter__(self) -> str:
        return self.path.result()

    def __exit__(self, *raised: Any) -> bool | None:
        return self.file.__exit__(*raised)


def _await_turn() -> Iterator[DecodeMessage]:
    """The copy is here. The first is heard; behind the others this process halts, until its owner reads on."""
    for _ in range(1 + BLOCKS_AHEAD):
        yield VideoFetched()


def _tidy(scratch: Path) -> None:
    """Before the first copy of a task: the folder is there, and no copies of decodes that have ended here."""
    scratch.mkdir(parents=True, exist_ok=True)  # where the owner is on another machine
    for folder in scratch.glob(f"video-{platform.node()}-*"):
        pid = int(folder.name.rsplit("-", 2)[1])
        if pid == os.getpid() or not is_alive(pid):
            shutil.rmtree(folder, ignore_errors=True)


def is_remote(video: VideoRef) -> bool:
    """Must it be fetched first?"""
    return video.uri.startswith("s3://")
