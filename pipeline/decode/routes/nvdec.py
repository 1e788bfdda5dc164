"""Frames by the video engine of an NVIDIA GPU (NVDEC), through torchcodec: decoded, resized and cropped on the device.

Chosen by name and never by `auto`, because its pixels differ from those of the other routes: the GPU converts YUV to
RGB with the matrix that the file names, and resizes with torch's antialiased bilinear filter. Which frame is which is
checked while a file is read: the frame count and the time of every frame must be those of the probe.

An error of torchcodec fails the video only if its text says so (`nvdec_errors`) and the GPU decodes the ten frames of
SAMPLE right afterwards. Otherwise it is a `NodeFault`, and no video fails.

The device holds the decoder's own surfaces and at most PICTURES_BYTES of decoded pictures. The process holds one block.
"""

from __future__ import annotations

import contextlib
import importlib.util
import platform
from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import numpy as np

from p3d.pipeline.decode.blocks import MESSAGE_FRAMES
from p3d.pipeline.decode.probe import Probe
from p3d.pipeline.decode.routes.nvdec_chips import Chip
from p3d.pipeline.decode.routes.nvdec_errors import in_words, reason_of
from p3d.pipeline.decode.wanted_frames import Wanted
from p3d.pipeline.errors import NodeFault, Reason, VideoError
from p3d.pipeline.types import UINT8, FrameBlock, FrameSpec

# Of pictures at their coded size, decoded at a time; one picture if it is larger. The resize has them as float32, too.
PICTURES_BYTES = 32 * 1024**2
STAMP_S = 0.001  # Matroska rounds times to milliseconds
# Ten frames of 256x256 in H.264, each of four squares in one colour: made by tests/zoo/gpu_sample.py.
SAMPLE = "gpu_sample.mp4"
SAMPLE_TOLERANCE = 6.0  # of 255, in the mean of a square: the GPU rounds in another way than FFmpeg


def not_here() -> str:
    """Why this process cannot decode on a GPU, in words; empty if it can."""
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed: pip install 'p3d-embeddings[nvdec]'"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no NVIDIA GPU"
    if not ffmpeg_here():
        return "torchcodec finds no FFmpeg libraries that it can use: install FFmpeg 4 to 8 with shared libraries"
    return ""


def ffmpeg_here() -> str:
    """The major version of the FFmpeg that torchcodec has loaded; empty without torchcodec, or if it found none."""
    try:
        import torchcodec
        import torchcodec.decoders
    except (ImportError, OSError, RuntimeError):
        return ""
    return str(torchcodec.ffmpeg_major_version or "")  # since 0.16 its import succeeds without FFmpeg


def chip_here() -> Chip | None:
    """The GPU of this process; None if it has none. NodeFault if the GPU does not answer. Initialises CUDA."""
    import torch

    with _errors_classified("cuda"):
        if not torch.cuda.is_available():
            return None
        return Chip(torch.cuda.get_device_name(), torch.cuda.get_device_capability())


def gpu_name() -> str:
    """The name of this process's GPU. RuntimeError if it does not answer."""
    import torch

    return torch.cuda.get_device_name()


def free_bytes() -> tuple[int, int]:
    """(free, all) bytes of the memory of this process's GPU. RuntimeError if the GPU does not answer."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(free), int(total)


def sample_colours() -> UINT8:
    """[10 frames, 4 squares, RGB] uint8: the squares of SAMPLE are top left, top right, bottom left, bottom right."""
    frame_F, square_S, channel_C = np.ogrid[:10, :4, :3]
    colours_FSC: UINT8 = ((frame_F * 37 + square_S * 71 + channel_C * 113) % 160 + 48).astype(np.uint8)
    return colours_FSC


def decode_sample(device: str = "cuda") -> UINT8:
    """[N, H, W, 3] uint8: the frames of SAMPLE, decoded on the device. Raises what torchcodec raises."""
    from torchcodec.decoders import VideoDecoder

    _forget_decoders()
    content = (resources.files("p3d.pipeline.decode") / SAMPLE).read_bytes()
    decoder = VideoDecoder(content, dimension_order="NHWC", device=device)
    _refuse_fallback(decoder)
    frames_NHWC: UINT8 = decoder.get_frames_in_range(0, len(decoder)).data.cpu().numpy()
    return frames_NHWC


def sample_problem(decode: Callable[[], UINT8] = decode_sample) -> str:
    """What is wrong with SAMPLE as this process's GPU decodes it, in words; empty if its frames are right."""
    try:
        frames_NHWC = decode()
    except Exception as error:  # noqa: BLE001 - whatever it is, this GPU does not decode a good file
        return f"its GPU does not decode the sample file ({in_words(error)})"
    expected_FSC = sample_colours()
    if frames_NHWC.shape != (len(expected_FSC), 256, 256, 3):
        return f"its GPU decodes the sample file to the shape {frames_NHWC.shape} instead of (10, 256, 256, 3)"
    found_FSC = frames_NHWC.reshape(-1, 2, 128, 2, 128, 3).mean(axis=(2, 4)).reshape(-1, 4, 3)
    most = float(np.abs(found_FSC - expected_FSC).max())
    if most > SAMPLE_TOLERANCE:
        return f"its GPU decodes the sample file to colours that are wrong by {most:.0f} of 255"
    return ""


