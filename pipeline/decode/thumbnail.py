"""Small pictures of a video at given seconds, as JPEG: for people to look at, never for rows.

    VideoRef, seconds ──> thumbnails_apart ──> child: thumbnails ──seek, decode, turn, scale──> Thumbnail | Failure

A picture is found by a seek to the key frame before its second, without the probe's pass over the whole file, and is
the frame on screen at that second by its own time stamp. FFmpeg's mjpeg encoder makes the JPEG. Files are not to be
trusted, so a child decodes them; only a video of a manifest, proved to be the one that was planned, is opened.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from p3d.pipeline.decode.child import in_a_child
from p3d.pipeline.decode.fetch import local_file
from p3d.pipeline.decode.messages import failures_as_values
from p3d.pipeline.decode.picture import Scaler, orientation
from p3d.pipeline.decode.policy import DecodeLimits
from p3d.pipeline.decode.probe import ASSUMED_FPS, best_stream, check_limits, open_container, packets, pixel_aspect
from p3d.pipeline.decode.sniff import check_file
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.storage.store import StoreOptions
from p3d.pipeline.types import UINT8, Failure, FrameSpec, VideoRef

LONGEST_SIDE = 320
TIMEOUT_S = 30.0  # for one picture; the first one's time includes fetching the video from S3
FETCH_BYTES = 512 * 1024**2  # of a video on S3, at most: a picture is not worth more
QUALITY = 4  # of FFmpeg's 1 (best) to 31: about 12 kB for a picture of 320x180
FF_QP2LAMBDA = 118  # FFmpeg's own name for the scale of `global_quality`
SEEK_EARLIER_S = 10.0  # of a second try
ROUNDING_S = 1e-4  # 7600 ticks of a millisecond are a little more than 7.6


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """A JPEG of `width` x `height` square pixels, the right way up; `at_s` is when its frame comes on screen.

    Seconds from the start of the stream. `at_s` is at or before the second that was asked for, or that of the first
    frame there is.
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
    """A picture for each of `seconds`, or why there is none; made in a child, which costs about a third of a second.

    Both sides are at most `longest_side` pixels and never more than the video has. `timeout_s` is the longest wait for
    one picture, after which the child is killed. A video on S3 is copied to `scratch` for as long as it takes, and is
    `too_large` beyond `fetch_bytes`. StoreError passes; RuntimeError if no child starts.
    """
    if video.uri.startswith("s3://") and video.size_bytes > fetch_bytes:
        sentence = f"{video.size_bytes} bytes to fetch for a picture; the limit is {fetch_bytes}"
        return [Failure(Reason.TOO_LARGE, sentence)] * len(seconds)
    named = {"store_options": store_options, "scratch": scratch, "longest_side": longest_side, "limits": limits}
    with closing(in_a_child(thumbnails, (video, tuple(seconds)), named, timeout_s=timeout_s)) as messages:
        found = list(messages)[: len(seconds)]
    # one Failure ends them where the video as a whole cannot be used
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
    """The child's part: as `thumbnails_in_child`, but a single Failure where the video cannot be had at all."""

    def each() -> Iterator[Thumbnail | Failure]:
        with local_file(video, store_options, scratch) as path:
            for second in seconds:
                yield from failures_as_values(_thumbnail(path, second, longest_side, limits))

    yield from failures_as_values(each())


def _thumbnail(path: str, second: float, longest_side: int, limits: DecodeLimits) -> Iterator[Thumbnail]:
    at_s, frame, aspect = _frame_at(path, second, limits)
    turn = orientation(frame)
    shown_hw = turn.shown_hw(frame.height, max(1, round(frame.width * aspect)))
    scale = min(1.0, longest_side / max(shown_hw))
    height, width = (max(1, round(side * scale)) for side in shown_hw)
    scaler = Scaler(FrameSpec(crop_hw=(height, width), resize_hw=(height, width)), shown_hw, turn)
    yield Thumbnail(at_s, width, height, jpeg_of(scaler.picture(frame)))


def _frame_at(path: str, second: float, limits: DecodeLimits) -> tuple[float, av.VideoFrame, float]:
    """(its second, the frame that is on screen at `second`, the aspect of its pixels); VideoError if there is none.

    Some demuxers land behind where they were sent, or cannot be sent: then from earlier on, at last from the start.
    """
    absolute, _ = check_file(path, limits)
    for back_s in (0.0, SEEK_EARLIER_S, None):
        with open_container(absolute) as container:
            stream = best_stream(container)
            check_limits(stream, container, limits)
            stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}
            stream.codec_context.thread_type, stream.codec_context.thread_count = "NONE", 1
            if back_s is not None and not _sought(container, stream, second - back_s):
                continue
            best = None
            for at_s, frame in _timed(container, stream, from_start=back_s is None):
                if at_s > second + ROUNDING_S and best is not None:
                    break
                best = at_s, frame
            if best is not None and (best[0] <= second + ROUNDING_S or back_s is None):
                return max(0.0, best[0]), best[1], pixel_aspect(stream)
    raise VideoError(Reason.NO_FRAMES, f"no frame can be decoded for second {second:g}")


def _sought(container: InputContainer, stream: VideoStream, second: float) -> bool:
    """Is the container now at a key frame at or before `second`, or so it says?"""
    if not stream.time_base:
        return False
    try:
        at = (stream.start_time or 0) + int(max(second, 0.0) / float(stream.time_base))
        container.seek(at, stream=stream, backward=True, any_frame=False)
    except av.error.MemoryError:
        raise
    except (av.error.FFmpegError, OverflowError):
        return False
    return True


def _timed(
    container: InputContainer, stream: VideoStream, *, from_start: bool
) -> Iterator[tuple[float, av.VideoFrame]]:
    """(second, frame) up to the first damage. A frame without a time is counted from the start, or ends them."""
    tick_s, fps = float(stream.time_base or 0), float(stream.average_rate or stream.guessed_rate or ASSUMED_FPS)
    number, start = 0, stream.start_time or 0
    try:
        for packet in packets(container, stream):
            for frame in stream.decode(packet):
                timed = frame.pts is not None and tick_s > 0
                if not timed and not from_start:
                    return
                if not frame.is_corrupt:
                    yield (frame.pts - start) * tick_s if timed and frame.pts is not None else number / fps, frame
                number += 1
    except av.error.MemoryError:
        raise
    except av.error.FFmpegError:
        return


def jpeg_of(frame_HWC: UINT8) -> bytes:
    """RGB pixels [H, W, 3] -> a JPEG file, in the colours of JFIF: BT.601, full range."""
    height, width = frame_HWC.shape[:2]
    encoder = av.CodecContext.create("mjpeg", "w")
    assert isinstance(encoder, VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = Fraction(1, 25)  # it wants one
    encoder.options = {"flags": "+qscale+bitexact", "global_quality": str(QUALITY * FF_QP2LAMBDA)}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_HWC), format="rgb24")
    picture = frame.reformat(format="yuvj420p", dst_colorspace="ITU601", dst_color_range="JPEG")
    return b"".join(bytes(packet) for packet in [*encoder.encode(picture), *encoder.encode(None)])
