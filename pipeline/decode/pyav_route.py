"""Frames by PyAV: one stream decoded from front to back, pulled by the reader, right for every container.

It decodes no further than it is asked (a stalled reader costs nothing), applies the rotation, and is the judge of
damage: a decode error, or a frame that FFmpeg had to conceal, is the end of what can be trusted.
"""

from __future__ import annotations

from collections.abc import Iterator

import av
import numpy as np
from av.stream import Stream
from av.video.stream import VideoStream

from pipeline.decode.decord_route import MESSAGE_FRAMES
from pipeline.decode.picture import Scaler
from pipeline.decode.policy import DecodeLimits, DecodePolicy
from pipeline.decode.probe import Probe, open_container, packets, refuse_trouble_of_the_machine
from pipeline.decode.wanted import Wanted
from pipeline.errors import Reason, VideoError
from pipeline.types import UINT8, FrameBlock, FrameSpec, VideoEnd

SILENT_FRAMES = 1024  # decoded frames without a message, at most


class _Damage(Exception):
    """The stream cannot be trusted from here on; `tail` when nothing was to come after it."""

    def __init__(self, words: str, tail: bool) -> None:
        super().__init__(words)
        self.words = words
        self.tail = tail


def read_pyav(
    found: Probe, spec: FrameSpec, wanted: Wanted, policy: DecodePolicy, limits: DecodeLimits
) -> Iterator[FrameBlock | VideoEnd]:
    """The wanted frames in blocks of at most 64, then one VideoEnd with the true count.

    Where few frames are wanted, a block comes every SILENT_FRAMES frames all the same, empty if need be: a sign of life
    for the caller's deadline.

    Damage is VideoError (corrupt_frames, or truncated at the end of the file) under `partial="fail"`; under "keep"
    it ends the video after the last good frame, with `truncated=True`. No good frame at all is no_frames either way.
    Holds one block of cropped frames, one decoded picture and the decoder's own references.
    """
    scaler = Scaler(spec, found.display_hw, found.turn)
    clock = _Clock(found)
    block = _Block(spec)
    held: av.VideoFrame | None = None  # the frame before, whose end is the start of the next one
    n_frames, silent, truncated = 0, 0, bool(found.truncated)
    try:
        for frame in _good_frames(found, limits):
            start_s = clock.tick(frame)
            if held is not None and wanted.has(n_frames - 1, clock.before_s, start_s):
                block.add(n_frames - 1, clock.before_s, start_s, scaler.picture(held))
            silent += 1
            if len(block) == MESSAGE_FRAMES or silent == SILENT_FRAMES:
                yield block.take()
                silent = 0
            held = frame
            n_frames += 1
    except _Damage as damage:
        if n_frames and policy.partial == "fail":
            reason = Reason.TRUNCATED if damage.tail else Reason.CORRUPT_FRAMES
            sentence = f"{damage.words} after {n_frames} of {found.n_frames} frames"
            raise VideoError(reason, sentence) from damage.__cause__
        if not n_frames:
            raise VideoError(Reason.NO_FRAMES, f"{damage.words} before any frame was decoded") from damage.__cause__
        truncated = True
    if not n_frames:
        raise VideoError(Reason.NO_FRAMES, f"no frame came out of {found.n_packets} packets")
    if held is not None and wanted.has(n_frames - 1, clock.now_s, clock.end_s):
        block.add(n_frames - 1, clock.now_s, clock.end_s, scaler.picture(held))
    if len(block):
        yield block.take()
    yield VideoEnd(n_frames, clock.end_s, truncated)


