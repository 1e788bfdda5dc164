"""Frames by decord 0.6.0, for videos that `route` found proved.

decord decodes ahead of a stalled reader without bound (37 -> 860 MB for 300 frames of 720p), so it is read in runs of
whole GOPs of at most 256 frames, and `seek(0)` after each run stops it; as every run starts at a key frame, nothing is
decoded twice. It never judges a file: whatever it refuses is read again by PyAV, which can say what is wrong.

Where a GOP holds no wanted frame and `route.exact_seek` holds, decord is not told to skip: it would be a matter of luck
whether its worker thread, ahead of its reader, has come to a damaged packet, and what the frames look like (two of
2 500 fuzzed files came out differently from one decode to the next). The packets of the wanted GOPs are copied into a
file in memory that holds nothing else, and decord reads that from front to back. Elsewhere a run of which any frame is
wanted is read whole.

One limit is known: damage inside a picture that FFmpeg can paint over comes out of decord without a word, where PyAV
marks the frame. Of 45 copies of one H.264 file with 1 bit, 64 bytes or 4 KiB overwritten, both refused 12, PyAV alone
18, and 15 showed no sign on either. `--decoder pyav` is for archives where that matters more than speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from p3d.pipeline.decode.blocks import BLOCK_FRAMES, MESSAGE_FRAMES, chunk_bounds
from p3d.pipeline.decode.probe import Probe, Source
from p3d.pipeline.decode.routes.choice import exact_seek, in_pieces
from p3d.pipeline.decode.seek import Astray, cut, joined, opened, wanted_gops
from p3d.pipeline.decode.wanted import Wanted
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import INT64, UINT8, FrameBlock, FrameSpec

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

_Part = tuple[INT64, UINT8]  # numbers [N] of at most 64 frames, and their pixels [N, crop_h, crop_w, 3]


class DecordGaveUp(Exception):
    """decord cannot read this video, or raised half way. `str()` is one line without decord's clock stamp."""

    @property
    def reason(self) -> Reason:
        """What it means."""
        return Reason.UNSUPPORTED if any(words in str(self) for words in _UNSUPPORTED) else Reason.CORRUPT_FRAMES


def open_decord(found: Probe, spec: FrameSpec) -> Any:
    """A decord reader that resizes to the spec and counts as many frames as the probe; else DecordGaveUp."""
    return _reader(found.path, found.n_frames, spec.target_hw(*found.display_hw))


def _reader(path: str, n_frames: int, target_hw: tuple[int, int]) -> Any:
    try:
        import decord
    except (ImportError, OSError) as error:
        raise DecordGaveUp(f"decord is not installed here: {error}") from error
    decord.logging.set_level(decord.logging.QUIET)
    decord.bridge.set_bridge("native")
    height, width = target_hw
    try:
        reader = decord.VideoReader(
            path, ctx=decord.cpu(0), width=width, height=height, num_threads=1, fault_tol=FAULT_TOLERANCE
        )
    except UnicodeEncodeError as error:
        raise DecordGaveUp("the file's name cannot be written as UTF-8") from error
    except (decord.DECORDError, RuntimeError, AssertionError) as error:
        raise DecordGaveUp(_one_line(error)) from error
    if len(reader) != n_frames:
        raise DecordGaveUp(f"decord counts {len(reader)} frames, the packets say {n_frames}")
    return reader


def read_decord(reader: Any, found: Probe, spec: FrameSpec, wanted: Wanted) -> Iterator[FrameBlock]:
    """The wanted frames in order, in blocks of at most 64; DecordGaveUp when decord raises.

    Times are the probe's (float64 from the packets); decord's own are float32, and garbage in some containers. Holds
    one run of at most 256 cropped frames and 64 resized ones.
    """
    assert found.start_s_N is not None and found.end_s_N is not None  # route: every frame has a time
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    gops = wanted_gops(found, numbers_M) if exact_seek(found) else []
    if gops and (len(gops) < len(found.key_frames) or in_pieces(found)):
        parts = _cut_runs(found, spec, numbers_M, gops)
    else:
        parts = _whole_runs(reader, found, spec, numbers_M)
    for numbers_N, frames_NHWC in parts:
        yield FrameBlock(numbers_N, found.start_s_N[numbers_N], found.end_s_N[numbers_N], frames_NHWC)


