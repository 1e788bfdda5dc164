"""The task that decodes one video, or a share of one, in a process that may die: `decode_video`.

ShardWorker ──`jobs.decoding` submits──> decode_video ──streams DecodeMessages──> the same ShardWorker
"""

from __future__ import annotations

import faulthandler
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.machine import is_alive
from jobs.memory import memory_limit
from jobs.parcels import Parcel, parcels
from pipeline.clips import Sampling
from pipeline.decode import DecodeLimits, DecodePolicy, Share
from pipeline.decode.messages import decode_messages
from pipeline.store import StoreOptions
from pipeline.types import DecodeMessage, FrameSpec, VideoFetched, VideoRef

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
            share=share,
        ):
            if isinstance(message, VideoFetched) and (share is not None or not is_remote(video)):
                continue  # nobody waits for it
            yield message
            if isinstance(message, VideoFetched):
                for _ in range(BLOCKS_AHEAD):
                    yield message  # here it halts this process, until its owner reads on
        faulthandler.disable()
    note.unlink(missing_ok=True)


def decode_video_task(
    video: VideoRef, spec: DecodeSpec, scratch: Path, note: Path, share: Share | None = None
) -> Iterator[Parcel]:
    """`decode_video`, in as few objects of Ray as need be."""
    yield from parcels(decode_video(video, spec, scratch, note, share))


def decode_run_task(videos: tuple[VideoRef, ...], spec: DecodeSpec, scratch: Path, note: Path) -> Iterator[Parcel]:
    """Several short videos, one after the other; each begins with its VideoStart."""
    yield from parcels(
        (message for video in videos for message in decode_video(video, spec, scratch, note)), of_a_run=True
    )


def _sweep(scratch: Path) -> None:
    """Remove the copies of decodes that were killed on this machine."""
    for folder in scratch.glob(f"video-{platform.node()}-*"):
        pid = int(folder.name.rsplit("-", 2)[1])
        if pid == os.getpid() or not is_alive(pid):
            shutil.rmtree(folder, ignore_errors=True)


def is_remote(video: VideoRef) -> bool:
    """Must it be fetched first?"""
    return video.uri.startswith("s3://")
