"""Is a packet marked as a key frame really one? Answered from the first bytes of the packet.

Containers mislead: an MP4 without `stss` marks every sample as a key frame, and encoders that use gradual refresh mark
frames at which decoding cannot start. A frame counts as proved when its bitstream says two things: what follows it in
the stream refers to nothing before it, and the decoder's state is reset.

    codec        proved by                                                              source
    h264         first slice is of type 5 (IDR)                                         ITU-T H.264, 7.4.1.2.4
    hevc         first slice is of type 19 or 20 (IDR); not CRA: leading frames         ITU-T H.265, 7.4.2.2
    vp8          frame tag: bit 0 is 0                                                  RFC 6386, 9.1
    vp9          frame header: shown, frame_type 0                                      VP9 bitstream, 6.2
    av1          first frame header: frame_type 0, shown                                AV1 bitstream, 5.9.2
    mpeg4        first VOP is of type I                                                 ISO/IEC 14496-2, 6.2.5
    mjpeg        holds its own tables                                                   ITU-T T.81, B.2.4
    prores       always
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum


class KeyFrame(Enum):
    """What a packet's own bytes prove: nothing, a clean start, or a clean start that includes its parameter sets."""

    UNPROVED = "unproved"
    CLEAN = "clean"
    WITH_PARAMETERS = "with parameters"


MOST_UNITS = 256  # NAL units or OBUs that are examined in one packet
HEAD_BYTES = 4096  # searched for start codes and tables


def key_frame(codec: str, extradata: bytes, packet: memoryview) -> KeyFrame:
    """What the bytes of `packet` prove; `codec` is FFmpeg's canonical name, `extradata` that of the stream."""
    read = _READERS.get(codec)
    try:
        return read(extradata, packet) if read else KeyFrame.UNPROVED
    except IndexError:  # the packet is shorter than its headers say
        return KeyFrame.UNPROVED


def all_proved(kinds: set[KeyFrame]) -> bool:
    """Does decoding give the same frames from any of these key frames on? Each must be a clean start. Parameter sets
    must come with all of them or with none: a set that came with another frame might be missing after a seek."""
    return len(kinds) == 1 and KeyFrame.UNPROVED not in kinds


def _h264(extradata: bytes, packet: memoryview) -> KeyFrame:
    return _by_nal(nals(packet, extradata, 4), lambda head: head >> 8 & 31, range(1, 6), (5,), (7, 8))


def _hevc(extradata: bytes, packet: memoryview) -> KeyFrame:
    return _by_nal(nals(packet, extradata, 21), lambda head: head >> 9 & 63, range(32), (19, 20), (32, 33, 34))


def _by_nal(
    nals: Iterator[int], kind_of: Callable[[int], int], slices: range, clean: tuple[int, ...], sets: tuple[int, ...]
) -> KeyFrame:
    """Decide by the types of the NAL units up to the first slice."""
    found = KeyFrame.CLEAN
    for head in nals:
        kind = kind_of(head)
        if kind in slices:
            return found if kind in clean else KeyFrame.UNPROVED
        if kind in sets:
            found = KeyFrame.WITH_PARAMETERS
    return KeyFrame.UNPROVED


def nals(packet: memoryview, extradata: bytes, at_size: int) -> Iterator[int]:
    """First two bytes of each NAL unit, as one number. Only for the format of MP4 and Matroska: a length precedes each
    unit, and extradata says how many bytes a length has. IndexError if the lengths do not add up to the packet."""
    if len(extradata) <= at_size or extradata[0] != 1:
        return
    n_bytes = (extradata[at_size] & 3) + 1
    at = 0
    for _ in range(MOST_UNITS):
        if at == len(packet):
            return
        first, size = at + n_bytes, int.from_bytes(packet[at : at + n_bytes], "big")
        at = first + size
        if not size or at > len(packet):
            break
        yield packet[first] << 8 | packet[min(first + 1, at - 1)]
    raise IndexError


def _vp8(extradata: bytes, packet: memoryview) -> KeyFrame:
    return KeyFrame.UNPROVED if packet[0] & 1 else KeyFrame.CLEAN


def _vp9(extradata: bytes, packet: memoryview) -> KeyFrame:
    """frame_marker (10), profile (2 bits, low first; one more bit in 3), show_existing_frame, frame_type, show."""
    head = packet[0] << 8 | packet[1]
    at = 11 - (packet[0] >> 4 & 3 == 3)  # the bit of show_existing_frame
    return KeyFrame.CLEAN if head >> 14 == 2 and head >> at - 2 & 7 == 0b001 else KeyFrame.UNPROVED


def _av1(extradata: bytes, packet: memoryview) -> KeyFrame:
    """OBUs: header byte (type 4 bits, extension, has_size), size in LEB128. The first frame header (type 3) or frame
    (6) begins with the bits show_existing_frame, frame_type (2), show_frame."""
    at, found = 0, KeyFrame.CLEAN
    for _ in range(MOST_UNITS):
        header = packet[at]
        kind = header >> 3 & 15
        at += 2 if header & 4 else 1
        size, shift = 0, 0
        if not header & 2:
            size = len(packet) - at
        else:
            while True:
                byte = packet[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if byte < 128 or shift > 56:
                    break
        if kind == 1:
            found = KeyFrame.WITH_PARAMETERS
        elif kind in (3, 6):
            return found if packet[at] >> 4 == 0b0001 else KeyFrame.UNPROVED
        at += size
    return KeyFrame.UNPROVED


def _mpeg4(extradata: bytes, packet: memoryview) -> KeyFrame:
    head = bytes(packet[:HEAD_BYTES])
    at = head.find(b"\0\0\1\xb6")
    if at < 0 or head[at + 4] >> 6:
        return KeyFrame.UNPROVED
    layer = head.find(b"\0\0\1\x20")  # a video object layer
    return KeyFrame.WITH_PARAMETERS if 0 <= layer < at else KeyFrame.CLEAN


def _mjpeg(extradata: bytes, packet: memoryview) -> KeyFrame:
    head = bytes(packet[:HEAD_BYTES])
    tables = head.startswith(b"\xff\xd8") and b"\xff\xdb" in head and b"\xff\xc4" in head
    return KeyFrame.CLEAN if tables else KeyFrame.UNPROVED


_READERS: dict[str, Callable[[bytes, memoryview], KeyFrame]] = {
    "h264": _h264,
    "hevc": _hevc,
    "vp8": _vp8,
    "vp9": _vp9,
    "av1": _av1,
    "mpeg4": _mpeg4,
    "mjpeg": _mjpeg,
    "prores": lambda extradata, packet: KeyFrame.CLEAN,
}
