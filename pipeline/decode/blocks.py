"""How many frames one message holds, and how a video is split into GOP chunks. Pure functions."""

from __future__ import annotations

from p3d.pipeline.types import INT64

MESSAGE_FRAMES = 64  # most frames of one FrameBlock
CHUNK_FRAMES = 256  # most frames of a GOP chunk: decord decodes one chunk at a time and is then stopped


def chunk_bounds(key_frames: INT64, n_frames: int, limit: int = CHUNK_FRAMES) -> list[tuple[int, int]]:
    """The GOP chunks of a video, as frame ranges [first, end) that cover all frames.

    A chunk holds as many whole GOPs as fit into `limit` frames. A GOP longer than the limit is a chunk of its own. A
    video of at most `limit` frames is one chunk.

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
