"""Message batches: several messages of a decode in one Ray object.

decode_video ──messages──> message batches ──Ray objects──> Decoding, which unpacks them

A Ray object costs about 2 ms of CPU time on its way through shared memory, and a small one 0.6 ms. That is more than
it takes to decode a short clip. A batch is held back only while its decode is busy, and is always sent when its video
has ended. For a group of short videos it is sent when the last one has ended.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from p3d.pipeline.types import (
    ChunkEnd,
    DecodeMessage,
    Failure,
    FrameBlock,
    VideoAlive,
    VideoEnd,
    VideoFetched,
    VideoStart,
)


@dataclass(frozen=True, slots=True)
class NodeFailed:
    """Instead of an end: the GPU of the node failed (NodeFault), and not the video. The process must decode no more."""

    detail: str


MessageBatch = tuple[DecodeMessage | NodeFailed, ...]
MESSAGE_BATCH_BYTES = 8 * 1024**2  # of frames, at which a batch is sent: two blocks of 64 at 160x160
HELD_S = 0.25  # a batch this old is sent with its next message
# Sent at once. Deadlines count from VideoStart and VideoAlive, VideoFetched halts a decode, and after ChunkEnd another
# is read.
_AT_ONCE = (VideoStart, VideoAlive, VideoFetched, ChunkEnd, VideoEnd, Failure, NodeFailed)


def message_batches(
    messages: Iterable[DecodeMessage | NodeFailed], *, of_a_group: bool = False
) -> Iterator[MessageBatch]:
    """The same messages in the same order, in batches of at least one.

    For a group of videos only the very first message, from which deadlines count, and a VideoFetched are sent at once.
    """
    held: list[DecodeMessage | NodeFailed] = []
    at_once: tuple[type, ...] = _AT_ONCE
    size_bytes, since = 0, 0.0
    for message in messages:
        since = since if held else time.monotonic()
        held.append(message)
        size_bytes += message.frames_NHWC.nbytes if isinstance(message, FrameBlock) else 0
        late = time.monotonic() - since >= HELD_S
        if size_bytes >= MESSAGE_BATCH_BYTES or late or isinstance(message, at_once):
            yield tuple(held)
            held, size_bytes, at_once = [], 0, (VideoFetched,) if of_a_group else _AT_ONCE
    if held:
        yield tuple(held)
