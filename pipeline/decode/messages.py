"""One video of the manifest -> the messages of its decode. This is the boundary where exceptions become messages.

Everything that can be wrong with one video becomes one `Failure` at the end of its messages. Problems of the store and
of the node propagate as `StoreError` and `NodeFault`, because they concern the job and are not attributed to a video.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import TypeVar

from p3d.pipeline.clips.rules import Sampling
from p3d.pipeline.decode.deadlines import FETCHED_BYTES, SMALL_BYTES, Progress, alive_while
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.gop_chunks import Share
from p3d.pipeline.errors import NodeFault, Reason, StoreError, VideoError
from p3d.pipeline.recipe import VIDEO_TIMEOUT_S
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import DecodeMessage, Failure, FrameSpec, VideoAlive, VideoFetched, VideoRef, VideoStart
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy

T = TypeVar("T")


def decode_messages(
    video: VideoRef,
    spec: FrameSpec,
    sampling: Sampling,
    *,
    policy: DecodePolicy,
    limits: DecodeLimits,
    store_options: StoreOptions,
    scratch: Path,
    share: Share | None = None,
    file: AbstractContextManager[str] | None = None,
    deadline_s: float = VIDEO_TIMEOUT_S,
) -> Iterator[DecodeMessage]:
    """VideoStart, VideoFetched, what `open_frames` yields; a Failure last if the video fails. StoreError and NodeFault
    propagate.

    `file` is the video's `local_file`, if the caller has created it already. `deadline_s` is how long the caller waits
    for a message. If fetching or opening a large video makes progress for longer, VideoAlive messages say so.
    """
    sampling = sampling.for_video(video.video_id)
    yield VideoStart(os.getpid())

    def decoded() -> Iterator[DecodeMessage]:
        fetched, opened = Progress(FETCHED_BYTES), Progress()
        with ExitStack() as stack:
            copy = file or local_file(video, store_options, scratch, fetched.add)
            path = yield from alive(lambda: stack.enter_context(copy), fetched)
            yield VideoFetched()
            frames = open_frames(path, spec, sampling, policy=policy, limits=limits, share=share, progress=opened)
            stack.enter_context(closing(frames))
            yield (yield from alive(lambda: next(frames), opened))
            yield from frames

    def alive(work: Callable[[], T], progress: Progress) -> Generator[VideoAlive, None, T]:
        if video.size_bytes < SMALL_BYTES:
            return work()
        return (yield from alive_while(work, progress, deadline_s))

    yield from failures_as_values(decoded())


def failures_as_values(messages: Iterator[T]) -> Iterator[T | Failure]:
    """The same messages; what is wrong with the video becomes a Failure at the end.

    StoreError and NodeFault propagate.
    """
    try:
        yield from messages
    except VideoError as error:
        yield Failure(error.reason, error.detail)
    except (StoreError, NodeFault):
        raise
    except MemoryError:
        yield Failure(Reason.DECODE_MEMORY, "decoding needed more memory than is available, or the file claims so")
    except Exception as error:  # noqa: BLE001 - any other error is a defect of this program
        yield Failure(Reason.INTERNAL, f"{type(error).__name__}: {_one_line(str(error))}")


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text)[:500]
