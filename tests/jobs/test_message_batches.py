"""Message batches lose, add and reorder nothing, and hold back only what may wait."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.jobs.worker import message_batches as module
from p3d.jobs.worker.message_batches import HELD_S, MESSAGE_BATCH_BYTES, message_batches
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import (
    ChunkEnd,
    DecodeMessage,
    Failure,
    FrameBlock,
    VideoAlive,
    VideoEnd,
    VideoFetched,
    VideoInfo,
    VideoStart,
)

INFO = VideoInfo(64, 320, 240, 0, 25.0, 2.56, "mp4", "h264", 0, "decord")
END = VideoEnd(64, 2.56)
FAILURE = Failure(Reason.TRUNCATED, "ends")


def block(n_frames: int, side: int = 16) -> FrameBlock:
    times_N = np.arange(n_frames, dtype=np.float64)
    return FrameBlock(np.arange(n_frames), times_N, times_N + 1, np.zeros((n_frames, side, side, 3), np.uint8))


MESSAGES = st.one_of(
    st.sampled_from([VideoStart(1), VideoFetched(), VideoAlive(), INFO, ChunkEnd(), END, FAILURE]),
    st.integers(0, 64).map(block),
)


@given(st.lists(MESSAGES))
def test_messages_come_out_as_they_went_in(messages: list[DecodeMessage]) -> None:
    """Unpacked, the batches are the same messages in the same order, and no batch is empty."""
    found = list(message_batches(messages))
    assert [id(message) for message_batch in found for message in message_batch] == [
        id(message) for message in messages
    ]
    assert all(found)


def test_a_short_video_is_two_objects() -> None:
    """The start is sent alone; info, frames and end are sent together."""
    messages = [VideoStart(1), INFO, block(16), END]
    assert list(map(len, message_batches(messages))) == [1, 3]


@pytest.mark.parametrize("last", [VideoStart(1), VideoFetched(), VideoAlive(), ChunkEnd(), END, FAILURE])
def test_what_is_waited_for_is_not_held_back(last: DecodeMessage) -> None:
    """A start, a copy, a sign of life, an end and a failure are sent before the decode does anything else."""
    done: list[str] = []

    def decode() -> Iterator[DecodeMessage]:
        yield last
        done.append("more")
        yield block(1)

    assert next(message_batches(decode()))[-1] is last
    assert not done


def test_a_message_batch_is_sent_when_it_is_full() -> None:
    """Frames of MESSAGE_BATCH_BYTES in total are sent at once, so memory does not grow with the video."""
    one = block(64, 160)
    found = list(message_batches([INFO, *[one] * 10]))
    sizes = [sum(m.frames_NHWC.nbytes for m in message_batch if isinstance(m, FrameBlock)) for message_batch in found]
    assert all(MESSAGE_BATCH_BYTES <= size < MESSAGE_BATCH_BYTES + one.frames_NHWC.nbytes for size in sizes[:-1])


def test_a_message_batch_is_sent_when_it_is_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch held for HELD_S is sent with the next message, however small: a slow decode is read without delay."""
    clock = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])

    def decode() -> Iterator[DecodeMessage]:
        for _ in range(4):
            yield block(1)
            clock[0] += HELD_S / 2

    assert list(map(len, message_batches(decode()))) == [3, 1]


def test_a_group_of_short_videos_is_two_objects() -> None:
    """The first message is sent at once, all others together: no end or start of a video is sent alone."""
    of_one = [VideoStart(1), INFO, block(16), END]
    found = list(message_batches(of_one * 4, of_a_group=True))
    assert [len(message_batch) for message_batch in found] == [1, 15]
    assert [type(m) for message_batch in found for m in message_batch] == [type(m) for m in of_one * 4]
