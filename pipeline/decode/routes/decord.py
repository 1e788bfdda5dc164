"""Frames by decord 0.6.0, for videos that `choice.route` gives it because they are proved to be read correctly.

decord decodes ahead of a stalled reader without bound (37 -> 860 MB for 300 frames of 720p). So it is read in GOP
chunks of at most 256 frames, and `seek(0)` after each chunk stops it. Every chunk starts at a key frame, so nothing is
decoded twice. A refusal by decord is not final: PyAV reads the video again, and can say what is wrong.

Where a GOP holds no wanted frame and `choice.exact_seek` holds, decord's own seek is not used to skip it. Its worker
thread runs ahead of the reader, so timing would decide whether it reaches a damaged packet and what the frames look
like: two of 2 500 fuzzed files differed from one decode to the next. Instead, the packets of the wanted GOPs are copied
into an in-memory file, which decord reads from front to back. Elsewhere a chunk with any wanted frame is read whole.

Known limit: decord does not report damage inside a picture that FFmpeg can conceal, where PyAV marks the frame. Of 45
copies of one H.264 file with 1 bit, 64 bytes or 4 KiB overwritten, both refused 12, PyAV alone refused 18 more, and 15
showed no damage with either. `--decoder pyav` is for archives where that matters more than speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from p3d.pipeline.decode.blocks import CHUNK_FRAMES, MESSAGE_FRAMES, chunk_bounds
from p3d.pipeline.decode.container import Source
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.choice import exact_seek, in_pieces
from p3d.pipeline.decode.seek import SelectiveDecodeError, cut, joined, opened, wanted_gops
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import Reason
from p3d.pipeline.types import INT64, UINT8, FrameBlock, FrameSpec

# The share of frames that decord may replace by a neighbour before it raises. Its default, -1, silently replaces any
# number; 0 is ignored (video_reader.cc); 0.0001 would accept one in 10 000 frames. It is a string with a decimal point,
# because video_reader.cc treats numbers without one as a count, and Python writes 1e-09.
FAULT_TOLERANCE = "0.000000001"

# Messages of decord that mean an unsupported kind of video. They matter for `--decoder decord`, where PyAV does not
# take over. All its other messages mean damaged data, in the words of the check that failed first.
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
    """decord cannot read this video, or raised partway. `str()` is one line without decord's time stamp."""

    @property
    def reason(self) -> Reason:
        """Unsupported video, or damaged data."""
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

    Times are the probe's (float64 from the packets); decord's own are float32, and wrong in some containers. Holds one
    GOP chunk of at most 256 cropped frames, and 64 resized frames.
    """
    assert found.start_s_N is not None and found.end_s_N is not None  # route: every frame has a time
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    gops = wanted_gops(found, numbers_M) if exact_seek(found) else []
    if gops and (len(gops) < len(found.key_frames) or in_pieces(found)):
        parts = _cut_chunks(found, spec, numbers_M, gops)
    else:
        parts = _whole_chunks(reader, found, spec, numbers_M)
    for numbers_N, frames_NHWC in parts:
        yield FrameBlock(numbers_N, found.start_s_N[numbers_N], found.end_s_N[numbers_N], frames_NHWC)


def _whole_chunks(reader: Any, found: Probe, spec: FrameSpec, numbers_M: INT64) -> Iterator[_Part]:
    """The wanted frames of each GOP chunk that has any; such a chunk is decoded whole."""
    for first, end in chunk_bounds(found.key_frames, found.n_frames):
        chunk_M = numbers_M[np.searchsorted(numbers_M, first) : np.searchsorted(numbers_M, end)]
        if len(chunk_M):
            yield from _read(reader, found, spec, chunk_M, first, end)


def _cut_chunks(found: Probe, spec: FrameSpec, numbers_M: INT64, gops: list[tuple[int, int]]) -> Iterator[_Part]:
    """The wanted frames of these GOPs, read from in-memory files of at most 256 frames (or one GOP, if longer)."""
    with opened(found) as source:
        while gops:
            sizes = np.cumsum([end - first for first, end in gops[:CHUNK_FRAMES]])
            n_gops = max(1, int(np.searchsorted(sizes, CHUNK_FRAMES, "right")))
            part, gops = gops[:n_gops], gops[n_gops:]
            in_file_N = np.concatenate([np.arange(first, end) for first, end in part])
            file_M = numbers_M[np.searchsorted(numbers_M, part[0][0]) : np.searchsorted(numbers_M, part[-1][1])]
            at_M = np.searchsorted(in_file_N, file_M)
            for at_N, frames_NHWC in _read_cut(source, found, spec, joined(part), len(in_file_N), at_M):
                yield in_file_N[at_N], frames_NHWC


def _read_cut(
    source: Source, found: Probe, spec: FrameSpec, gops: list[tuple[int, int]], n_frames: int, at_M: INT64
) -> list[_Part]:
    """Frames `at_M` of an in-memory file of these GOPs, which has `n_frames`."""
    try:
        with cut(source, found, gops) as path:
            reader = _reader(path, n_frames, spec.target_hw(*found.display_hw))
            return _read(reader, found, spec, at_M, 0, n_frames)
    except SelectiveDecodeError as error:
        raise DecordGaveUp(str(error)) from error


class _Batch:
    """Lets numpy use decord's own memory through DLPack; decord's `asnumpy` would copy it."""

    def __init__(self, frames: Any) -> None:
        self._frames = frames

    def __dlpack__(self, **options: Any) -> Any:
        return self._frames.to_dlpack()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0  # kDLCPU, device 0


def _read(reader: Any, found: Probe, spec: FrameSpec, chunk_M: INT64, first: int, end: int) -> list[_Part]:
    """Frames `chunk_M` of the reader's [first, end). The reader decodes all of [first, end) and is then stopped."""
    import decord

    height, width = spec.target_hw(*found.display_hw)
    parts: list[_Part] = []
    for at in range(first, end, MESSAGE_FRAMES):
        stop = min(at + MESSAGE_FRAMES, end)
        try:
            batch = reader.get_batch(list(range(at, stop)))
            if stop == end:
                reader.seek(0)  # first of all, or it decodes further ahead (a seek to `end` does nothing)
            frames_NHWC = np.from_dlpack(_Batch(batch)).view(np.uint8)
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as error:
            raise DecordGaveUp(_one_line(error)) from error
        if frames_NHWC.shape != (stop - at, height, width, 3):
            raise DecordGaveUp(f"frames of shape {frames_NHWC.shape} instead of {(stop - at, height, width, 3)}")
        part_N = chunk_M[np.searchsorted(chunk_M, at) : np.searchsorted(chunk_M, stop)]
        if len(part_N):
            cropped_NHWC = spec.cropped(frames_NHWC)
            parts.append((part_N, np.array(cropped_NHWC if len(part_N) == stop - at else cropped_NHWC[part_N - at])))
    return parts


def _one_line(error: BaseException) -> str:
    """decord's message without its `[HH:MM:SS] /github/workspace/...:` stamp and without the stack below it."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return line.rpartition(".cc:")[2] if ".cc:" in line else line
