"""One long video for several decodes: which frames each of them takes, so that all together give what one would give.

A stripe is a run of whole GOPs of some 256 frames, as decord is read anyway. Stripes without a wanted frame do not
count; of the others, in order, decode i of n takes every n-th from the i-th on:

    stripes      0    1    2    3    4    5    6
    2 decodes    a    b    a    b    a    b    a

Stripes are short, because their reader takes them in order: whoever is ahead waits for it with a stripe in hand, and so
all work at once in bounded memory, where halves of the video would wait for each other. Only where seeking to any key
frame is proved to give the frames of a decode from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.decode.blocks import BLOCK_FRAMES, chunk_bounds
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.choice import RouteName, exact_seek
from p3d.pipeline.decode.seek import leaves_out
from p3d.pipeline.decode.wanted import Wanted
from p3d.pipeline.types import INT64, ChunkEnd, FrameBlock


@dataclass(frozen=True, slots=True)
class Share:
    """Of the frames from `first` on, the stripes of decode `index` of `n_decodes`."""

    first: int
    index: int
    n_decodes: int

    def __post_init__(self) -> None:
        if not (self.first >= 0 and 0 <= self.index < self.n_decodes):
            raise ValueError(f"{self} is no share")


def can_be_shared(found: Probe, name: RouteName, wanted: Wanted) -> bool:
    """May several decodes share this video?

    decord's videos may, being read from key frame to key frame anyway. PyAV's, where seeking is proved exact, and one
    decode would look at the same packets: all, for every frame is wanted, or those that each GOP's wanted frames need.
    """
    if found.n_frames <= BLOCK_FRAMES or found.largest_gop > BLOCK_FRAMES:
        return False
    if name == "decord":
        return True
    if name != "pyav" or not exact_seek(found):
        return False
    assert found.start_s_N is not None and found.end_s_N is not None  # exact_seek
    return leaves_out(found, wanted) or len(wanted.of(found.start_s_N, found.end_s_N)) == found.n_frames


def chunks_of(found: Probe, wanted: Wanted, share: Share) -> list[INT64]:
    """The wanted frame numbers of each stripe of a share; a first one without any, so that there is always one."""
    assert found.start_s_N is not None and found.end_s_N is not None  # can_be_shared: every frame has a time
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    numbers_M = numbers_M[np.searchsorted(numbers_M, share.first) :]
    starts_R = np.array([first for first, _ in chunk_bounds(found.key_frames, found.n_frames)])
    chunk_M = np.searchsorted(starts_R, numbers_M, side="right")
    chunks = np.split(numbers_M, np.flatnonzero(np.diff(chunk_M)) + 1)
    return chunks[share.index :: share.n_decodes] or [numbers_M[:0]]


def chunked(blocks: Iterator[FrameBlock], chunks: list[INT64]) -> Iterator[FrameBlock | ChunkEnd]:
    """The same frames, with a StripeEnd after the last one of each stripe; ValueError if other frames come."""
    ends = iter(chunks)
    left_M = next(ends)
    for block in blocks:
        if not len(block.numbers_N):
            yield block  # a sign of life
        while len(block.numbers_N):
            n = min(len(block.numbers_N), len(left_M))
            if not n or not np.array_equal(block.numbers_N[:n], left_M[:n]):
                raise ValueError(f"frame {block.numbers_N[0]} came out of its turn")
            yield _cut(block, slice(None, n))
            block, left_M = _cut(block, slice(n, None)), left_M[n:]
            if not len(left_M):
                yield ChunkEnd()
                left_M = next(ends, left_M)
    if len(left_M):
        raise ValueError(f"frame {left_M[0]} did not come")


def _cut(block: FrameBlock, part: slice) -> FrameBlock:
    return FrameBlock(block.numbers_N[part], block.start_s_N[part], block.end_s_N[part], block.frames_NHWC[part])
