"""Frames by PyAV: one stream decoded from front to back as the reader pulls, right for every container.

It decodes no further than requested, so a stalled reader costs nothing, and it applies the rotation. It also detects
damage: nothing is trusted after a decode error or a frame in which FFmpeg concealed damage.

Where enough frames need not be decoded and `choice.exact_seek` holds, `seek_pyav` decodes only what the wanted frames
need. Each frame must have exactly the time that the probe found for its number. Otherwise it raises
`SelectiveDecodeError`, and `read_pyav` decides whether the video is damaged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import chain

import av
import numpy as np
from av.stream import Stream
from av.video.stream import VideoStream

from p3d.pipeline.decode.blocks import MESSAGE_FRAMES
from p3d.pipeline.decode.container import Source, packets, raise_unless_damage
from p3d.pipeline.decode.decoder import DamagedPicture, Decode, decoding, one_thread
from p3d.pipeline.decode.picture import Scaler
from p3d.pipeline.decode.picture_packets import shows_picture
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.choice import exact_seek
from p3d.pipeline.decode.seek import SelectiveDecodeError, joined, needed_packets, number_at, opened, wanted_gops
from p3d.pipeline.decode.wanted_frames import Wanted, check_gap
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import INT64, UINT8, FrameBlock, FrameSpec, VideoEnd
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy

SILENT_FRAMES = 1024  # most frames that are decoded without a message


class _Damage(Exception):
    """The stream cannot be trusted from here on. `tail` is True if no frame was expected after it."""

    def __init__(self, words: str, tail: bool) -> None:
        super().__init__(words)
        self.words = words
        self.tail = tail


def read_pyav(
    found: Probe,
    spec: FrameSpec,
    wanted: Wanted,
    policy: DecodePolicy,
    limits: DecodeLimits,
    source: Source | None = None,
) -> Iterator[FrameBlock | VideoEnd]:
    """The wanted frames in blocks of at most 64, then one VideoEnd with the true count.

    An open `source` is used if it can be rewound (`choice.exact_seek`). If few frames are wanted, a block still comes
    every SILENT_FRAMES frames, even an empty one, so that the caller sees progress before its deadline.

    Under `partial="fail"`, damage raises VideoError (corrupt_frames, or truncated at the end of the file). Under "keep"
    the video ends after the last good frame, with `truncated=True`. No good frame at all raises no_frames either way.
    Holds one block of cropped frames, one decoded picture and the decoder's own references.
    """
    scaler = Scaler(spec, found.display_hw, found.turn)
    clock = _Clock(found)
    block = _Block(spec)
    held: av.VideoFrame | None = None  # the previous frame, which ends when the next one starts
    n_frames, silent, truncated = 0, 0, bool(found.truncated)
    try:
        for frame in _good_frames(found, limits, source):
            start_s = clock.tick(frame)
            check_gap(wanted.sampling, start_s - clock.before_s)
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
            detail = f"{damage.words} after {n_frames} of {found.n_frames} frames"
            raise VideoError(reason, detail) from damage.__cause__
        if not n_frames and _decodes_later(found, limits):
            detail = f"{damage.words} in the first frame; no frame comes before the damage, but later ones decode"
            raise VideoError(Reason.CORRUPT_FRAMES, detail) from damage.__cause__
        if not n_frames:
            detail = f"{damage.words} before any frame was decoded ({_tried(found)})"
            raise VideoError(Reason.NO_FRAMES, detail) from damage.__cause__
        truncated = True
    if not n_frames:
        raise VideoError(Reason.NO_FRAMES, f"no frame came out of {found.n_packets} packets ({_tried(found)})")
    if held is not None and wanted.has(n_frames - 1, clock.now_s, clock.end_s):
        block.add(n_frames - 1, clock.now_s, clock.end_s, scaler.picture(held))
    if len(block):
        yield block.take()
    yield VideoEnd(n_frames, clock.end_s, truncated)


def seek_pyav(
    found: Probe, spec: FrameSpec, wanted: Wanted, limits: DecodeLimits, source: Source | None = None
) -> Iterator[FrameBlock]:
    """The wanted frames of a video with exact seek, in blocks of at most 64, decoding only what they need.

    Empty blocks show progress, as in `read_pyav`. SelectiveDecodeError at the first frame that is not as the probe
    found it; blocks sent before are right.
    """
    assert found.start_s_N is not None and found.end_s_N is not None  # exact_seek: every frame has a time
    scaler, block, silent = Scaler(spec, found.display_hw, found.turn), _Block(spec), 0
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    with _opened(found, limits, source) as here:
        for first, end in joined(wanted_gops(found, numbers_M)):
            range_M = numbers_M[np.searchsorted(numbers_M, first) : np.searchsorted(numbers_M, end)]
            in_range = set(range_M.tolist())
            for number, frame in _proved_frames(here, found, range_M, first, end):
                silent += 1
                if number in in_range:
                    start_s, end_s = float(found.start_s_N[number]), float(found.end_s_N[number])
                    block.add(number, start_s, end_s, scaler.picture(frame))
                if len(block) == MESSAGE_FRAMES or silent == SILENT_FRAMES:
                    yield block.take()
                    silent = 0
    if len(block):
        yield block.take()


def _proved_frames(
    source: Source, found: Probe, range_M: INT64, first: int, end: int
) -> Iterator[tuple[int, av.VideoFrame]]:
    """(number, frame) of all that is decoded for `range_M`, in the GOPs [first, end), each identified by its time.

    SelectiveDecodeError unless exactly the frames whose packets were sent are returned, in order.
    """
    sent, last = set[int](), first - 1
    try:
        for frame in _decoded(source, found, range_M, first, end, sent):
            if frame.is_corrupt:
                raise SelectiveDecodeError(f"damaged data after frame {last}")
            number = number_at(found, source, frame.pts)
            if number <= last or number not in sent:
                raise SelectiveDecodeError(f"frame {number} came after frame {last}")
            sent.remove(number)
            last = number
            yield number, frame
    except av.error.MemoryError:
        raise
    except (av.error.FFmpegError, DamagedPicture) as error:
        raise SelectiveDecodeError(f"invalid data after frame {last}") from error
    if sent:
        raise SelectiveDecodeError(f"frame {min(sent)} is missing")


def _decoded(
    source: Source, found: Probe, range_M: INT64, first: int, end: int, sent: set[int]
) -> Iterator[av.VideoFrame]:
    """All frames of the needed packets; the decoder is drained. Adds the number of each packet's frame to `sent`."""
    decode = decoding(source.stream)
    for number, packet in needed_packets(source, found, range_M, first, end):
        sent.add(number)
        yield from decode(packet)
    yield from decode(None)


