"""Frames by decord 0.6.0, for videos that `route` found proved.

decord decodes ahead of a stalled reader without bound (37 -> 860 MB for 300 frames of 720p), so it is read in runs of
whole GOPs of at most 256 frames, and `seek(0)` after each run stops it; as every run starts at a key frame, nothing is
decoded twice. It never judges a file: whatever it refuses is read again by PyAV, which can say what is wrong.

A run of which any frame is wanted is read whole, from front to back: told to skip, decord seeks in between, and then it
is a matter of luck whether its worker thread has come to a damaged packet, and what the frames look like (two of 2 500
fuzzed files came out differently from one decode to the next).

One limit is known: damage inside a picture that FFmpeg can paint over comes out of decord without a word, where PyAV
marks the frame. Of 45 copies of one H.264 file with 1 bit, 64 bytes or 4 KiB overwritten, both refused 12, PyAV alone
18, and 15 showed no sign on either. `--decoder pyav` is for archives where that matters more than speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline.decode.probe import Probe
from pipeline.decode.route import BLOCK_FRAMES
from pipeline.decode.wanted import Wanted
from pipeline.errors import Reason
from pipeline.types import INT64, UINT8, FrameBlock, FrameSpec

MESSAGE_FRAMES = 64  # frames of one FrameBlock, at most
# The share of frames that decord may replace by a neighbour before it raises. -1, its default, replaces any number in
# silence; 0 is ignored (video_reader.cc); by its rule, 0.0001 would let one through in 10 000 frames. A string, so
# that a point is in it: Python writes 1e-09 without one, and video_reader.cc treats whole numbers as a count.
FAULT_TOLERANCE = "0.000000001"

# What decord says when it cannot read a kind of video, for `--decoder decord`, where PyAV is not asked. All else that
# it says is of damaged data, in the words of whichever of its checks failed first.
_UNSUPPORTED = (
    "avfilter_graph",
    "cannot find video stream",
    "Failed to measure duration",
    "shape",
    "from_size",
    "cannot be written as UTF-8",
    "not installed",
)


class DecordGaveUp(Exception):
    """decord cannot read this video, or raised half way. `str()` is one line without decord's clock stamp."""

    @property
    def reason(self) -> Reason:
        """What it means."""
        return Reason.UNSUPPORTED if any(words in str(self) for words in _UNSUPPORTED) else Reason.CORRUPT_FRAMES


def open_decord(found: Probe, spec: FrameSpec) -> Any:
    """A decord reader that resizes to the spec and counts as many frames as the probe; else DecordGaveUp."""
    try:
        import decord
    except (ImportError, OSError) as error:
        raise DecordGaveUp(f"decord is not installed here: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    decord.bridge.set_bridge("native")
    height, width = spec.target_hw(*found.display_hw)
    try:
        reader = decord.VideoReader(
            found.path, ctx=decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=FAULT_TOLERANCE
        )
    except UnicodeEncodeError as error:
        raise DecordGaveUp("the file's name cannot be written as UTF-8") from error
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise DecordGaveUp(_one_line(error)) from error
    if len(reader) != found.n_frames:
        raise DecordGaveUp(f"decord counts {len(reader)} frames, the packets say {found.n_frames}")
    return reader


def read_decord(reader: Any, found: Probe, spec: FrameSpec, wanted: Wanted) -> Iterator[FrameBlock]:
    """The wanted frames in order, in blocks of at most 64; DecordGaveUp when decord raises.

    Times are the probe's (float64 from the packets); decord's own are float32, and garbage in some containers. Holds
    one run of at most 256 resized frames.
    """
    import decord

    assert found.start_s_N is not None and found.end_s_N is not None  # route: every frame has a time
    height, width = spec.target_hw(*found.display_hw)
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    for first, end in runs(found.key_frames, found.n_frames):
        run_M = numbers_M[np.searchsorted(numbers_M, first) : np.searchsorted(numbers_M, end)]
        if not len(run_M):
            continue
        try:
            frames_NHWC: UINT8 = reader.get_batch(list(range(first, end))).asnumpy()
            reader.seek(0)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
            raise DecordGaveUp(_one_line(error)) from error
        if frames_NHWC.shape != (end - first, height, width, 3):
            raise DecordGaveUp(f"frames of shape {frames_NHWC.shape} instead of {(end - first, height, width, 3)}")
        frames_MHWC = spec.crop(frames_NHWC if len(run_M) == end - first else frames_NHWC[run_M - first])
        for at in range(0, len(run_M), MESSAGE_FRAMES):
            part_N = run_M[at : at + MESSAGE_FRAMES]
            yield FrameBlock(
                part_N, found.start_s_N[part_N], found.end_s_N[part_N], frames_MHWC[at : at + MESSAGE_FRAMES]
            )


def runs(key_frames: INT64, n_frames: int, limit: int = BLOCK_FRAMES) -> list[tuple[int, int]]:
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


def _one_line(error: BaseException) -> str:
    """decord's message without its `[HH:MM:SS] /github/workspace/...:` stamp and without the stack below it."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition(".cc:")[2] if ".cc:" in line else line
