"""May a packet be left out when no clip needs its frame? Answered from the packet's own bytes, as `keys` does.

A frame is *disposable* where its codec says that no other frame refers to it. It is of the highest temporal layer then,
for only frames of its own layer and of higher ones could refer to it, and its codec says that its own do not.

    codec    every slice of the picture says                                        source
    h264     nal_ref_idc 0                                                          ITU-T H.264, 7.4.1
    hevc     type 0, 2 or 4 (TRAIL_N, TSA_N, STSA_N); no higher TemporalId is used  ITU-T H.265, 7.4.2.2

Other codecs have none here: a frame of VP8, VP9 or AV1 that nothing refers to may still hand on its statistics. By x264
or x265 with their defaults, about half of a film's frames are disposable.
"""

from __future__ import annotations

from p3d.pipeline.decode.key_frames import nals

# What may stand beside the slices: notes, delimiters and filling. Parameter sets count for the frames that follow.
_H264_BESIDE = frozenset((6, 9, 12))
_HEVC_BESIDE = frozenset((35, 38, 39, 40))
_HEVC_SKIPPABLE = frozenset((0, 2, 4))


def layer_of(codec: str, extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    """(temporal layer, disposable unless there is a higher one) of a packet of `codec` (FFmpeg's canonical name)."""
    read = {"h264": _h264, "hevc": _hevc}.get(codec)
    try:
        return read(extradata, packet) if read else (0, False)
    except IndexError:  # the packet is not what its lengths say
        return 0, False


def _h264(extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    heads = list(nals(packet, extradata, 4))
    slices = [head for head in heads if head >> 8 & 31 == 1]
    beside = {head >> 8 & 31 for head in heads} - {1}
    return 0, bool(slices) and beside <= _H264_BESIDE and all(head >> 13 & 3 == 0 for head in slices)


def _hevc(extradata: bytes, packet: memoryview) -> tuple[int, bool]:
    heads = list(nals(packet, extradata, 21))
    slices = [head for head in heads if head >> 9 & 63 < 32]
    beside = {head >> 9 & 63 for head in heads if head >> 9 & 63 >= 32}
    layer = max(((head & 7) - 1 for head in slices), default=0)
    alone = all(head >> 3 & 63 == 0 for head in slices)  # nuh_layer_id: no second view, no enhancement
    kinds = {head >> 9 & 63 for head in slices}
    return layer, bool(slices) and alone and beside <= _HEVC_BESIDE and kinds <= _HEVC_SKIPPABLE
