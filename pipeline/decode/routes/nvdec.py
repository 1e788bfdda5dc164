"""Frames by the video engine of an NVIDIA GPU (NVDEC), through torchcodec: decoded, resized and cropped on the device.

Chosen by name and never by `auto`, because its pixels differ from those of the other routes: the GPU converts YUV to
RGB with the matrix that the file names, and resizes with torch's antialiased bilinear filter. Which frame is which is
checked while a file is read: the frame count and the time of every frame must be those of the probe.

The device holds the decoder's own surfaces and at most PICTURES_BYTES of decoded pictures. The process holds one block.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from p3d.pipeline.decode.blocks import MESSAGE_FRAMES
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import UINT8, FrameBlock, FrameSpec

PICTURES_BYTES = 256 * 1024**2  # of pictures at their coded size, decoded at a time; one picture if it is larger
STAMP_S = 0.001  # Matroska rounds times to milliseconds


def not_here() -> str:
    """Why this process cannot decode on a GPU, in words; empty if it can."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed: pip install 'p3d-embeddings[nvdec]'"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    try:
        import torchcodec.decoders  # noqa: F401 - loads FFmpeg's libraries
    except (ImportError, OSError, RuntimeError):
        return "torchcodec finds no FFmpeg libraries that it can use: install FFmpeg 4 to 8 with shared libraries"
    return ""


def read_nvdec(found: Probe, spec: FrameSpec, wanted: Wanted, device: str = "cuda") -> Iterator[FrameBlock]:
    """The wanted frames in order, in blocks of at most 64, as uint8 RGB in host memory.

    Raises VideoError: `corrupt_frames` if the decoder raises, `unsupported` if the GPU cannot read the file, or if its
    frame count or times differ from those of the packets. A full or lost device raises torch's own error. `device` is
    "cpu" in tests, where torchcodec decodes with FFmpeg.
    """
    from torchcodec.decoders import VideoDecoder

    assert found.start_s_N is not None and found.end_s_N is not None  # route: every frame has a time
    with _errors_as_video_errors():
        decoder = VideoDecoder(found.path, stream_index=found.stream_index, dimension_order="NCHW", device=device)
        n_frames = len(decoder)
    if n_frames != found.n_frames:
        raise VideoError(Reason.UNSUPPORTED, f"torchcodec counts {n_frames} frames, the packets say {found.n_frames}")
    numbers_M = wanted.of(found.start_s_N, found.end_s_N)
    picture_bytes = found.coded_height * found.coded_width * 3
    step = max(1, min(MESSAGE_FRAMES, PICTURES_BYTES // picture_bytes))
    origin_s: float | None = None
    for at in range(0, len(numbers_M), MESSAGE_FRAMES):
        part_N = numbers_M[at : at + MESSAGE_FRAMES]
        frames_NHWC = np.empty((len(part_N), *spec.crop_hw, 3), np.uint8)
        for first in range(0, len(part_N), step):
            asked_N = part_N[first : first + step]
            with _errors_as_video_errors():
                if origin_s is None:
                    origin_s = float(decoder.get_frame_at(0).pts_seconds)
                batch = decoder.get_frames_at(asked_N.tolist())
            _prove(found, asked_N, batch.pts_seconds.numpy() - origin_s, tuple(batch.data.shape[2:]))
            frames_NHWC[first : first + step] = _pixels(batch.data, found, spec)
        if decoder.cpu_fallback:  # known only after a first frame; its colours match neither the GPU nor PyAV
            raise VideoError(Reason.UNSUPPORTED, f"the GPU's video engine does not decode it: {decoder.cpu_fallback}")
        yield FrameBlock(part_N, found.start_s_N[part_N], found.end_s_N[part_N], frames_NHWC)


def _prove(found: Probe, asked_N: Any, times_s_N: Any, shape_hw: tuple[int, int]) -> None:
    """Check that the decoded frames have the requested numbers, by their times, and the size that the probe found."""
    assert found.start_s_N is not None
    wrong_N = np.abs(times_s_N - found.start_s_N[asked_N]) > STAMP_S
    if wrong_N.any():
        at = int(np.argmax(wrong_N))
        where_s, there_s = float(times_s_N[at]), float(found.start_s_N[asked_N[at]])
        detail = f"torchcodec gives a frame at {where_s:.3f} s for frame {asked_N[at]}, which is at {there_s:.3f} s"
        raise VideoError(Reason.UNSUPPORTED, detail)
    if shape_hw != found.shown_hw:
        detail = f"pictures of {shape_hw[1]}x{shape_hw[0]} in a video of {found.shown_hw[1]}x{found.shown_hw[0]}"
        raise VideoError(Reason.UNSUPPORTED, detail)


def _pixels(frames_NCHW: Any, found: Probe, spec: FrameSpec) -> UINT8:
    """[N, 3, H, W] on the device -> [N, crop_h, crop_w, 3] uint8 in host memory; resized and cropped on the device."""
    from torch.nn.functional import interpolate

    height, width = spec.target_hw(*found.display_hw)
    if tuple(frames_NCHW.shape[2:]) != (height, width):
        frames_NCHW = interpolate(frames_NCHW.float(), (height, width), mode="bilinear", antialias=True)
        frames_NCHW = frames_NCHW.round_().clamp_(0, 255).byte()
    top, left = (height - spec.crop_hw[0]) // 2, (width - spec.crop_hw[1]) // 2
    cropped_NCHW = frames_NCHW[:, :, top : top + spec.crop_hw[0], left : left + spec.crop_hw[1]]
    found_NHWC: UINT8 = cropped_NCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return found_NHWC


@contextlib.contextmanager
def _errors_as_video_errors() -> Iterator[None]:
    """Turn torchcodec's exceptions into VideoError(corrupt_frames); errors of the device propagate."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        words = re.sub(r"^.*?\.cpp:\d+, ", "", line)  # without the location in torchcodec's source
        if "CUDA error" in words:
            raise
        raise VideoError(Reason.CORRUPT_FRAMES, f"torchcodec: {words}") from error
