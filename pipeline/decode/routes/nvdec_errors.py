"""What an error of torchcodec means: something is wrong with the video, the GPU's memory is full, or the node fails.

    text ──first row of MEANING that matches──> corrupt_frames, unsupported   the video
                                            ──> decode_memory                 the memory of the GPU, or of the machine
                                            ──> None                          the node; so does a text without a row

torchcodec raises RuntimeError for all of these, so only the text tells them apart. A text that is not in the table is
a fault of the node: it stops the job, which can be resumed, and fails no video.
"""

from __future__ import annotations

import re

from p3d.pipeline.errors import Reason

# Files without a path are torchcodec's, in src/torchcodec/_core, of 0.12 to 0.17; a few texts are in the newest only.
# Numbers after a text are CUresult (cuda.h): 1 invalid value, 2 out of memory, 801 not supported. What
# FFmpeg says is from av_strerror (libavutil/error.c).
MEANING: tuple[tuple[str, Reason | None], ...] = (
    # -- the memory of the GPU
    # c10/cuda/CUDACachingAllocator.cpp and cudaGetErrorString; torch/csrc/stable/macros.h passes it on since torch 2.13
    (r"out of memory", Reason.DECODE_MEMORY),
    # torch/headeronly/util/shim_utils.h: a failed allocation without its reason (torchcodec 0.12 to 0.16;
    # vllm-project/vllm#33591 had it when the GPU was full)
    (r"aten::(empty|new_empty|full|zeros|new_zeros|to)\b.* API call failed at", Reason.DECODE_MEMORY),
    (r"aoti_torch_(empty|aten_full).* API call failed at", Reason.DECODE_MEMORY),
    # BetaCudaDeviceInterface.cpp: create_decoder and initialize_video_decoding
    (r"Failed to create (NVDEC decoder|video parser): 2$", Reason.DECODE_MEMORY),
    # -- the node
    # c10/cuda/CUDAException.cpp: the CUDA context is lost
    (r"CUDA error", None),
    # DeviceInterface.cpp: a build for CPUs, such as PyPI's 0.12 and 0.13 (meta-pytorch/torchcodec#442)
    (r"Unsupported device: ", None),
    # CudaDeviceInterface.cpp: FFmpeg without CUDA, or no driver (meta-pytorch/torchcodec#566: "Cannot allocate memory")
    (r"Failed to create specified HW device", None),
    # NVCUVIDRuntimeLoader.cpp: no libnvcuvid.so, the driver's "video" part; and str(VideoDecoder.cpu_fallback)
    (r"called but NVCUVID not loaded|NVcuvid unavailable", None),
    # CUDACommon.h and CUDACommon.cpp, CudaDeviceInterface.cpp
    (r"Failed to (get current|set) CUDA device|Failed to find cuda device|Invalid device index", None),
    (r"\bcuda[A-Z]\w+ failed: ", None),
    # BetaCudaDeviceInterface.cpp: the surface or the copy of it failed
    (r"Failed to (unmap previous frame|copy NVDEC surface|copy plane|wait for the CPU-to-GPU upload)", None),
    # SingleStreamDecoder.cpp, PacketDecoder.cpp: the FFmpeg of this node has no decoder for the codec
    (r"Codec not found|No valid stream found in input file", None),
    # torchcodec/_internally_replaced_utils.py: no FFmpeg, or another torch
    (r"Could not load libtorchcodec", None),
    # torch/_ops.py: torchcodec and torch do not fit (meta-pytorch/torchcodec#493, #671)
    (r"Could not run 'torchcodec_ns::|no fallback function is registered", None),
    # -- the video
    # BetaCudaDeviceInterface.cpp: the engine refuses what the stream's headers ask for
    (r"Failed to create (NVDEC decoder|video parser): (1|801)$", Reason.UNSUPPORTED),
    # str(VideoDecoder.cpu_fallback), torchcodec/decoders/_video_decoder.py: by cuvidGetDecoderCaps
    (r"Falling back due to: Video not supported", Reason.UNSUPPORTED),
    # FFmpeg, AVERROR_INVALIDDATA: from any step that reads or parses the file
    (r"Invalid data found when processing input", Reason.CORRUPT_FRAMES),
    # BetaCudaDeviceInterface.cpp gives AVERROR_EXTERNAL for whatever cuvidParseVideoData and cuvidMapVideoFrame return
    (r"Could not push packet to decoder: Generic error in an external library", Reason.CORRUPT_FRAMES),
    (r"Could not receive frame from decoder: Generic error in an external library", Reason.CORRUPT_FRAMES),
    # BetaCudaDeviceInterface.cpp: an empty picture, or pictures before the headers
    (r"Invalid frame dimensions|Pitch must be >= width", Reason.CORRUPT_FRAMES),
    (r"Invalid video format|Invalid picture parameters|Decoder not initialized before picture", Reason.CORRUPT_FRAMES),
    # SingleStreamDecoder.cpp: fewer frames than packets; it happened in good files, too (meta-pytorch/torchcodec#1502)
    (r"no more frames left to decode", Reason.UNSUPPORTED),
    (r"Invalid frame index=", Reason.UNSUPPORTED),
    (r"Could not seek file to pts=", Reason.UNSUPPORTED),
    # CUDACommon.cpp, CpuDeviceInterface.cpp: the size of the pictures changes
    (r"Expected (pre-allocated |output )?tensor of shape", Reason.UNSUPPORTED),
    # BetaCudaDeviceInterface.cpp, apply_bsf: a packet that holds no picture
    (r"Failed to (send packet to|receive packet from) bitstream filter: ", Reason.UNSUPPORTED),
    # -- the memory of the machine: FFmpeg, AVERROR(ENOMEM)
    (r": Cannot allocate memory$", Reason.DECODE_MEMORY),
)


def reason_of(words: str) -> Reason | None:
    """Why a video fails with this text of an error; None if the node is at fault, or if nothing is known of it."""
    return next((reason for pattern, reason in MEANING if re.search(pattern, words)), None)


def in_words(error: BaseException, path: str = "") -> str:
    """The first line of an error's text, without the function and the line of torchcodec's source.

    Nor does it contain the `path` of the video, whose name may be any text.
    """
    text = str(error).replace(path, "the file") if path else str(error)
    line = (text.strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^.*?\.(?:cpp|cu|h):\d+, ", "", line)
