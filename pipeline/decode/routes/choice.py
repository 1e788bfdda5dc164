"""Which decoder reads this video? A pure function of what the probe found.

decord only where its frames were proved right (shared measurements over 84 generated and 127 public files; the tests
here compare every clip): elsewhere it repeats, drops or misplaces frames without saying so, or never returns. PyAV,
read from front to back, is right everywhere, and of many codecs faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from p3d.pipeline.decode.blocks import BLOCK_FRAMES
from p3d.pipeline.decode.policy import DecodePolicy
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameSpec

RouteName = Literal["decord", "pyav", "nvdec"]

DECORD_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg", "prores"))
NVDEC_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "av1"))
NVDEC_PIXELS = frozenset(("yuv420p", "yuvj420p"))  # 8 bits, half the chroma: what every engine decodes
DECORD_CONTAINERS = frozenset(("mov", "matroska"))
SEEKABLE_CONTAINERS = frozenset(("mov", "matroska"))
# Where `auto` takes PyAV, for decord is slower (docs/measurements.md): these codecs, by 4 to 12% on an Intel processor
# and not faster on an AMD one, and pictures of fewer pixels, of which its own loop reads 0.85 to 0.93 of what PyAV's
# does. With ProRes the two are level.
SLOWER_CODECS = frozenset(("h264", "hevc", "vp8", "vp9", "mpeg4", "mjpeg"))
SMALL_PIXELS = 400 * 300
MIN_WIDTH = 160  # pixels as shown: narrower videos were not measured
# Pixels after the resize. decord returned a wrong shape or refused at 1-4, 6, 8, 12, 16, 24, 48 and 72 (all others
# up to 519 were right on this CPU; the bug depends on its vector width, so the shape is checked while reading too).
MIN_RESIZED_WIDTH = 100
MAX_BLOCK_BYTES = 256 * 1024**2  # of such a run, resized
MAX_PACKET_BYTES = 64 * 1024**2  # compressed: decord queues the packets of all the file it is given at its first read
# From so many frames on, giving decord each run as a file of its own costs less than to seek: it reads all packets from
# there to the end again (measured: the same at 15 000 frames).
MANY_FRAMES = 16_384


def route(found: Probe, policy: DecodePolicy, spec: FrameSpec) -> tuple[RouteName, str]:
    """("decord", "pyav" or "nvdec", why in words).

    VideoError(unsupported) when decord or nvdec is asked for by name and cannot read this video rightly.
    """
    if policy.decoder == "pyav":
        return "pyav", "asked for"
    if policy.decoder == "nvdec":
        objection = next(_objections_to_nvdec(found), "")
        if objection:
            raise VideoError(Reason.UNSUPPORTED, f"nvdec does not read this video: {objection}")
        return "nvdec", "asked for"
    objection = next(_objections(found, spec), "")
    if not objection and policy.decoder == "auto" and (slower := _slower(found)):
        return "pyav", slower
    if not objection:
        return "decord", f"{found.codec} in {found.container} with exact frames"
    if policy.decoder == "decord":
        raise VideoError(Reason.UNSUPPORTED, f"decord does not read this video rightly: {objection}")
    return "pyav", objection


def _slower(found: Probe) -> str:
    """Why PyAV reads this video faster than decord; empty if it does not."""
    if found.codec in SLOWER_CODECS:
        return f"{found.codec}, which PyAV reads faster"
    if found.coded_height * found.coded_width < SMALL_PIXELS:
        return "pictures of less than 400x300, which PyAV reads faster"
    return ""


def in_pieces(found: Probe) -> bool:
    """Must decord, or had it better, be given the runs of this file one by one, as files of their own?"""
    return exact_seek(found) and (found.n_frames > MANY_FRAMES or found.packet_bytes > MAX_PACKET_BYTES)


def _objections_to_nvdec(found: Probe) -> Iterator[str]:
    """Why a GPU must not read this video: what it cannot, and what nothing has shown it to read rightly."""
    if found.codec not in NVDEC_CODECS:
        yield f"codec {found.codec} is not one that it decodes"
    if found.pixel_format not in NVDEC_PIXELS:
        yield f"pixel format {found.pixel_format}, where 8 bits and 4:2:0 are asked for"
    if not set(found.container.split(",")) & DECORD_CONTAINERS:
        yield f"container {found.container}: frames after a seek are not proved"
    if found.truncated:
        yield found.truncated
    if found.encrypted:
        yield "encrypted"
    if found.n_discarded:
        yield f"the edit list discards {found.n_discarded} frames"
    if found.start_s_N is None:
        yield "the packets do not give every frame a time of its own"
    if found.turn.degrees or found.turn.mirrored:
        yield "a turned or mirrored picture"


def exact_seek(found: Probe) -> bool:
    """May this video be decoded from any of its key frames on, with the very frames that come from front to back?

    A closed list, each proved by a test over every key frame of made videos and of the samples: the container has an
    index, every frame has its time, nothing is cut or left out, and each key frame is a clean start by its own bytes.
    How FFmpeg reads 4:4:4 H.264 may depend on a message in the first packet (x264 before build 151), so it is not one.
    """
    return (
        bool(set(found.container.split(",")) & SEEKABLE_CONTAINERS)
        and found.proved_keys
        and found.closed_gops
        and found.start_s_N is not None
        and found.n_discarded == 0
        and found.n_frames >= found.n_promised
        and not (found.truncated or found.encrypted)
        and not (found.codec == "h264" and "444" in found.pixel_format)
    )


def _objections(found: Probe, spec: FrameSpec) -> Iterator[str]:
    """Why decord must not read this video, one sentence each; the source of each is decoders.md or a test here."""
    names = set(found.container.split(","))
    if found.codec not in DECORD_CODECS:
        yield f"codec {found.codec} is not one of those proved"
    if not names & DECORD_CONTAINERS:
        yield f"container {found.container}: its times, or its first frames, come out wrong"
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
    if found.turn.mirrored:
        yield "the picture is mirrored, not only turned"
    if found.turn.degrees and "mov" not in names:
        yield f"a picture turned by {found.turn.degrees} degrees, outside of mov and mp4"
    if found.n_frames < found.n_promised:
        yield f"{found.n_frames} of {found.n_promised} promised frames"
    if found.start_s_N is None:
        yield "the packets do not give every frame a time of its own"
    if found.shown_hw[1] < MIN_WIDTH:
        yield f"width {found.shown_hw[1]} is below {MIN_WIDTH}"
    height, width = spec.target_hw(*found.display_hw)
    if width < MIN_RESIZED_WIDTH:
        yield f"width {width} after the resize is below {MIN_RESIZED_WIDTH}"
    if height * width * 3 * min(BLOCK_FRAMES, found.n_frames) > MAX_BLOCK_BYTES:
        yield f"a block of frames resized to {height}x{width} takes more than {MAX_BLOCK_BYTES} bytes"
    if not found.closed_gops:
        yield "open GOPs: decord cannot place the frames after a seek"
    if found.n_frames > BLOCK_FRAMES and not found.proved_keys:
        yield "key frames that do not prove to be ones: decord could not be stopped between them"
    run_bytes = found.packet_bytes * BLOCK_FRAMES // max(found.n_frames, BLOCK_FRAMES)
    if (run_bytes if exact_seek(found) else found.packet_bytes) > MAX_PACKET_BYTES:
        yield f"{found.packet_bytes >> 20} MiB of packets: too much for decord, which holds those of what it is given"
    if found.n_frames > BLOCK_FRAMES and found.largest_gop > BLOCK_FRAMES:
        yield f"GOPs of up to {found.largest_gop} frames: decord's memory could not be released between them"
