"""Does a packet hold a picture that is shown? Answered from its bytes, as in `key_frames`.

Some packets hold none: parameter sets, messages, filler or an end of sequence, written as a sample of their own, and
VP8's hidden frames, to which only other frames refer. They go to the decoder, but they are neither frames nor damage.

    codec         no picture is shown if the packet                          source
    h264          has only units of types 6 to 12 (messages, sets, filler)    ITU-T H.264, 7.4.1
    hevc          has only units of types 32 to 40                            ITU-T H.265, 7.4.2.2
    vp8           has bit 4 of its first byte cleared                         RFC 6386, 9.1
    mpeg1, mpeg2  has start codes, but none of a picture                      ISO/IEC 13818-2, 6.2.3
    mpeg4         has start codes, but none of a VOP, or its only VOP has     ISO/IEC 14496-2, 6.2.5
                  vop_coded 0: the picture before stays on screen
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from p3d.pipeline.decode.key_frames import HEAD_BYTES, MOST_UNITS, nals

_START = b"\0\0\1"
_SOON_BYTES = 256  # nearly always the picture begins within so many bytes
_VOP, _VOL = b"\0\0\1\xb6", b"\0\0\1\x20"
_NOT_CODED_BYTES = 19  # most bytes of a packet whose VOP is not coded; FFmpeg allows as many
_PACKED = re.compile(rb"DivX\d+(b|Build)\d+p")  # such a packet stands for a picture in the packet before


def shows_picture(codec: str, extradata: bytes, packet: memoryview) -> bool:
    """False only if the bytes of `packet` prove that it shows no picture; True for damaged data and other codecs."""
    read = _READERS.get(codec)
    try:
        return read(extradata, packet) if read else True
    except IndexError:  # the packet is shorter than its headers say
        return True


def _h264(extradata: bytes, packet: memoryview) -> bool:
    return _has_other_unit(packet, extradata, 4, lambda head: 6 <= head >> 8 & 31 <= 12)


def _hevc(extradata: bytes, packet: memoryview) -> bool:
    return _has_other_unit(packet, extradata, 21, lambda head: 32 <= head >> 9 & 63 <= 40)


def _has_other_unit(packet: memoryview, extradata: bytes, at_size: int, is_known: Callable[[int], bool]) -> bool:
    """Has the packet a unit that is not known to hold no picture?

    `at_size` is where `extradata` says how many bytes a length has; without that, units follow start codes. Some phones
    write a unit of type 14 that holds others with start codes, so a unit of an unknown type may hold a picture.
    """
    if len(extradata) <= at_size or extradata[0] != 1:
        heads = list(_start_codes(packet, lambda head: not is_known(head)))
        return not heads or not is_known(heads[-1])
    first = (extradata[at_size] & 3) + 1
    if len(packet) > first + 1 and not is_known(packet[first] << 8 | packet[first + 1]):
        return True  # the usual case, without examining the lengths
    count = 0
    for head in nals(packet, extradata, at_size):
        if not is_known(head):
            return True
        count += 1
    return count == MOST_UNITS  # the rest was not examined


def _start_codes(packet: memoryview, wanted: Callable[[int], bool]) -> Iterator[int]:
    """The two bytes after each start code, as one number, up to the first that is `wanted`."""
    for data in (bytes(packet[:HEAD_BYTES]), bytes(packet)):  # nearly always the first suffices
        at = data.find(_START)
        while 0 <= at < len(data) - 3:
            head = int.from_bytes(data[at + 3 : at + 5].ljust(2, b"\0"), "big")
            yield head
            if wanted(head):
                return
            at = data.find(_START, at + 3)


def _with_code(code: int) -> Callable[[bytes, memoryview], bool]:
    wanted = _START + bytes([code])

    def has_code(extradata: bytes, packet: memoryview) -> bool:
        if wanted in bytes(packet[:_SOON_BYTES]):
            return True
        heads = list(_start_codes(packet, lambda head: head >> 8 == code))
        return not heads or heads[-1] >> 8 == code

    return has_code


def _vp8(extradata: bytes, packet: memoryview) -> bool:
    return bool(packet[0] & 16)


_has_vop = _with_code(0xB6)


def _mpeg4(extradata: bytes, packet: memoryview) -> bool:
    if not _has_vop(extradata, packet):
        return False
    if len(packet) > _NOT_CODED_BYTES:
        return True
    data = bytes(packet)
    if data.count(_VOP) != 1 or _PACKED.search(extradata):
        return True
    bits = _Bits(data[data.index(_VOP) + 4 :])
    bits.take(2)
    while bits.take(1):  # seconds since the last VOP
        pass
    bits.take(1 + _increment_bits(extradata) + 1)
    return bool(bits.take(1))


def _increment_bits(extradata: bytes) -> int:
    """How many bits a VOP has for its time, by the video object layer in `extradata`. IndexError without one."""
    at = extradata.find(_VOL)
    bits = _Bits(extradata[at + 4 :] if at >= 0 else b"")
    bits.take(1 + 8)
    if bits.take(1):
        bits.take(4 + 3)
    if bits.take(4) == 15:  # the pixel aspect is stated
        bits.take(16)
    if bits.take(1):
        bits.take(2 + 1)
        if bits.take(1):
            bits.take(79)
    bits.take(2 + 1)
    return max(1, (bits.take(16) - 1).bit_length())


class _Bits:
    """The bits of some bytes, highest first. IndexError at their end."""

    def __init__(self, data: bytes) -> None:
        self._value, self._left = int.from_bytes(data, "big"), 8 * len(data)

    def take(self, n_bits: int) -> int:
        self._left -= n_bits
        if self._left < 0:
            raise IndexError
        return self._value >> self._left & (1 << n_bits) - 1


_READERS: dict[str, Callable[[bytes, memoryview], bool]] = {
    "h264": _h264,
    "hevc": _hevc,
    "vp8": _vp8,
    "mpeg1video": _with_code(0x00),
    "mpeg2video": _with_code(0x00),
    "mpeg4": _mpeg4,
}
