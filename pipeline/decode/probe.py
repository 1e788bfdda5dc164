"""What a file holds, from one pass over its packets before a decoder is chosen.

Frame counts in containers can be wrong: decord's `len()` said 431 where 300 frames exist, and reading them never
returned. So everything a route relies on is counted here from the packets: how many there are, how many the edit list
discards, which are key frames, and when each frame is shown. A pass costs 1-5 ms for small files and one read of the
file for large ones. Only the first picture is decoded, for its orientation and pixel format.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction

import av
import numpy as np
from av.container import InputContainer
from av.stream import Stream
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from p3d.pipeline.decode.container import FRAMES_ONLY, Source, open_container, packets, raise_unless_damage
from p3d.pipeline.decode.deadlines import Progress
from p3d.pipeline.decode.decoder import one_thread
from p3d.pipeline.decode.endings import Ending, ending, next_frame_bytes
from p3d.pipeline.decode.key_frames import KeyFrame, all_proved, key_frame
from p3d.pipeline.decode.picture import UPRIGHT, Orientation, orientation
from p3d.pipeline.decode.picture_packets import shows_picture
from p3d.pipeline.decode.skippable_frames import layer_of
from p3d.pipeline.decode.sniff import check_file, is_encrypted_iso, is_scrambled
from p3d.pipeline.decode.streams import best_stream
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import BOOL, FLOAT64, INT64
from p3d.pipeline.types.policy import DecodeLimits

RAW_STREAMS = frozenset(("h264", "hevc", "m4v", "mpegvideo", "vc1", "obu"))  # containers that hold no times
ASSUMED_FPS = 25.0  # for a stream that states neither a rate nor a duration
FIRST_PICTURE_PACKETS = 64  # how many packets the probe may decode while it looks for the first picture
MOST_ASPECT = 8.0  # largest pixel aspect ratio, either way; more than that is taken for nonsense
_NONE = np.empty(0, np.int64)
GAP_S = 10.0  # a longer interval between two frames is a gap, and says nothing about the frame rate
RATE_ERROR = 0.01  # largest relative error of a stated frame rate that is used


@dataclass(frozen=True, slots=True)
class Probe:
    """What one file holds: the facts by which `route` decides and on which all routes rely.

    `n_frames` counts presentable frames: packets minus `n_discarded` and minus `n_pictureless`, those that show no
    picture (`decode.picture_packets`). `n_promised` is the container's own count, 0 if
    it has none. `truncated` says in words how the file is cut short; it is empty for a whole file. `start_s_N` and
    `end_s_N` are the times of the presentable frames in seconds from the first one. They are None when the packets do
    not give each frame its own time. `key_frames` are the presentation numbers of the key frames. `closed_gops` is
    False when one of them has different positions in stored and in shown order (open GOPs: frames shown before the key
    frame need the GOP before). `proved_keys` says that the bytes of each key frame prove a clean start
    (`decode.key_frames`). `key_pts_K` and `key_dts_K` are their time stamps as stored, in ticks of the stream's time
    base; `first_pts` is that of the first frame. `skippable_N` is True for each presentable frame to which no other
    refers (`decode.skippable_frames`); None if the caller did not ask, or if the packets do not give each frame a time.
    `stream_why` says why this stream was chosen; it is empty if the file has only one. `fps_estimated` says that `fps`
    is that of the times of the frames, because the rate that the file states is another. `turned_by_stream` is True if
    the orientation is stated by the stream itself, not by the container. `ignore_index` says that the packets are those
    that FFmpeg finds without the index of the file (`open_container`).
    `size_refused` is True if the first pictures exceed the size limit; the coded size is then 0. `pixel_aspect` is the
    width of a stored pixel divided by its height; 1.0 where the file gives none, or nonsense.
    """

    path: str
    container: str
    codec: str
    pixel_format: str
    stream_index: int
    stream_why: str
    ignore_index: bool
    n_video_streams: int
    coded_width: int
    coded_height: int
    size_refused: bool
    pixel_aspect: float
    turn: Orientation
    turned_by_stream: bool
    fps: float
    fps_estimated: bool
    duration_s: float
    duration_known: bool
    n_packets: int
    packet_bytes: int
    n_discarded: int
    n_pictureless: int
    n_frames: int
    n_promised: int
    truncated: str
    encrypted: bool
    key_frames: INT64
    closed_gops: bool
    proved_keys: bool
    key_pts_K: INT64
    key_dts_K: INT64
    first_pts: int
    start_s_N: FLOAT64 | None
    end_s_N: FLOAT64 | None
    skippable_N: BOOL | None = None

    @property
    def shown_hw(self) -> tuple[int, int]:
        """(height, width) as shown."""
        return self.turn.shown_hw(self.coded_height, self.coded_width)

    @property
    def display_hw(self) -> tuple[int, int]:
        """(height, width) in square pixels, as in a player: the coded width is multiplied by the pixel aspect."""
        return self.turn.shown_hw(self.coded_height, max(1, round(self.coded_width * self.pixel_aspect)))

    @property
    def largest_gop(self) -> int:
        """Most frames from one key frame to the next; all frames of the video if it has no key frame."""
        if not len(self.key_frames):
            return self.n_frames
        return int(np.diff(self.key_frames, append=self.n_frames).max())


def probe(path: str, limits: DecodeLimits, skippable: bool = False) -> Probe:
    """Everything that the routes need to know about a file; VideoError if it is not a readable video.

    A cut file is not refused here (`Probe.truncated`), because the policy decides whether its frames are used. Pass
    `skippable` only if `Probe.skippable_N` is needed: it costs some 3 us per frame.
    """
    with probed(path, limits, skippable) as (found, _):
        return found


@contextlib.contextmanager
def probed(
    path: str, limits: DecodeLimits, skippable: bool = False, progress: Progress | None = None
) -> Iterator[tuple[Probe, Source]]:
    """`probe`, and the file still open: opening it again would cost 9 ms for a 720p video, as FFmpeg decodes frames.

    `progress` counts the packets.
    """
    absolute, _ = check_file(path, limits)
    progress = progress or Progress()
    with open_container(absolute) as container:
        found, source = _probe(container, limits, skippable, progress)
        index_is_damaged = container.format.name == "avi" and found.n_packets < found.n_promised and not found.truncated
        if not index_is_damaged:
            yield found, source
            return
    with open_container(absolute, ignore_index=True) as container:
        searched, source = _probe(container, limits, skippable, progress)
        if found.n_packets < searched.n_packets <= found.n_promised:
            yield replace(searched, ignore_index=True), source
            return
    with open_container(absolute) as container:
        yield _probe(container, limits, skippable, progress)


def _probe(
    container: InputContainer, limits: DecodeLimits, skippable: bool, progress: Progress
) -> tuple[Probe, Source]:
    stream, why = best_stream(container, progress)
    check_limits(stream, limits)
    one_thread(stream, limits)
    return _Pass(container, stream, why, skippable, progress).run(limits), Source(container, stream)


def check_limits(stream: VideoStream, limits: DecodeLimits) -> None:
    """VideoError for a stream that claims more pixels or a longer duration than the limits allow."""
    width, height = stream.codec_context.width, stream.codec_context.height
    if width * height > limits.max_pixels:
        raise VideoError(Reason.TOO_LARGE, f"{width}x{height} pixels; the limit is {limits.max_pixels} (max_pixels)")
    _check_duration(float((stream.duration or 0) * (stream.time_base or 0)), limits)


def _check_duration(duration_s: float, limits: DecodeLimits) -> None:
    if duration_s > limits.max_duration_s:
        raise VideoError(Reason.TOO_LONG, f"{duration_s:.0f} s; the limit is {limits.max_duration_s:.0f} s")


class _Pass:
    """One pass over the packets of all streams. Needs up to 49 bytes per frame, of which the Probe keeps 16."""

    def __init__(
        self, container: InputContainer, stream: VideoStream, why: str, skippable: bool, progress: Progress
    ) -> None:
        self.container, self.progress = container, progress
        self.stream, self.why = stream, why
        self.asks_skippable = skippable
        self.skippable = array("b")  # per packet of `pts`: its layer if it may be skippable, else -1
        self.top_layer = 0
        self.pts = array("q")  # of the presentable packets that have one, in stored order
        self.durations = array("q")  # of the same packets
        self.keys = array("q")  # positions in `pts` of key frames
        self.key_dts = array("q")
        self.key_kinds: set[KeyFrame] = set()
        self.codec = stream.codec_context.codec.canonical_name
        self.extradata = stream.codec_context.extradata or b""
        self.n_packets = self.n_discarded = self.n_pictureless = self.n_without_pts = self.packet_bytes = 0
        self.n_corrupt = 0
        self.last: av.Packet[Stream] | None = None
        self.encrypted = (
            "enc_key_id" in stream.metadata  # of a Matroska file
            or ("mov" in container.format.name and is_encrypted_iso(container.name))
            or (container.format.name == "mpegts" and is_scrambled(container.name, stream.id))
        )
        self.size_refused = False
        self.stopped = ""
        self.first_picture: av.VideoFrame | None = None
        self.turn, self.turned_by_stream = UPRIGHT, False

    def run(self, limits: DecodeLimits) -> Probe:
        self._read()
        stream, container, path = self.stream, self.container, self.container.name
        n_frames = self.n_packets - self.n_discarded - self.n_pictureless
        time_base = stream.time_base or Fraction(1, 1_000_000)
        known_s = _declared_s(stream, container, time_base)
        order_N = self._order()
        fps, estimated = self._rate(order_N, stated_fps(stream, n_frames, known_s))
        start_s_N, end_s_N = self._times(order_N, time_base, fps)
        duration_s = _own_s(stream, time_base) or n_frames / fps  # another stream may last much longer
        if end_s_N is not None and len(end_s_N):
            duration_s = float(end_s_N[-1])
        _check_duration(duration_s, limits)
        key_frames, closed = self._key_frames()
        picture, context = self.first_picture, stream.codec_context
        return Probe(
            path=path,
            container=container.format.name,
            codec=self.codec,
            pixel_format=picture.format.name if picture else (context.pix_fmt or ""),
            stream_index=stream.index,
            stream_why=self.why,
            ignore_index=False,
            n_video_streams=len(container.streams.video),
            coded_width=picture.width if picture else context.width,
            coded_height=picture.height if picture else context.height,
            size_refused=self.size_refused,
            pixel_aspect=pixel_aspect(stream),
            turn=self.turn,
            turned_by_stream=self.turned_by_stream,
            fps=fps,
            fps_estimated=estimated,
            duration_s=duration_s,
            duration_known=bool(known_s),
            n_packets=self.n_packets,
            packet_bytes=self.packet_bytes,
            n_discarded=self.n_discarded,
            n_pictureless=self.n_pictureless,
            n_frames=n_frames,
            n_promised=max(stream.frames, 0),
            truncated=self._truncated(path),
            encrypted=self.encrypted,
            key_frames=key_frames,
            closed_gops=closed,
            proved_keys=all_proved(self.key_kinds),
            key_pts_K=np.frombuffer(self.pts, np.int64)[np.frombuffer(self.keys, np.int64)] if self.keys else _NONE,
            key_dts_K=np.array(self.key_dts, np.int64),
            first_pts=min(self.pts, default=0),
            start_s_N=start_s_N,
            end_s_N=end_s_N,
            skippable_N=self._skippable(order_N) if start_s_N is not None else None,
        )

    def _read(self) -> None:
        try:
            for packet in packets(self.container):
                self.progress.done += 1
                ours = packet.stream.index == self.stream.index  # `packet.stream_index` is 0 for an empty packet
                if packet.size:
                    if ours:
                        self._count(packet)
                elif packet.pts is not None or packet.dts is not None:
                    continue  # an empty sample shows no frame of its own
                if ours and self.first_picture is None and self.n_packets <= FIRST_PICTURE_PACKETS:
                    self._look(packet)  # also the empty packet: for a short video, the flush yields the frames
        except av.error.FFmpegError as error:
            raise_unless_damage(error, self.container.name)
            self.stopped = (error.strerror or "invalid data").lower()

    def _look(self, packet: av.Packet[Stream]) -> None:
        # Damage is handled by the route that reads the frames, which knows how many were good.
        try:
            frames = self.stream.decode(packet)
            if not frames and self.n_packets == 1 and all_proved(self.key_kinds):
                frames = self.stream.decode(None)  # a key frame needs no other; the decoder only waited to reorder
                self.stream.codec_context.flush_buffers()
            frame = next(iter(frames), None)
            if isinstance(frame, av.VideoFrame):
                self.first_picture, self.turn = frame, orientation(frame)
                self.turned_by_stream = self.turn != UPRIGHT and self._turns_itself(packet)
        except av.error.FFmpegError as error:
            # a size beyond max_pixels, or beyond FFmpeg's own limit, leaves the decoder without one
            no_size = not self.stream.codec_context.width
            self.size_refused = self.size_refused or (no_size and isinstance(error, av.error.ArgumentError))

    def _turns_itself(self, packet: av.Packet[Stream]) -> bool:
        """Does the packet decode to a turned picture with a decoder that does not know the container?"""
        decoder = av.CodecContext.create(self.codec, "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.extradata, decoder.thread_count = self.extradata or None, 1
        try:
            frames = [*decoder.decode(av.Packet(bytes(packet))), *decoder.decode(None)]
        except av.error.FFmpegError:
            return True
        return not frames or orientation(frames[0]) != UPRIGHT

    def _count(self, packet: av.Packet[Stream]) -> None:
        self.n_packets += 1
        self.packet_bytes += packet.size
        self.n_corrupt += packet.is_corrupt
        self.last = packet
        if packet.is_discard:
            self.n_discarded += 1
        elif not shows_picture(self.codec, self.extradata, memoryview(packet)):
            self.n_pictureless += 1
        elif packet.pts is None:
            self.n_without_pts += 1
        else:
            if packet.is_keyframe:
                self.encrypted = self.encrypted or packet.has_sidedata("encryption_info")
                self.keys.append(len(self.pts))
                self.key_dts.append(packet.pts if packet.dts is None else packet.dts)
                self.key_kinds.add(key_frame(self.codec, self.extradata, memoryview(packet)))
            if self.asks_skippable:
                layer, may_be = layer_of(self.codec, self.extradata, memoryview(packet))
                self.skippable.append(layer if may_be else -1)
                self.top_layer = max(self.top_layer, layer)
            self.pts.append(packet.pts)
            self.durations.append(packet.duration or 0)

    def _order(self) -> INT64:
        """Indices into stored order, sorted by presentation time."""
        return np.argsort(np.frombuffer(self.pts, np.int64), kind="stable") if self.pts else _NONE

    def _skippable(self, order_N: INT64) -> BOOL | None:
        if not self.asks_skippable:
            return None
        layer_N = np.frombuffer(self.skippable, np.int8)[order_N]
        skippable_N: BOOL = (layer_N == self.top_layer) & (layer_N >= 0)
        return skippable_N

    def _times(self, order_N: INT64, time_base: Fraction, fps: float) -> tuple[FLOAT64 | None, FLOAT64 | None]:
        shown_N = np.frombuffer(self.pts, np.int64)[order_N] if self.pts else _NONE
        if self.n_without_pts or not len(shown_N) or (np.diff(shown_N) <= 0).any():
            return None, None
        scale = float(time_base)
        last_s = self.durations[int(order_N[-1])] * scale
        start_s_N = (shown_N - shown_N[0]) * scale
        end_s_N = np.append(start_s_N[1:], start_s_N[-1] + (last_s if last_s > 0 else 1 / fps))
        return start_s_N, end_s_N

    def _rate(self, order_N: INT64, stated: float) -> tuple[float, bool]:
        """(frames per second, True if the times of the frames give it and not the file).

        The stated rate is used if it agrees with the median interval of two frames. Times are rounded to ticks (1 ms in
        Matroska), so a difference of one tick does not count. Where the stated rate is another, the mean of the
        intervals near the median is taken, which rounding does not change.
        """
        pts_N = np.frombuffer(self.pts, np.int64)[order_N] if self.pts else _NONE
        tick_s = float(self.stream.time_base or 0)
        intervals_N = np.diff(pts_N)
        intervals_N = intervals_N[intervals_N > 0]
        if len(intervals_N) < 2 or (intervals_N * tick_s <= GAP_S).any():  # else it is a slow time-lapse video
            intervals_N = intervals_N[intervals_N * tick_s <= GAP_S]
        if not len(intervals_N) or not tick_s:
            return stated, False
        median = float(np.partition(intervals_N, len(intervals_N) // 2)[len(intervals_N) // 2])
        if abs(1 / stated - median * tick_s) <= RATE_ERROR * median * tick_s:
            return stated, False  # a quick answer: np.median takes ten times as long
        median = float(np.median(intervals_N))
        if abs(1 / stated - median * tick_s) <= RATE_ERROR * median * tick_s + tick_s * (median > 1):
            return stated, False
        near_N = intervals_N[np.abs(intervals_N - median) <= 1]
        return 1 / (float(near_N.mean() if len(near_N) else median) * tick_s), True

    def _key_frames(self) -> tuple[INT64, bool]:
        if not self.pts or not self.keys:
            return np.empty(0, np.int64), False
        pts_N, stored_K = np.frombuffer(self.pts, np.int64), np.frombuffer(self.keys, np.int64)
        shown_K = np.searchsorted(np.sort(pts_N), pts_N[stored_K]).astype(np.int64)
        return np.unique(shown_K), bool((shown_K == stored_K).all() and stored_K[0] == 0)

    def _truncated(self, path: str) -> str:
        """How the file is cut short. A low count is no proof, because edit lists omit frames: bytes must be missing."""
        promised, found = max(self.stream.frames, 0), self.n_packets
        end: Ending = ending(path)
        if self.stopped:
            return f"the file ends after {found} of {promised or 'an unknown number of'} frames: {self.stopped}"
        of = f"{found} of {promised} frames" if promised > found else f"{found} frames"
        if end.missing and (end.lost_frames or promised > found or not promised or self.n_corrupt):
            return f"the file ends after {of}: {end.missing}"
        read = (self.last.pos or 0) + self.last.size if self.last else 0
        if self.container.format.name in FRAMES_ONLY and (rest := next_frame_bytes(path, read)):
            return f"the file ends after {of}: {rest} bytes of the next one are there"
        if promised > found and (self.n_corrupt or self.container.format.name == "ivf"):
            return f"the file ends after {of}"
        return ""


def pixel_aspect(stream: VideoStream) -> float:
    """Width of a pixel divided by its height; 1.0 for nonsense. From the container, else the codec (FFmpeg's order)."""
    aspect = float(stream.sample_aspect_ratio or 1)
    return aspect if 1 / MOST_ASPECT <= aspect <= MOST_ASPECT else 1.0


def _declared_s(stream: VideoStream, container: InputContainer, time_base: Fraction) -> float:
    """Duration in seconds that the stream, or else the container, states; 0.0 if neither does."""
    return _own_s(stream, time_base) or max((container.duration or 0) / 1e6, 0.0)


def _own_s(stream: VideoStream, time_base: Fraction) -> float:
    return float(stream.duration * time_base) if stream.duration and stream.duration > 0 else 0.0


def stated_fps(stream: VideoStream, n_frames: int = 0, known_s: float = 0.0) -> float:
    """Average frames per second: from the container, else counted, else assumed.

    FFmpeg assumes 25 for a raw stream, so the rate that the stream itself states comes first there.
    """
    raw = stream.container.format.name in RAW_STREAMS and stream.codec_context.framerate
    for rate in (raw, stream.average_rate, stream.guessed_rate):
        if rate:
            return float(rate)
    return n_frames / known_s if known_s and n_frames else ASSUMED_FPS