@contextlib.contextmanager
def _opened(found: Probe, limits: DecodeLimits, source: Source | None) -> Iterator[Source]:
    """The source; without one, the file opened again, with a decoder that uses one thread."""
    if source is not None:
        yield source
        return
    with opened(found) as reopened:
        one_thread(reopened.stream, limits)
        yield reopened


def _good_frames(found: Probe, limits: DecodeLimits, source: Source | None) -> Iterator[av.VideoFrame]:
    """Presentable frames in order. Raises _Damage at the first damage."""
    rewound = _rewound(found, source)
    with _opened(found, limits, source if rewound else None) as here:
        decode, n_sent, n_shown = decoding(here.stream), 0, 0
        try:
            for packet in rewound or packets(here.container, here.stream):
                if packet.size:
                    n_sent += 1
                elif packet.pts is not None or packet.dts is not None:
                    continue  # an empty sample, which the decoder would take for the flush at the end
                is_cut = bool(found.truncated) and (
                    not packet.size or (packet.is_corrupt and n_sent >= found.n_packets)
                )
                if is_cut and n_shown:
                    return  # the decoder holds later frames, but some that are shown before them may be missing
                for frame in _pictures(here.stream, decode, packet, n_sent >= found.n_packets):
                    if frame.is_corrupt:
                        raise _Damage("damaged data", n_shown >= found.n_frames - 1)
                    n_shown += 1
                    yield frame
                    if is_cut:
                        return
        except av.error.FFmpegError as error:
            raise_unless_damage(error, found.path)
            raise _Damage("invalid data", n_sent >= found.n_packets) from error


def _tried(found: Probe) -> str:
    """What was tried on a video without frames, so that it can be compared with what plays it."""
    return f"tried the decoder {found.codec} of PyAV on stream {found.stream_index} of {found.container}"


def _decodes_later(found: Probe, limits: DecodeLimits) -> bool:
    """Does any packet decode to a good frame, if errors are skipped?"""
    with _opened(found, limits, None) as here:
        decode = decoding(here.stream)
        try:
            for packet in packets(here.container, here.stream):
                with contextlib.suppress(_Damage):
                    if any(not frame.is_corrupt for frame in _pictures(here.stream, decode, packet, False)):
                        return True
        except av.error.FFmpegError as error:
            raise_unless_damage(error, found.path)
    return False


