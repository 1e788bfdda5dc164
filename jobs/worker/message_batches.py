"""What one Ray object carries: messages of a decode that need not travel alone.

decode_video ──messages──> parcels ──objects of Ray──> Decoding, which unpacks them

An object costs about 2 ms of processor time on its way through Ray's shared memory, whatever is in it, and a small one
0.6 ms: more than it takes to decode a short clip. A parcel is held back only while its decode is busy with what comes
next, and never once its video has ended; in a run of short videos, once its last has.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from p3d.pipeline.types import ChunkEnd, DecodeMessage, Failure, FrameBlock, VideoEnd, VideoFetched, VideoStart

MessageBatch = tuple[DecodeMessage, ...]
MESSAGE_BATCH_BYTES = 8 * 1024**2  # of frames, from which on a parcel goes: two blocks of 64 at 160x160
HELD_S = 0.25  # since its first message, after which it goes with the next
# Deadlines count from the first; the second halts a decode; after the third another is read; then nothing comes.
_AT_ONCE = (VideoStart, VideoFetched, ChunkEnd, VideoEnd, Failure)


def message_batches(messages: Iterable[DecodeMessage], *, of_a_group: bool = False) -> Iterator[MessageBatch]:
    """The same messages in the same order, in parcels of at least one.

    Of a run of videos only the very first message, from which deadlines count, goes at once, and a VideoFetched.
    """
    held: list[DecodeMessage] = []
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
