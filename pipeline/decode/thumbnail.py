"""Small JPEG pictures of a video at given seconds, for display only: they never enter the output rows.

    VideoRef, seconds ──> thumbnails_in_child ──> child: thumbnails ──seek, decode, turn, scale──> Thumbnail | Failure

A picture is found by a seek to the key frame before its second, without the probe's pass over the whole file. It is the
frame on screen at that second by its own time stamp. FFmpeg's mjpeg encoder makes the JPEG. Files are not trusted, so a
child process decodes them. Only a video of a manifest is opened, after a check that it is the one that was planned.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from p3d.pipeline.decode.child import in_a_child
from p3d.pipeline.decode.container import open_container, packets
from p3d.pipeline.decode.decoder import one_thread
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.messages import failures_as_values
from p3d.pipeline.decode.picture import Orientation, Scaler, orientation
from p3d.pipeline.decode.picture_packets import shows_picture
from p3d.pipeline.decode.probe import check_limits, pixel_aspect, stated_fps
from p3d.pipeline.decode.sniff import check_file
from p3d.pipeline.decode.streams import best_stream
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import UINT8, Failure, FrameSpec, VideoRef
from p3d.pipeline.types.policy import DecodeLimits

LONGEST_SIDE = 320
TIMEOUT_S = 30.0  # for one picture; for the first one, including the download from S3
FETCH_BYTES = 512 * 1024**2  # largest video that is downloaded from S3 for a picture
QUALITY = 4  # FFmpeg's scale is 1 (best) to 31; 4 gives about 12 kB for a picture of 320x180
FF_QP2LAMBDA = 118  # FFmpeg's own name for the scale of `global_quality`
SEEK_EARLIER_S = 10.0  # how much earlier the second attempt seeks
DV_FRAME_BYTES = (120_000, 144_000)  # NTSC and PAL; other kinds of DV have multiples
ROUNDING_S = 1e-4  # in float64, 7600 ticks of a millisecond are slightly more than 7.6 s


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """An upright JPEG of `width` x `height` square pixels; `at_s` is the time at which its frame is first shown.

    `at_s` is in seconds from the first frame. It is at or before the requested second, except where the first
    frame is later.
    """

    at_s: float
    width: int
    height: int
    jpeg: bytes = field(repr=False)


def thumbnails_in_child(
    video: VideoRef,
    seconds: Sequence[float],
    *,
    store_options: StoreOptions,
    scratch: Path,
    longest_side: int = LONGEST_SIDE,
    limits: DecodeLimits = DecodeLimits(),  # noqa: B008 - frozen
    fetch_bytes: int = FETCH_BYTES,
    timeout_s: float = TIMEOUT_S,
) -> list[Thumbnail | Failure]:
    """A picture for each of `seconds`, or a Failure. They are made in a child process, which costs about 0.3 s.

    Both sides are at most `longest_side` pixels and never more than the video has. `timeout_s` is the longest wait for
    one picture, after which the child is killed. A video on S3 is copied to `scratch` temporarily; over `fetch_bytes`
    it fails as `too_large`. StoreError propagates. RuntimeError if no child starts.
    """
    if video.uri.startswith("s3://") and video.size_bytes > fetch_bytes:
        detail = f"{video.size_bytes} bytes to fetch for a picture; the limit is {fetch_bytes}"
        return [Failure(Reason.TOO_LARGE, detail)] * len(seconds)
    named = {"store_options": store_options, "scratch": scratch, "longest_side": longest_side, "limits": limits}
    with closing(in_a_child(thumbnails, (video, tuple(seconds)), named, timeout_s=timeout_s)) as messages:
        found = list(messages)[: len(seconds)]
    # a single Failure comes last if the video as a whole cannot be used
    return [*found, *found[-1:] * (len(seconds) - len(found))]


def thumbnails(
    video: VideoRef,
    seconds: Sequence[float],
    *,
    store_options: StoreOptions,
    scratch: Path,
    longest_side: int,
    limits: DecodeLimits,
) -> Iterator[Thumbnail | Failure]:
    """As `thumbnails_in_child`, but in this process, and with a single Failure if the video cannot be opened at all."""

    def each() -> Iterator[Thumbnail | Failure]:
        with local_file(video, store_options, scratch) as path:
            for second in seconds:
                yield from failures_as_values(_thumbnail(path, second, longest_side, limits))

    yield from failures_as_values(each())


def _thumbnail(path: str, second: float, longest_side: int, limits: DecodeLimits) -> Iterator[Thumbnail]:
    at_s, frame, turn, aspect = _frame_at(path, second, limits)
    shown_hw = turn.shown_hw(frame.height, max(1, round(frame.width * aspect)))
    scale = min(1.0, longest_side / max(shown_hw))
    height, width = (max(1, round(side * scale)) for side in shown_hw)
    scaler = Scaler(FrameSpec(crop_hw=(height, width), resize_hw=(height, width)), shown_hw, turn)
    yield Thumbnail(at_s, width, height, jpeg_of(scaler.picture(frame)))


def _frame_at(path: str, second: float, limits: DecodeLimits) -> tuple[float, av.VideoFrame, Orientation, float]:
    """(start in seconds, frame on screen at `second`, its turn, pixel aspect); VideoError if there is no frame.

    Time and turn are those of the rows: counted from the first frame, and as the first frame says. Some demuxers land
    after the target of a seek, or cannot seek. Then the seek goes further back, and the last attempt reads from the
    start.
    """
    absolute, _ = check_file(path, limits)
    is_avi = False
    for back_s in (0.0, SEEK_EARLIER_S, None):
        with open_container(absolute, ignore_index=is_avi and back_s is None) as container:
            is_avi = container.format.name == "avi"  # a damaged index ends a seek at the wrong frame
            stream, _ = best_stream(container)
            check_limits(stream, limits)
            one_thread(stream, limits)
            frames = _frames(container, stream)
            first = next(frames, None)
            if first is None:
                continue
            if back_s is None:
                frames = chain([first], frames)
            elif _sought(container, stream, first, second - back_s):
                frames = _frames(container, stream)
            else:
                continue
            best, followed = None, False
            for at_s, frame in _timed(frames, stream, first, from_start=back_s is None):
                if at_s > second + ROUNDING_S and best is not None:
                    followed = True
                    break
                best = at_s, frame
            sure = best is not None and best[0] <= second + ROUNDING_S and (followed or not is_avi)
            if best is not None and (sure or back_s is None):
                return max(0.0, best[0]), best[1], orientation(first), pixel_aspect(stream)
    raise VideoError(Reason.NO_FRAMES, f"no frame can be decoded for second {second:g}")


def _frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """The frames from here on, up to the first damage."""
    codec, extradata = stream.codec_context.codec.canonical_name, stream.codec_context.extradata or b""
    try:
        for packet in packets(container, stream):
            try:
                frames = stream.decode(packet)
            except av.error.InvalidDataError:
                if shows_picture(codec, extradata, memoryview(packet)):
                    return
                continue  # such as parameter sets as a sample of their own
            yield from frames
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        return


def _sought(container: InputContainer, stream: VideoStream, first: av.VideoFrame, second: float) -> bool:
    """Seek to the key frame at or before `second`. True if the demuxer reports success."""
    size = os.path.getsize(container.name)  # noqa: PTH202 - names that are not UTF-8
    if not stream.time_base or (container.format.name == "dv" and all(size % frame for frame in DV_FRAME_BYTES)):
        return False  # the demuxer of DV divides the file into frames by its size, which padding changes
    try:
        at = (first.pts or 0) + int(max(second, 0.0) / float(stream.time_base))
        container.seek(at, stream=stream, backward=True, any_frame=False)
    except av.error.MemoryError:
        raise
    except (av.error.FFmpegError, OverflowError):
        return False
    return True


def _timed(
    frames: Iterator[av.VideoFrame], stream: VideoStream, first: av.VideoFrame, *, from_start: bool
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(second, frame) of the good frames. A frame without a time is counted; after a seek, it ends them."""
    tick_s, fps = float(stream.time_base or 0), stated_fps(stream)
    for number, frame in enumerate(frames):
        timed = frame.pts is not None and first.pts is not None and tick_s > 0
        if not timed and not from_start:
            return
        if not frame.is_corrupt:
            yield (frame.pts - first.pts) * tick_s if timed else number / fps, frame  # type: ignore[operator] # timed


def jpeg_of(frame_HWC: UINT8) -> bytes:
    """RGB pixels [H, W, 3], uint8 -> a JPEG file with the colour space of JFIF: BT.601, full range."""
    height, width = frame_HWC.shape[:2]
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)  # the encoder requires one
    encoder.options = {"flags": "+qscale+bitexact", "global_quality": str(QUALITY * FF_QP2LAMBDA)}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    picture = frame.reformat(format="yuvj420p", dst_colorspace="ITU601", dst_color_range="JPEG")
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
