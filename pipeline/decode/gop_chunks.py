"""Sharing one long video between several decodes: which frames each takes, so that together they equal one decode.

A GOP chunk is a sequence of whole GOPs with about 256 frames (`blocks.chunk_bounds`). Chunks without a wanted frame are
skipped. Of the others, in order, decode i of n takes every n-th chunk, starting with the i-th:

    GOP chunks   0    1    2    3    4    5    6
    2 decodes    a    b    a    b    a    b    a

Chunks are short because the reader takes them in order. A decode that is ahead holds one chunk and waits, so all
decodes work at once in bounded memory. With halves of the video, one decode would wait for the other. Videos are shared
only where seeking to any key frame is proved to give the frames of a decode from the start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.decode.blocks import CHUNK_FRAMES, chunk_bounds
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.choice import RouteName, exact_seek
from p3d.pipeline.decode.seek import leaves_out
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.types import INT64, ChunkEnd, FrameBlock


@dataclass(frozen=True, slots=True)
class Share:
    """The GOP chunks of decode `index` of `n_decodes`, among the frames from number `first` on."""

    first: int
    index: int
    n_decodes: int

    def __post_init__(self) -> None:
        if not (self.first >= 0 and 0 <= self.index < self.n_decodes):
            raise ValueError(f"{self} is not a valid share")


def can_be_shared(found: Probe, name: RouteName, wanted: Wanted) -> bool:
    """May several decodes share this video?

    decord's videos may, because they are read from key frame to key frame anyway. PyAV's may if seeking is proved exact
    and one decode would send the decoder the same packets. That is so where every frame is wanted, or where only the
    packets that each GOP's wanted frames need are decoded.
    """
    if found.n_frames <= CHUNK_FRAMES or found.largest_gop > CHUNK_FRAMES:
        return False
    if name == "decord":
        return True
    if name != "pyav" or not exact_seek(found):
        return False
    assert found.start_s_N is not None and found.end_s_N is not None  # exact_seek
    return leaves_out(found, wanted) or len(wanted.of(found.start_s_N, found.end_s_N)) == found.n_frames


def chunks_of(found: Probe, wanted: Wanted, share: Share) -> list[INT64]:
    """The wanted frame numbers of each GOP chunk of a share; one empty chunk where the share has no frame."""
    assert found.start_s_N is not None and found.end_s_N is not None  # can_be_shared: every frame has a time
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    numbers_M = numbers_M[np.searchsorted(numbers_M, share.first) :]
    starts_R = np.array([first for first, _ in chunk_bounds(found.key_frames, found.n_frames)])
    chunk_M = np.searchsorted(starts_R, numbers_M, side="right")
    chunks = np.split(numbers_M, np.flatnonzero(np.diff(chunk_M)) + 1)
    return chunks[share.index :: share.n_decodes] or [numbers_M[:0]]


def chunked(blocks: Iterator[FrameBlock], chunks: list[INT64]) -> Iterator[FrameBlock | ChunkEnd]:
    """The same frames, with a ChunkEnd after the last one of each GOP chunk; ValueError if other frames come."""
    ends = iter(chunks)
    left_M = next(ends)
    for block in blocks:
        if not len(block.numbers_N):
            yield block  # shows that the decode is alive
        while len(block.numbers_N):
            n = min(len(block.numbers_N), len(left_M))
            if not n or not np.array_equal(block.numbers_N[:n], left_M[:n]):
                raise ValueError(f"frame {block.numbers_N[0]} came out of order")
            yield _cut(block, slice(None, n))
            block, left_M = _cut(block, slice(n, None)), left_M[n:]
            if not len(left_M):
                yield ChunkEnd()
                left_M = next(ends, left_M)
    if len(left_M):
        raise ValueError(f"frame {left_M[0]} is missing")


def _cut(block: FrameBlock, part: slice) -> FrameBlock:
    return FrameBlock(block.numbers_N[part], block.start_s_N[part], block.end_s_N[part], block.frames_NHWC[part])