def read_nvdec(found: Probe, spec: FrameSpec, wanted: Wanted, device: str = "cuda") -> Iterator[FrameBlock]:
    """The wanted frames in order, in blocks of at most 64, as uint8 RGB in host memory.

    Raises VideoError: `corrupt_frames` for damage, `unsupported` if the GPU cannot read the file, or if its frame count
    or times differ from those of the packets, `decode_memory` if the GPU's memory is full. Raises NodeFault if the GPU
    fails, or torchcodec for an unknown reason. `device` is "cpu" in tests, where torchcodec decodes with FFmpeg.
    """
    try:
        yield from _blocks(found, spec, wanted, device)
    finally:
        if device != "cpu":
            with contextlib.suppress(RuntimeError):  # the context is lost, which was raised already
                _return_memory()


def _blocks(found: Probe, spec: FrameSpec, wanted: Wanted, device: str) -> Iterator[FrameBlock]:
    assert found.start_s_N is not None and found.end_s_N is not None  # route: every frame has a time
    with _errors_classified(device, found.path):
        from torchcodec.decoders import VideoDecoder

        _forget_decoders()
        decoder = VideoDecoder(found.path, stream_index=found.stream_index, dimension_order="NCHW", device=device)
        n_frames = len(decoder)
        _refuse_fallback(decoder)
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
            with _errors_classified(device, found.path):
                if origin_s is None:
                    origin_s = float(decoder.get_frame_at(0).pts_seconds)
                    _refuse_fallback(decoder)
                batch = decoder.get_frames_at(asked_N.tolist())
            _prove(found, asked_N, batch.pts_seconds.numpy() - origin_s, tuple(batch.data.shape[2:]))
            with _errors_classified(device, found.path):
                frames_NHWC[first : first + step] = _pixels(batch.data, found, spec)
            del batch  # before the next pictures are decoded
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


def _forget_decoders() -> None:
    """Turn off torchcodec's cache of NVDEC decoders.

    Its key is the coded size. Up to 0.16 at least, a decoder of the cache crops to the picture of the video before, so
    frames of 530 rows after a video of 532 were silently wrong (meta-pytorch/torchcodec#1704; #1706 of September 2026
    repairs it). Each of up to 20 cached decoders also keeps its surfaces on the GPU. A new decoder takes 50 to 70 ms
    (meta-pytorch/torchcodec#1176).
    """
    from torchcodec.decoders import set_nvdec_cache_capacity

    set_nvdec_cache_capacity(0)


def _refuse_fallback(decoder: Any) -> None:
    """RuntimeError if torchcodec decodes on the CPU instead: those colours match neither the GPU's nor PyAV's.

    With the default backend this is known before the first frame.
    """
    if decoder.cpu_fallback:
        raise RuntimeError(str(decoder.cpu_fallback))


def _return_memory() -> None:
    """Give the memory that torch keeps for this process back to the GPU: Ray keeps the process for later decodes."""
    import torch

    torch.cuda.empty_cache()


@contextlib.contextmanager
def _errors_classified(device: str, path: str = "") -> Iterator[None]:
    """Raise what torchcodec and torch raise as VideoError or NodeFault. `path` is that of the video."""
    try:
        yield
    except (ImportError, OSError, RuntimeError, ValueError, IndexError) as error:
        raise _classified(f"torchcodec: {in_words(error, path)}", device) from error


def _classified(words: str, device: str) -> VideoError | NodeFault:
    """The error to raise for a text of torchcodec: a NodeFault unless the video, or full memory, is surely the reason.

    A lost GPU can give the same text as a damaged stream, and a failed allocation no reason at all. So the GPU is asked
    for its free memory, or to decode SAMPLE.
    """
    reason = reason_of(words)
    if reason is None:
        return _node_fault(words)
    if device == "cpu":
        return VideoError(reason, words)
    if reason != Reason.DECODE_MEMORY:
        why = sample_problem()
        return _node_fault(f"{words}; then {why}") if why else VideoError(reason, words)
    try:
        name, space = gpu_name(), "{:.1f} of {:.1f} GB".format(*(number / 1e9 for number in free_bytes()))
    except RuntimeError as error:
        if reason_of(in_words(error)) != reason:
            return _node_fault(f"{words}; then {in_words(error)}")
        name, space = "the GPU", "nothing"
    return VideoError(reason, f"{name} of {platform.node()} has {space} of its memory free: {words}")


def _node_fault(words: str) -> NodeFault:
    return NodeFault(
        f"{platform.node()}: its GPU could not decode ({words}). Check its NVIDIA driver with libnvcuvid, torchcodec "
        "and FFmpeg (`p3d cluster check`), then resume"
    )
