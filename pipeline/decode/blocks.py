"""How many frames travel together, and how many are held at once. Pure."""

from __future__ import annotations

from p3d.pipeline.types import INT64

MESSAGE_FRAMES = 64  # frames of one FrameBlock, at most
BLOCK_FRAMES = 256  # decord is read in runs of at most this many frames, then released


def chunk_bounds(key_frames: INT64, n_frames: int, limit: int = BLOCK_FRAMES) -> list[tuple[int, int]]:
    """[first, end) runs that cover all frames: as many whole GOPs as fit into `limit` frames.

    A GOP longer than the limit is a run of its own, except in a video of at most `limit` frames, which is one run.

        key frames 0 50 100 ... 250 300, 340 frames, limit 256      [0, 250) [250, 340)
    """
    if n_frames <= limit:
        return [(0, n_frames)]
    found, first = [], 0
    starts = [int(k) for k in key_frames if k > 0]
    for this_end, next_end in zip(starts, [*starts[1:], n_frames], strict=True):
        if next_end - first > limit:
            found.append((first, this_end))
            first = this_end
    return [*found, (first, n_frames)]