def _whole_runs(reader: Any, found: Probe, spec: FrameSpec, numbers_M: INT64) -> Iterator[_Part]:
    """Each run of the file of which any frame is wanted."""
    for first, end in chunk_bounds(found.key_frames, found.n_frames):
        run_M = numbers_M[np.searchsorted(numbers_M, first) : np.searchsorted(numbers_M, end)]
        if len(run_M):
            yield from _read(reader, found, spec, run_M, first, end)


def _cut_runs(found: Probe, spec: FrameSpec, numbers_M: INT64, gops: list[tuple[int, int]]) -> Iterator[_Part]:
    """These GOPs, from a file of at most 256 frames at a time (or of one GOP, if that is longer)."""
    with opened(found) as source:
        while gops:
            sizes = np.cumsum([end - first for first, end in gops[:BLOCK_FRAMES]])
            n_gops = max(1, int(np.searchsorted(sizes, BLOCK_FRAMES, "right")))
            part, gops = gops[:n_gops], gops[n_gops:]
            in_file_N = np.concatenate([np.arange(first, end) for first, end in part])
            run_M = numbers_M[np.searchsorted(numbers_M, part[0][0]) : np.searchsorted(numbers_M, part[-1][1])]
            at_M = np.searchsorted(in_file_N, run_M)
            for at_N, frames_NHWC in _read_cut(source, found, spec, joined(part), len(in_file_N), at_M):
                yield in_file_N[at_N], frames_NHWC


def _read_cut(
    source: Source, found: Probe, spec: FrameSpec, gops: list[tuple[int, int]], n_frames: int, at_M: INT64
) -> list[_Part]:
    """Frames `at_M` of a file of these GOPs, which has `n_frames`."""
    try:
        with cut(source, found, gops) as path:
            reader = _reader(path, n_frames, spec.target_hw(*found.display_hw))
            return _read(reader, found, spec, at_M, 0, n_frames)
    except Astray as error:
        raise DecordGaveUp(str(error)) from error


class _Batch:
    """What numpy needs to look at decord's own memory; decord's `asnumpy` copies it."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def __dlpack__(self, **options: Any) -> Any:
        return self._frames.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # a CPU's memory


def _read(reader: Any, found: Probe, spec: FrameSpec, run_M: INT64, first: int, end: int) -> list[_Part]:
    """Frames `run_M` of the reader's [first, end), all of which it decodes; then it is stopped."""
    import decord

    height, width = spec.target_hw(*found.display_hw)
    parts: list[_Part] = []
    for at in range(first, end, MESSAGE_FRAMES):
        stop = min(at + MESSAGE_FRAMES, end)
        try:
            batch = reader.get_batch(list(range(at, stop)))
            if stop == end:
                reader.seek(0)  # before anything else: it decodes on as long as it may (a seek to `end` does nothing)
            frames_NHWC = np.from_dlpack(_Batch(batch)).view(np.uint8)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
            raise DecordGaveUp(_one_line(error)) from error
        if frames_NHWC.shape != (stop - at, height, width, 3):
            raise DecordGaveUp(f"frames of shape {frames_NHWC.shape} instead of {(stop - at, height, width, 3)}")
        part_N = run_M[np.searchsorted(run_M, at) : np.searchsorted(run_M, stop)]
        if len(part_N):
            cropped_NHWC = spec.cropped(frames_NHWC)
            parts.append((part_N, np.array(cropped_NHWC if len(part_N) == stop - at else cropped_NHWC[part_N - at])))
    return parts


def _one_line(error: BaseException) -> str:
    """decord's message without its `[HH:MM:SS] /github/workspace/...:` stamp and without the stack below it."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition(".cc:")[2] if ".cc:" in line else line
