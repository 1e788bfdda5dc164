"""Which decoder reads this video? A pure function of what the probe found.

decord reads only videos for which its frames were proved right, by measurements over 84 generated and 127 public files
and by tests that compare every clip. On others it silently repeats, drops or misplaces frames, or never returns. PyAV,
read from front to back, is right everywhere, and faster for many codecs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from p3d.pipeline.decode.blocks import CHUNK_FRAMES
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.nvdec_chips import SMALLEST, Chip, nvdec_codecs
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameSpec
from p3d.pipeline.types.policy import DecodePolicy

RouteName = Literal["decord", "pyav", "nvdec"]

DECORD_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg", "prores"))
NVDEC_PIXELS = frozenset(("yuv420p", "yuvj420p"))  # 8 bits, 4:2:0: what every NVDEC engine decodes
DECORD_CONTAINERS = frozenset(("mov", "matroska"))
SEEKABLE_CONTAINERS = frozenset(("mov", "matroska"))
# `auto` takes PyAV where decord is slower (docs/log/2026-11-30-measurements.md). For these codecs decord was 4 to 12%
# slower on an Intel processor and not faster on an AMD one. For pictures of fewer pixels its own loop reached 0.85 to
# 0.93 of the throughput of PyAV's. For ProRes both are equally fast.
SLOWER_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg"))
SMALL_PIXELS = 400 * 300
MIN_WIDTH = 160  # pixels as shown: narrower videos were not measured
# Pixels after the resize. decord returned a wrong shape or refused at 1-4, 6, 8, 12, 16, 24, 48 and 72. All others
# up to 519 were right on one CPU. The bug depends on the CPU's vector width, so reading checks the shape too.
MIN_RESIZED_WIDTH = 100
MAX_CHUNK_BYTES = 256 * 1024**2  # of a GOP chunk, after the resize
MAX_PACKET_BYTES = 64 * 1024**2  # compressed: at its first read, decord queues all packets of the file it is given
# Above this number of frames, giving decord each GOP chunk as a file of its own costs less than a seek, after which it
# reads all packets up to the end again (measured: equal at 15 000 frames).
MANY_FRAMES = 16_384


def route(found: Probe, policy: DecodePolicy, spec: FrameSpec, chip: Chip | None = None) -> tuple[RouteName, str]:
    """("decord", "pyav" or "nvdec", why in words). `chip` is the GPU of this process, if it has one.

    VideoError(unsupported) when decord or nvdec is requested by name but is not proved to read this video correctly.
    """
    if policy.decoder == "pyav":
        return "pyav", "requested"
    if policy.decoder == "nvdec":
        objection = next(_objections_to_nvdec(found, chip), "")
        if objection:
            raise VideoError(Reason.UNSUPPORTED, f"nvdec does not read this video: {objection}")
        return "nvdec", "requested"
    objection = next(_objections(found, spec), "")
    if not objection and policy.decoder == "auto" and (slower := _slower(found)):
        return "pyav", slower
    if not objection:
        return "decord", f"{found.codec} in {found.container} with exact frames"
    if policy.decoder == "decord":
        raise VideoError(Reason.UNSUPPORTED, f"decord does not read this video correctly: {objection}")
    return "pyav", objection


def _slower(found: Probe) -> str:
    """Why PyAV reads this video faster than decord; empty if it does not."""
    if found.codec in SLOWER_CODECS:
        return f"{found.codec}, which PyAV reads faster"
    if found.coded_height * found.coded_width < SMALL_PIXELS:
        return "pictures of less than 400x300, which PyAV reads faster"
    return ""


def in_pieces(found: Probe) -> bool:
    """Should decord get each GOP chunk as an in-memory file, because the file is too large or has too many frames?"""
    return exact_seek(found) and (found.n_frames > MANY_FRAMES or found.packet_bytes > MAX_PACKET_BYTES)


def _objections_to_nvdec(found: Probe, chip: Chip | None) -> Iterator[str]:
    """Why a GPU must not read this video: it cannot, or it was never shown to read such videos correctly."""
    if found.codec not in SMALLEST:
        yield f"it does not decode codec {found.codec}"
        return
    if chip is not None and found.codec not in nvdec_codecs(chip.capability):
        yield f"{chip.name} does not decode codec {found.codec}"
    width, height = SMALLEST[found.codec]
    if found.coded_width < width or found.coded_height < height:
        size = f"{found.coded_width}x{found.coded_height}"
        yield f"pictures of {size}, but of {found.codec} it decodes {width}x{height} or more"
    if found.pixel_format not in NVDEC_PIXELS:
        yield f"pixel format {found.pixel_format}, but it needs 8 bits and 4:2:0"
    if not set(found.container.split(",")) & DECORD_CONTAINERS:
        yield f"container {found.container}: its frames after a seek are not proved right"
    if found.truncated:
        yield found.truncated
    if found.encrypted:
        yield "encrypted"
    if found.n_discarded:
        yield f"the edit list discards {found.n_discarded} frames"
    if found.n_pictureless:
        yield f"{found.n_pictureless} packets show no picture"
    if found.start_s_N is None:
        yield "the packets do not give every frame a time of its own"
    if found.turn.degrees or found.turn.mirrored:
        yield "a turned or mirrored picture"


def exact_seek(found: Probe) -> bool:
    """Does decoding from any key frame give exactly the frames of a decode from front to back?

    Each condition is proved by a test over every key frame of generated and sample videos: the container has an index,
    every frame has a time, nothing is cut or discarded, and the bytes of each key frame prove a clean start. 4:4:4
    H.264 is excluded: how FFmpeg reads it may depend on a message in the first packet (x264 before build 151).
    """
    return (
        bool(set(found.container.split(",")) & SEEKABLE_CONTAINERS)
        and found.proved_keys
        and found.closed_gops
        and found.start_s_N is not None
        and found.n_discarded == found.n_pictureless == 0
        and found.n_frames >= found.n_promised
        and not (found.truncated or found.encrypted)
        and not (found.codec == "h264" and "444" in found.pixel_format)
    )


def _objections(found: Probe, spec: FrameSpec) -> Iterator[str]:
    """Reasons why decord must not read this video; each is in docs/explanation/decoding.md or has a test."""
    names = set(found.container.split(","))
    if found.codec not in DECORD_CODECS:
        yield f"codec {found.codec} is not proved for decord"
    if not names & DECORD_CONTAINERS:
        yield f"container {found.container}: decord gives wrong times or wrong first frames"
    if found.truncated:
        yield found.truncated
    if found.encrypted:
        yield "encrypted"
    if found.n_discarded:
        yield f"the edit list discards {found.n_discarded} frames; decord shows or repeats them, or hangs"
    if not found.duration_known:
        yield "no duration in the file; decord refuses to open it"
    if found.n_video_streams != 1:
        yield f"{found.n_video_streams} video streams; decord does not say which one it took"
    if found.n_pictureless:
        yield f"{found.n_pictureless} packets show no picture; decord counts them as frames"
    if found.turn.mirrored:
        yield "the picture is mirrored, not only turned"
    if found.turned_by_stream:
        yield "the stream itself says that the picture is turned; decord looks only at the container"
    if found.turn.degrees and "mov" not in names:
        yield f"a picture turned by {found.turn.degrees} degrees, outside mov and mp4"
    if found.n_frames < found.n_promised:
        yield f"{found.n_frames} of {found.n_promised} promised frames"
    if found.start_s_N is None:
        yield "the packets do not give every frame a time of its own"
    if found.shown_hw[1] < MIN_WIDTH:
        yield f"width {found.shown_hw[1]} is below {MIN_WIDTH}"
    height, width = spec.target_hw(*found.display_hw)
    if width < MIN_RESIZED_WIDTH:
        yield f"width {width} after the resize is below {MIN_RESIZED_WIDTH}"
    if height * width * 3 * min(CHUNK_FRAMES, found.n_frames) > MAX_CHUNK_BYTES:
        yield f"a GOP chunk of frames resized to {height}x{width} takes more than {MAX_CHUNK_BYTES} bytes"
    if not found.closed_gops:
        yield "open GOPs: decord numbers the frames after a seek wrongly"
    if found.n_frames > CHUNK_FRAMES and not found.proved_keys:
        yield "key frames that are not proved clean starts: decord could not be stopped at them"
    chunk_bytes = found.packet_bytes * CHUNK_FRAMES // max(found.n_frames, CHUNK_FRAMES)
    if (chunk_bytes if exact_seek(found) else found.packet_bytes) > MAX_PACKET_BYTES:
        yield f"{found.packet_bytes >> 20} MiB of packets: too much for decord, which holds all packets of a file"
    if found.n_frames > CHUNK_FRAMES and found.largest_gop > CHUNK_FRAMES:
        yield f"GOPs of up to {found.largest_gop} frames: decord's memory could not be released within one"