def _good_frames(found: Probe, limits: DecodeLimits) -> Iterator[av.VideoFrame]:
    """Presentable frames in order, up to the first damage (raised)."""
    with open_container(found.path) as container:
        stream = container.streams[found.stream_index]
        if not isinstance(stream, VideoStream):
            raise VideoError(Reason.SOURCE_CHANGED, f"stream {found.stream_index} is no video any more")
        stream.codec_context.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": str(limits.max_pixels)}  # of a picture in mid-stream, too
        n_sent = n_shown = 0
        try:
            for packet in packets(container, stream):
                if packet.size:
                    n_sent += 1
                elif packet.pts is not None or packet.dts is not None:
                    continue  # an empty sample; sent on, it would end the decoder as the flush does
                for frame in _pictures(stream, packet, n_sent >= found.n_packets):
                    if frame.is_corrupt:
                        raise _Damage("damaged data", n_shown >= found.n_frames - 1)
                    n_shown += 1
                    yield frame
        except av.error.FFmpegError as error:
            refuse_trouble_of_the_machine(error, found.path)
            raise _Damage("invalid data", n_sent >= found.n_packets) from error


def _pictures(stream: VideoStream, packet: av.Packet[Stream], tail: bool) -> list[av.VideoFrame]:
    """What a packet decodes to. Whatever a decoder says of it is about its data: decoders read no files.

    They have many words for damage: GIF's is "operation not permitted", others name an external library or a bug.
    """
    context = stream.codec_context
    try:
        return stream.decode(packet)
    except av.error.MemoryError:
        raise
    except (av.error.PatchWelcomeError, av.error.NotImplementedError, av.error.DecoderNotFoundError) as error:
        raise VideoError(Reason.UNSUPPORTED, f"FFmpeg cannot decode {context.name}: {error.strerror}") from error
    except av.error.ArgumentError as error:
        if not context.width:  # what FFmpeg leaves of a size that it refused
            limit = context.options.get("max_pixels")
            sentence = f"a picture is larger than the limit of {limit} pixels (max_pixels)"
            raise VideoError(Reason.TOO_LARGE, sentence) from error
        raise _Damage("invalid data", tail) from error
    except av.error.FFmpegError as error:
        raise _Damage("invalid data", tail) from error


class _Clock:
    """When each frame is shown, in seconds from the first one.

    By its pts. One that is missing, or does not come after the frame before, is placed one frame (1/fps) later, so
    that times always rise: h264 in AVI and some recorders need it.
    """

    def __init__(self, found: Probe) -> None:
        self._step_s = 1 / found.fps
        self._first: int | None = None
        self._last_duration_s = 0.0
        self.before_s = 0.0
        self.now_s = -self._step_s

    def tick(self, frame: av.VideoFrame) -> float:
        """Start of this frame; `before_s` is then that of the frame before."""
        scale = float(frame.time_base) if frame.time_base else 0.0
        self.before_s = self.now_s
        start_s = self.now_s + self._step_s
        if frame.pts is not None and scale:
            if self._first is None:
                self._first = frame.pts - round(start_s / scale)
            by_pts_s = (frame.pts - self._first) * scale
            start_s = by_pts_s if by_pts_s > self.before_s else start_s
        self.now_s = start_s
        self._last_duration_s = (frame.duration or 0) * scale
        return start_s

    @property
    def end_s(self) -> float:
        """End of the frame that was ticked last: its own duration, 1/fps where it has none."""
        return self.now_s + (self._last_duration_s if self._last_duration_s > 0 else self._step_s)


class _Block:
    """Frames waiting to be sent."""

    def __init__(self, spec: FrameSpec) -> None:
        self._nothing = np.empty((0, *spec.crop_hw, 3), np.uint8)
        self._numbers: list[int] = []
        self._times: list[tuple[float, float]] = []
        self._frames: list[UINT8] = []

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, start_s: float, end_s: float, frame_HWC: UINT8) -> None:
        self._numbers.append(number)
        self._times.append((start_s, end_s))
        self._frames.append(frame_HWC)

    def take(self) -> FrameBlock:
        """All of them as one message, and start anew."""
        times_N2 = np.asarray(self._times, np.float64).reshape(-1, 2)
        numbers_N = np.asarray(self._numbers, np.int64)
        block = FrameBlock(
            numbers_N,
            times_N2[:, 0].copy(),
            times_N2[:, 1].copy(),
            np.stack(self._frames) if self._frames else self._nothing,
        )
        for kept in (self._numbers, self._times, self._frames):
            kept.clear()
        return block
