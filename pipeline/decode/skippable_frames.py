"""May a packet be skipped when no clip needs its frame? Answered from the bytes of the packet, as in `key_frames`.

A frame is *skippable* if no other frame refers to it. In H.264 the slices say so directly. In HEVC the type says that
no frame of the same temporal layer refers to it; frames of lower layers never do, so it must be of the highest layer.

    codec    skippable if every slice has                                           source
    h264     nal_ref_idc 0                                                          ITU-T H.264, 7.4.1
    hevc     type 0, 2 or 4 (TRAIL_N, TSA_N, STSA_N); no higher TemporalId is used  ITU-T H.265, 7.4.2.2

Frames of other codecs never count as skippable: a frame of VP8, VP9 or AV1 to which no other refers may still pass on
its entropy statistics. With the defaults of x264 or x265, about half of a film's frames are skippable.
"""

from __future__ import annotations

from p3d.pipeline.decode.key_frames import nals

# NAL unit types allowed next to slices: SEI, delimiters and filler. Not parameter sets: later frames may need them.
_H264_ALLOWED = frozenset((6, 9, 12))
_HEVC_ALLOWED = frozenset((35, 38, 39, 40))
_HEVC_SKIPPABLE = frozenset((0, 2, 4))


def layer_of(codec: str, extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    """(temporal layer, skippable if no layer is higher) of a packet of `codec` (FFmpeg's canonical name)."""
    read = {"h264": _h264, "hevc": _hevc}.get(codec)
    try:
        return read(extradata, packet) if read else (0, False)
    except IndexError:  # the lengths in the packet do not add up
        return 0, False


def _h264(extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    heads = list(nals(packet, extradata, 4))
    slices = [head for head in heads if head >> 8 & 31 == 1]
    others = {head >> 8 & 31 for head in heads} - {1}
    return 0, bool(slices) and others <= _H264_ALLOWED and all(head >> 13 & 3 == 0 for head in slices)


def _hevc(extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    heads = list(nals(packet, extradata, 21))
    slices = [head for head in heads if head >> 9 & 63 < 32]
    others = {head >> 9 & 63 for head in heads if head >> 9 & 63 >= 32}
    layer = max(((head & 7) - 1 for head in slices), default=0)
    base_only = all(head >> 3 & 63 == 0 for head in slices)  # nuh_layer_id 0: no second view, no enhancement layer
    kinds = {head >> 9 & 63 for head in slices}
    return layer, bool(slices) and base_only and others <= _HEVC_ALLOWED and kinds <= _HEVC_SKIPPABLE
