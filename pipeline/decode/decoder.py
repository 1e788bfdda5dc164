"""Decoding one packet so that damage is noticed, whichever way FFmpeg reports it.

Most decoders raise an error or mark the frame as corrupt. Some only write a line to the log: a wrong checksum in FFV1,
a scan of a JPEG that ends early, a concealed block of DV. For those codecs the log of each call is read. Others return
the picture of a damaged scan unless they are told to stop at errors (`err_detect`).
"""

from __future__ import annotations

from collections.abc import Callable

import av
import av.logging
from av.packet import Packet
from av.stream import Stream
from av.video.stream import VideoStream

from p3d.pipeline.types.policy import DecodeLimits

# Codecs by FFmpeg's name of the decoder. An error in the log of these means a damaged picture; other decoders also log
# errors that they correct, or that concern a message next to the picture.
LOGGED = frozenset(
    "amv cinepak dvvideo ffv1 flashsv flashsv2 gif h261 jpegls mjpeg mjpegb msmpeg4 msmpeg4v1 msmpeg4v2 msvideo1 png "
    "roqvideo tiff utvideo wmv1 wmv2 zmbv".split()
)
WARNED = {"utvideo": "bits left after decoding slice"}  # a warning of the decoder that also means damage
STRICT = frozenset(("amv", "jpegls", "mjpeg", "mjpegb"))  # decoders that go on after a damaged scan unless told to stop
_HARMLESS = ("ignoring", "APP fields")  # parts of messages about what is next to the picture

Decode = Callable[["Packet[Stream] | None"], list[av.VideoFrame]]


class DamagedPicture(Exception):
    """The decoder logged an error while it decoded this packet. `str()` is one line."""


def one_thread(stream: VideoStream, limits: DecodeLimits) -> None:
    """Make the stream's decoder use one thread and refuse pictures over the size limit, also in mid-stream.

    Frame threads would also delay the first picture.
    """
    context = stream.codec_context
    context.thread_type, context.thread_count = "NONE", 1
    context.options = {"max_pixels": str(limits.max_pixels)}
    if context.codec.name in STRICT:
        context.options = {**context.options, "err_detect": "explode"}


def decoding(stream: VideoStream) -> Decode:
    """The function that decodes a packet, or None at the end, into frames.

    It raises FFmpeg's error, or DamagedPicture.
    """
    name = stream.codec_context.codec.name
    if name not in LOGGED:
        return stream.decode
    most, warning = (av.logging.WARNING, WARNED[name]) if name in WARNED else (av.logging.ERROR, "")

    def decode(packet: Packet[Stream] | None) -> list[av.VideoFrame]:
        av.logging.set_skip_repeated(False)
        av.logging.set_level(most)  # only for this call: elsewhere PyAV would write to the log of the process
        try:
            with av.logging.Capture() as lines:
                frames = stream.decode(packet)
        finally:
            av.logging.set_level(None)
        for level, source, text in lines:
            is_error = level <= av.logging.ERROR or (warning and warning in text)
            if is_error and source == name and not any(part in text for part in _HARMLESS):
                raise DamagedPicture(f"{name}: {text.strip()}")
        return frames

    return decode
