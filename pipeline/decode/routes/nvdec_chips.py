"""What the video engine of an NVIDIA GPU decodes, by the GPU's compute capability. Does not use the GPU.

From table 1 of NVIDIA's NVDEC Application Note (Video Codec SDK 13.0). Where the table says "in select GPUs", the
codec counts as decoded: torchcodec asks the driver before it decodes, and the video is then refused with its answer.
"""

from __future__ import annotations

from dataclasses import dataclass

WITHOUT_AV1 = frozenset(("h264", "hevc", "vp8", "vp9"))
# (width, height) of the smallest coded picture, as cuvidGetDecoderCaps reports it (nMinWidth, nMinHeight)
SMALLEST = {"h264": (48, 16), "hevc": (144, 144), "vp8": (48, 16), "vp9": (128, 128), "av1": (128, 128)}


@dataclass(frozen=True, slots=True)
class Chip:
    """The GPU of this process: its name, and its compute capability, such as (9, 0) for an H100."""

    name: str
    capability: tuple[int, int]


def nvdec_codecs(capability: tuple[int, int]) -> frozenset[str]:
    """The codecs that GPUs of this compute capability decode, by FFmpeg's names.

    AV1 came with the Ampere chips of 8.6 and later. A100 (8.0) and Hopper (9.0) have the engine of Turing. GPUs that
    are newer than the table count as Blackwell (10.0 and 12.0).
    """
    if capability < (5, 2):  # the first Maxwell
        return frozenset(("h264",))
    return WITHOUT_AV1 | {"av1"} if (8, 6) <= capability < (9, 0) or capability >= (10, 0) else WITHOUT_AV1