def _rewound(found: Probe, source: Source | None) -> Iterator[av.Packet[Stream]] | None:
    """The packets of an open source from the first one on; None if only a newly opened file is sure to give them."""
    if source is None or not exact_seek(found):
        return None
    try:
        source.container.seek(int(found.key_dts_K[0]), stream=source.stream, backward=True, any_frame=False)
        stored = packets(source.container, source.stream)
        first = next(stored)
    except av.error.FFmpegError:
        return None
    return chain([first], stored) if first.size and first.pts == found.key_pts_K[0] else None


def _pictures(stream: VideoStream, decode: Decode, packet: av.Packet[Stream], tail: bool) -> list[av.VideoFrame]:
    """The frames that a packet decodes to. Decoders read no files, so any error concerns the packet's data.

    Their error codes for damage vary: GIF's is "operation not permitted", others name an external library or a bug.
    """
    context = stream.codec_context
    try:
        return decode(packet)
    except av.error.MemoryError:
        raise
    except DamagedPicture as error:
        raise _Damage(str(error), tail) from error
    except (av.error.PatchWelcomeError, av.error.NotImplementedError, av.error.DecoderNotFoundError) as error:
        raise VideoError(Reason.UNSUPPORTED, f"FFmpeg cannot decode {context.name}: {error.strerror}") from error
    except av.error.ArgumentError as error:
        if not context.width:  # FFmpeg sets the width to 0 when it refuses a size
            limit = context.options.get("max_pixels")
            detail = f"a picture is larger than the limit of {limit} pixels (max_pixels)"
            raise VideoError(Reason.TOO_LARGE, detail) from error
        raise _Damage("invalid data", tail) from error
    except av.error.FFmpegError as error:
        if not shows_picture(context.codec.canonical_name, context.extradata or b"", memoryview(packet)):
            return []  # such as H.264 parameter sets or filler as a sample of their own
        raise _Damage("invalid data", tail) from error


class _Clock:
    """When each frame is shown, in seconds from the first one.

    Times come from the pts. If a pts is missing or not after the previous frame, the frame is shown one frame (1/fps)
    after it, so times always rise. H.264 in AVI and the files of some recorders need this.
    """

    def __init__(self, found: Probe) -> None:
        self._step_s = 1 / found.fps
        self._first: int | None = None
        self._scale = 0.0  # seconds per tick, cached because a time base is a Fraction and slow to make
        self._last_duration_s = 0.0
        self.before_s = 0.0
        self.now_s = -self._step_s

    def tick(self, frame: av.VideoFrame) -> float:
        """Start of this frame in seconds. Sets `before_s` to the start of the previous frame."""
        if self._first is None:
            self._scale = float(frame.time_base or 0)
        scale = self._scale
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
        """End of the last frame in seconds, from its own duration, or 1/fps if it has none."""
        return self.now_s + (self._last_duration_s if self._last_duration_s > 0 else self._step_s)


class _Block:
    """Frames waiting to be sent. Each is copied once, from the scaler's picture to the message's array."""

    def __init__(self, spec: FrameSpec) -> None:
        self._frame_shape = (*spec.crop_hw, 3)
        self._start_over(0)

    def _start_over(self, capacity: int) -> None:
        self._numbers: list[int] = []
        self._start_s: list[float] = []
        self._end_s: list[float] = []
        self._frames_NHWC: UINT8 = np.empty((capacity, *self._frame_shape), np.uint8)

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int, start_s: float, end_s: float, frame_HWC: UINT8) -> None:
        if not self._numbers:
            self._start_over(MESSAGE_FRAMES)
        self._frames_NHWC[len(self._numbers)] = frame_HWC
        self._numbers.append(number)
        self._start_s.append(start_s)
        self._end_s.append(end_s)

    def take(self) -> FrameBlock:
        """All frames as one message; the block is empty afterwards."""
        numbers_N = np.array(self._numbers, np.int64)
        start_s_N, end_s_N = np.array(self._start_s, np.float64), np.array(self._end_s, np.float64)
        block = FrameBlock(numbers_N, start_s_N, end_s_N, self._frames_NHWC[: len(numbers_N)])
        self._start_over(0)
        return block
