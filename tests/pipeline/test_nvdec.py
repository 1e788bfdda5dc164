"""The GPU decoder: refused where it cannot be used; the requested frames where torchcodec is installed.

On the CPU torchcodec decodes with FFmpeg, so numbers, times, sizes and refusals are tested without a GPU. Where it is
not installed, a stand-in raises its texts. Only the last test needs a GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import av
import numpy as np
import pytest
import torch

from p3d.jobs.planning.prepare import MAX_DECODE_TASKS
from p3d.jobs.worker.actor import shard_error_of
from p3d.jobs.worker.decoding import FETCHED_AHEAD, GPU_SHARE, gpus_of_a_decode, gpus_of_a_worker
from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.messages import failures_as_values
from p3d.pipeline.decode.probe import Probe, probe
from p3d.pipeline.decode.routes import nvdec
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.decode.routes.nvdec import (
    SAMPLE,
    decode_sample,
    ffmpeg_here,
    not_here,
    read_nvdec,
    sample_problem,
)
from p3d.pipeline.decode.routes.nvdec_chips import SMALLEST, Chip, nvdec_codecs
from p3d.pipeline.decode.wanted_frames import wanted_by
from p3d.pipeline.errors import NodeFault, Reason, VideoError
from p3d.pipeline.recipe import WORKERS_PER_GPU
from p3d.pipeline.types import FrameBlock, FrameSpec
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.conftest import REPO
from tests.zoo import gpu_sample, make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))  # whole pictures, for the numbers in them
EVERY = parse_sampling("every:16", clip_frames=16)
NVDEC = DecodePolicy(decoder="nvdec")


# Texts as torchcodec and torch raise them. Those of the first two groups were `corrupt_frames` before.
IN_CORE = "/__w/torchcodec/torchcodec/meta-pytorch/torchcodec/src/torchcodec/_core"
OPS = "/opt/_internal/cpython-3.11/lib/python3.11/site-packages/torch/include/torch/csrc/stable/ops.h"
NODE_TEXTS = [
    f"create_decoder, {IN_CORE}/BetaCudaDeviceInterface.cpp:193, Failed to create NVDEC decoder: 100",
    f"createDecoder, {IN_CORE}/BetaCudaDeviceInterface.cpp:129, Failed to create NVDEC decoder: 999",
    f"createDeviceInterface, {IN_CORE}/DeviceInterface.cpp:90, Unsupported device: cuda (device type: cuda)",
    "Unsupported device: cuda",
    f"cuvidGetDecoderCaps, {IN_CORE}/NVCUVIDRuntimeLoader.cpp:244, cuvidGetDecoderCaps called but NVCUVID not loaded!",
    "[CUDA] Fallback status: Falling back due to: NVcuvid unavailable",
    "[CUDA] Fallback status: Falling back due to: Unknown reason - try the 'nvdec' backend to know more!",
    f"get_device_index, {IN_CORE}/CUDACommon.h:42, Failed to get current CUDA device.",
    f"sync_streams, {IN_CORE}/CUDACommon.cpp:28, cudaEventRecord failed: an illegal memory access was encountered",
    f"unmap_previous_frame, {IN_CORE}/BetaCudaDeviceInterface.cpp:877, Failed to unmap previous frame: 700",
    f"f, {IN_CORE}/BetaCudaDeviceInterface.cpp:1108, Failed to copy NVDEC surface: unspecified launch failure",
    f"f, {IN_CORE}/CudaDeviceInterface.cpp:77, Failed to create specified HW device. This typically happens when your "
    "installed FFmpeg doesn't support CUDA (see https://github.com/pytorch/torchcodec#installing-cuda-enabled-torchcodec"
    "). FFmpeg error: Cannot allocate memory",
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: no kernel image is available for execution on the device",
    "No CUDA GPUs are available",
    f"f, {IN_CORE}/SingleStreamDecoder.cpp:470, Codec not found",
    "Could not load libtorchcodec. Likely causes:\n          1. FFmpeg is not properly installed in your environment.",
    "There were no tensor arguments to this function (e.g., you passed an empty list of Tensors), but no fallback "
    "function is registered for schema torchcodec_ns::create_from_file.",
    'torch_call_dispatcher( "aten::permute", "", stack.data(), TORCH_ABI_VERSION) API call failed at /x.h, line 85',
    "a text that no version has raised so far",
]
FULL_TEXTS = [
    f"create_decoder, {IN_CORE}/BetaCudaDeviceInterface.cpp:193, Failed to create NVDEC decoder: 2",
    "CUDA out of memory. Tried to allocate 256.00 MiB. GPU 0 has a total capacity of 14.58 GiB.",
    "CUDA error: out of memory",
    f'torch_call_dispatcher( "aten::empty", "memory_format", stack.data(), TORCH_ABI_VERSION) API call failed at {OPS}',
    f"CUDA out of memory. (originally from aoti_torch_aten_full( size.data(), fill) API call failed at {OPS}, line 92)",
]
VIDEO_TEXTS = [
    (
        f"f, {IN_CORE}/S.cpp:41, Could not open input file: PATH Invalid data found when processing input",
        "corrupt_frames",
    ),
    (
        f"f, {IN_CORE}/S.cpp:1614, Could not push packet to decoder: Invalid data found when processing input",
        "corrupt_frames",
    ),
    (
        f"f, {IN_CORE}/S.cpp:1614, Could not push packet to decoder: Generic error in an external library",
        "corrupt_frames",
    ),
    (f"f, {IN_CORE}/BetaCudaDeviceInterface.cpp:763, Decoder not initialized before picture decode", "corrupt_frames"),
    ("Requested next frame while there are no more frames left to decode.", "unsupported"),
    (f"create_decoder, {IN_CORE}/BetaCudaDeviceInterface.cpp:193, Failed to create NVDEC decoder: 801", "unsupported"),
    ("[CUDA] Fallback status: Falling back due to: Video not supported", "unsupported"),
    (f"f, {IN_CORE}/CUDACommon.cpp:117, Expected tensor of shape 360x640x3, got [480, 640, 3]", "unsupported"),
]

needs_torchcodec = pytest.mark.skipif(
    not ffmpeg_here(), reason="torchcodec, or an FFmpeg that it can use, is not installed"
)
needs_gpu = pytest.mark.skipif(bool(not_here()), reason=not_here() or "a GPU is available")


def joined(blocks: list[FrameBlock]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    names = ("numbers_N", "start_s_N", "end_s_N", "frames_NHWC")
    return tuple(np.concatenate([getattr(block, name) for block in blocks]) for name in names)  # type: ignore[return-value]


def by_torchcodec(path: Path, sampling: Sampling) -> list[FrameBlock]:
    found = probe(str(path), DecodeLimits())
    return list(read_nvdec(found, SPEC, wanted_by(sampling, found.n_frames), device="cpu"))


@pytest.mark.parametrize(
    ("codec", "options", "objection"),
    [
        ("mpeg4", {}, "it does not decode codec mpeg4"),
        ("libx264", {"pixel_format": "yuv420p10le"}, "pixel format yuv420p10le"),
        ("libx264", {"rotation": 90.0}, "a turned"),
        ("libx264", {"container": "avi"}, "container avi"),
    ],
)
def test_what_a_gpu_cannot_read_correctly_fails_that_video(
    codec: str, options: dict, objection: str, tmp_path: Path
) -> None:
    """If nvdec is requested by name, no other decoder is used, and the failure names the objection."""
    path = make.video(tmp_path / "video.mp4", codec, 20, **options)
    with pytest.raises(VideoError, match=f"nvdec does not read this video: {objection}") as caught:
        list(open_frames(str(path), SPEC, EVERY, policy=NVDEC))
    assert caught.value.reason == Reason.UNSUPPORTED


def test_auto_never_takes_the_gpu(tmp_path: Path) -> None:
    """Its colours differ, so it is chosen by name alone."""
    found = probe(str(make.video(tmp_path / "video.mp4", "libx264", 20)), DecodeLimits())
    assert route(found, DecodePolicy(), SPEC)[0] != "nvdec"
    assert route(found, NVDEC, SPEC)[0] == "nvdec"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """A good video whose name has the texts of errors in it."""
    path = make.video(tmp_path_factory.mktemp("v") / "CUDA error out of memory.mp4", "libx264", 20)
    return probe(str(path), DecodeLimits())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Install a torchcodec whose VideoDecoder is the function that is given."""

    def install(decoder: Callable[..., object]) -> None:
        torchcodec, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
        torchcodec.ffmpeg_major_version, torchcodec.decoders = 5, decoders  # type: ignore[attr-defined]
        decoders.VideoDecoder, decoders.set_nvdec_cache_capacity = decoder, lambda _: None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchcodec", torchcodec)
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)

    return install


def raising(text: str) -> Callable[..., object]:
    def decoder(path: str, **_: object) -> object:
        raise RuntimeError(text.replace("PATH", path))

    return decoder


def read_on(found: Probe, device: str) -> None:
    list(read_nvdec(found, SPEC, wanted_by(EVERY, found.n_frames), device=device))


@pytest.mark.fault(10)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("text", NODE_TEXTS)
def test_a_fault_of_the_node_fails_no_video(text: str, device: str, found: Probe, stand_in: Callable) -> None:
    """It is no message about the video, and the job stops, resumable, with the node, the text and what to do."""
    stand_in(raising(text))
    with pytest.raises(NodeFault) as caught:
        list(failures_as_values(read_nvdec(found, SPEC, wanted_by(EVERY, found.n_frames), device=device)))
    trouble = shard_error_of(caught.value)
    assert trouble.kind == "store" and "\n" not in trouble.detail
    said = text.splitlines()[0]
    assert (said.rpartition(", ")[2] if ".cpp:" in said or ".h:" in said else said) in trouble.detail
    assert nvdec.platform.node() in trouble.detail and "then resume" in trouble.detail


@pytest.mark.fault(9)
@pytest.mark.parametrize("text", FULL_TEXTS)
def test_a_full_gpu_is_named(text: str, found: Probe, stand_in: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is `decode_memory`, with the GPU and its free memory. A GPU that no longer answers is a node fault."""
    stand_in(raising(text))
    monkeypatch.setattr(nvdec, "gpu_name", lambda: "NVIDIA T4")
    monkeypatch.setattr(nvdec, "free_bytes", lambda: (32 * 10**6, 15 * 10**9))
    with pytest.raises(
        VideoError, match=r"NVIDIA T4 of .* has 0\.0 of 15\.0 GB of its memory free: torchcodec: "
    ) as caught:
        read_on(found, "cuda")
    assert caught.value.reason == Reason.DECODE_MEMORY

    def lost() -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    def full() -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory")  # not even a context fits

    monkeypatch.setattr(nvdec, "free_bytes", lost)
    with pytest.raises(NodeFault, match="then CUDA error: unspecified launch failure"):
        read_on(found, "cuda")
    monkeypatch.setattr(nvdec, "free_bytes", full)
    with pytest.raises(VideoError, match="has nothing of its memory free"):
        read_on(found, "cuda")


@pytest.mark.fault(16)
@pytest.mark.parametrize(("text", "reason"), VIDEO_TEXTS)
def test_a_fault_of_the_video_fails_it_if_the_gpu_decodes_the_sample(
    text: str, reason: str, found: Probe, stand_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost GPU may give the same text; then it is a fault of the node."""
    stand_in(raising(text))
    monkeypatch.setattr(nvdec, "sample_problem", lambda: "")
    for device in ("cpu", "cuda"):
        with pytest.raises(VideoError) as caught:
            read_on(found, device)
        assert caught.value.reason == reason and found.path not in caught.value.detail
    monkeypatch.setattr(nvdec, "sample_problem", lambda: "its GPU does not decode the sample file (CUDA error)")
    with pytest.raises(NodeFault, match="its GPU does not decode the sample file"):
        read_on(found, "cuda")


class Decoder:
    """A stand-in that decodes grey pictures, and remembers how many were asked for at a time."""

    asked: list[int]

    def __init__(self, found: Probe, fallback: str = "") -> None:
        self.found, self.cpu_fallback, self.asked = found, fallback, []

    def __len__(self) -> int:
        return self.found.n_frames

    def get_frame_at(self, _: int) -> object:
        return SimpleNamespace(pts_seconds=0.0)

    def get_frames_at(self, numbers: list[int]) -> object:
        self.asked.append(len(numbers))
        times = torch.from_numpy(self.found.start_s_N[numbers])  # type: ignore[index] # it has times
        return SimpleNamespace(
            data=torch.full((len(numbers), 3, *self.found.shown_hw), 128, dtype=torch.uint8), pts_seconds=times
        )


def test_few_pictures_are_decoded_at_a_time(found: Probe, stand_in: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 32 MiB, because the resize has them as float32 too: five of 1080p, or one picture if it is larger."""
    decoder = Decoder(replace(found, coded_height=1080, coded_width=1920))
    stand_in(lambda *_, **__: decoder)
    read_on(decoder.found, "cpu")
    assert decoder.asked == [5] * 4
    monkeypatch.setattr(nvdec, "PICTURES_BYTES", 1)
    decoder = Decoder(found)
    read_on(found, "cpu")
    assert decoder.asked == [1] * 20


def test_torch_out_of_memory_in_the_resize_is_classified_too(
    found: Probe, stand_in: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was `internal` before: the message of a defect of this program."""

    def full(*_: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    stand_in(lambda *_, **__: Decoder(found))
    monkeypatch.setattr(nvdec, "_pixels", full)
    with pytest.raises(VideoError) as caught:
        read_on(found, "cpu")
    assert caught.value.reason == Reason.DECODE_MEMORY


def test_a_video_that_falls_back_to_the_cpu_is_refused_before_it_is_decoded(found: Probe, stand_in: Callable) -> None:
    """torchcodec would decode it with FFmpeg, in other colours."""
    decoder = Decoder(found, "[CUDA] Fallback status: Falling back due to: Video not supported")
    stand_in(lambda *_, **__: decoder)
    with pytest.raises(VideoError, match="Video not supported") as caught:
        read_on(found, "cpu")
    assert caught.value.reason == Reason.UNSUPPORTED and decoder.asked == []


@pytest.mark.parametrize(
    ("capability", "codecs"),
    [
        ((5, 0), "h264"),
        ((7, 5), "h264 hevc vp8 vp9"),  # T4
        ((8, 0), "h264 hevc vp8 vp9"),  # A100
        ((8, 6), "h264 hevc vp8 vp9 av1"),  # A10
        ((8, 9), "h264 hevc vp8 vp9 av1"),  # L4
        ((9, 0), "h264 hevc vp8 vp9"),  # H100, H200
        ((10, 0), "h264 hevc vp8 vp9 av1"),  # B200
        ((12, 0), "h264 hevc vp8 vp9 av1"),
    ],
)
def test_codecs_follow_the_chip(capability: tuple[int, int], codecs: str) -> None:
    """As in NVIDIA's table: A100 and Hopper have no engine for AV1."""
    assert nvdec_codecs(capability) == set(codecs.split())


def test_a_codec_that_the_chip_does_not_decode_is_refused_with_its_name(found: Probe) -> None:
    """AV1 on an H100 is `unsupported`, on an L4 it is decoded, and so it is where no GPU is known."""
    video = replace(found, codec="av1", coded_height=360, coded_width=640)
    with pytest.raises(VideoError, match="NVIDIA H100 PCIe does not decode codec av1") as caught:
        route(video, NVDEC, SPEC, Chip("NVIDIA H100 PCIe", (9, 0)))
    assert caught.value.reason == Reason.UNSUPPORTED
    for chip in (Chip("NVIDIA L4", (8, 9)), None):
        assert route(video, NVDEC, SPEC, chip)[0] == "nvdec"


@pytest.mark.parametrize("codec", SMALLEST)
def test_small_pictures_are_refused_before_they_are_decoded(codec: str, found: Probe) -> None:
    """Each codec has a smallest picture; the message has both sizes."""
    width, height = SMALLEST[codec]
    smallest = replace(found, codec=codec, coded_width=width, coded_height=height)
    assert route(smallest, NVDEC, SPEC)[0] == "nvdec"
    for change in ({"coded_width": width - 2}, {"coded_height": height - 2}):
        with pytest.raises(VideoError, match=f"of {codec} it decodes {width}x{height} or more"):
            route(replace(smallest, **change), NVDEC, SPEC)


def test_the_sample_file_has_the_expected_frames(tmp_path: Path) -> None:
    """PyAV reads ten frames in the colours that `sample_colours` states, from the packaged file and from a new one."""
    gpu_sample.make(tmp_path / SAMPLE)
    for path in (REPO / "pipeline" / "decode" / SAMPLE, tmp_path / SAMPLE):
        with av.open(str(path)) as container:
            frames_NHWC = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames_NHWC.shape == (10, 256, 256, 3) and sample_problem(lambda frames=frames_NHWC: frames) == ""
        assert path.stat().st_size < 10_000


def test_a_gpu_that_decodes_the_sample_file_wrongly_is_noticed() -> None:
    """Frames that are missing, in another order, moved or in exchanged colours, and errors."""
    right = np.repeat(np.repeat(nvdec.sample_colours().reshape(10, 2, 2, 3), 128, axis=1), 128, axis=2)
    assert sample_problem(lambda: right) == ""
    for wrong in (right[::-1], np.roll(right, 16, axis=1), right[..., ::-1]):
        assert "colours that are wrong by" in sample_problem(lambda wrong=wrong: wrong)
    assert "shape (9, 256, 256, 3)" in sample_problem(lambda: right[:9])

    def fails() -> np.ndarray:
        raise OSError("libnvcuvid.so.1: cannot open shared object file")

    assert "libnvcuvid.so.1" in sample_problem(fails)


def test_torchcodec_without_ffmpeg_is_not_usable(stand_in: Callable) -> None:
    """Since 0.16 its import succeeds without FFmpeg."""
    stand_in(raising(""))
    assert ffmpeg_here() == "5"
    sys.modules["torchcodec"].ffmpeg_major_version = None  # type: ignore[attr-defined]
    assert ffmpeg_here() == ""


@needs_torchcodec
def test_the_cache_of_decoders_can_be_turned_off(tmp_path: Path) -> None:
    """The option exists, and is 0 once a video was read: a cached decoder may crop to the size of another video."""
    from torchcodec.decoders import get_nvdec_cache_capacity, set_nvdec_cache_capacity

    set_nvdec_cache_capacity(20)
    by_torchcodec(make.video(tmp_path / "video.mp4", "libx264", 20), EVERY)
    assert get_nvdec_cache_capacity() == 0


@needs_torchcodec
def test_torchcodec_decodes_the_sample_file() -> None:
    """Here on the CPU: the same check as on a GPU before a job."""
    assert sample_problem(lambda: decode_sample("cpu")) == ""


@pytest.mark.parametrize("decode_tasks", [1, MAX_DECODE_TASKS])
def test_a_gpu_serves_its_worker_and_all_its_decodes(decode_tasks: int) -> None:
    """Otherwise Ray would let the decodes wait for a GPU without end."""
    share = 1 - gpus_of_a_worker("nvdec", decode_tasks)
    assert share == pytest.approx(FETCHED_AHEAD * decode_tasks * GPU_SHARE) and share < 0.5
    assert gpus_of_a_worker("auto", decode_tasks) == 1


@pytest.mark.parametrize("decode_tasks", [1, MAX_DECODE_TASKS])
@pytest.mark.parametrize("workers_per_gpu", range(1, WORKERS_PER_GPU + 1))
@pytest.mark.parametrize("decoder", ["auto", "nvdec"])
def test_workers_that_share_a_gpu_fit_with_all_their_decodes(
    decoder: str, workers_per_gpu: int, decode_tasks: int
) -> None:
    """In Ray's units of 1/10 000 of a GPU, also where they do not divide it."""
    worker, decode = gpus_of_a_worker(decoder, decode_tasks, workers_per_gpu), gpus_of_a_decode(workers_per_gpu)
    decodes = FETCHED_AHEAD * decode_tasks if decoder == "nvdec" else 0
    units = workers_per_gpu * (round(worker * 10_000) + decodes * round(decode * 10_000))
    assert 9_000 < units <= 10_000 and decode >= 0.0001


@needs_torchcodec
@pytest.mark.parametrize("rule", ["every:16", "uniform:3"])
@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("libx265", "mp4"), ("libvpx-vp9", "webm")])
def test_frames_are_those_of_the_other_routes(codec: str, container: str, rule: str, tmp_path: Path) -> None:
    """Each frame shows its number: the decoded frames are the requested ones, at the times of the other routes."""
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = make.video(tmp_path / f"v.{container}", codec, 150, gop=30, b_frames=2, options=options)
    sampling = parse_sampling(rule, clip_frames=16)
    numbers_N, start_s_N, end_s_N, frames_NHWC = joined(by_torchcodec(path, sampling))
    messages = open_frames(str(path), SPEC, sampling, policy=DecodePolicy(decoder="pyav"))
    expected = joined([message for message in messages if isinstance(message, FrameBlock)])
    assert make.numbers_in(frames_NHWC) == numbers_N.tolist() == expected[0].tolist()
    np.testing.assert_allclose(start_s_N, expected[1], atol=1e-9)
    np.testing.assert_allclose(end_s_N, expected[2], atol=1e-9)
    differences = np.abs(frames_NHWC.astype(int) - expected[3])
    assert differences.mean() < 2  # of 255


@needs_torchcodec
def test_a_frame_of_another_time_is_noticed(tmp_path: Path) -> None:
    """If packets and decoder disagree on which frame is which, or how many there are, the video fails."""
    found = probe(str(make.video(tmp_path / "video.mp4", "libx264", 60, gop=10)), DecodeLimits())
    assert found.start_s_N is not None
    wanted = wanted_by(EVERY, found.n_frames)
    shifted = replace(found, start_s_N=np.concatenate([found.start_s_N[:30], found.start_s_N[30:] + 0.04]))
    with pytest.raises(VideoError, match=r"a frame at 1\.200 s for frame 30, which is at 1\.240 s"):
        list(read_nvdec(shifted, SPEC, wanted, device="cpu"))
    with pytest.raises(VideoError, match="counts 60 frames, the packets say 61"):
        list(read_nvdec(replace(found, n_frames=61), SPEC, wanted, device="cpu"))


@needs_torchcodec
def test_a_damaged_file_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    """What torchcodec raises becomes `corrupt_frames`, in one line."""
    whole = make.video(tmp_path / "video.mp4", "libx264", 60, gop=10, noise=40)
    found = probe(str(whole), DecodeLimits())
    whole.write_bytes(b"")
    with pytest.raises(VideoError) as caught:
        list(read_nvdec(found, SPEC, wanted_by(EVERY, 60), device="cpu"))
    assert caught.value.reason == Reason.CORRUPT_FRAMES
    assert caught.value.detail.startswith("torchcodec: Could not open") and "\n" not in caught.value.detail


@needs_gpu
def test_on_a_gpu_the_frames_are_the_same_within_its_colours(tmp_path: Path) -> None:
    """Through `open_frames`, on the device: numbers and pictures, and the route is recorded."""
    path = make.video(tmp_path / "video.mp4", "libx264", 150, hw=(240, 320), gop=30, b_frames=2)
    assert sample_problem() == ""
    messages = list(open_frames(str(path), SPEC, EVERY, policy=NVDEC))
    numbers_N, _, _, frames_NHWC = joined([message for message in messages if isinstance(message, FrameBlock)])
    assert messages[0].route == "nvdec"  # type: ignore[union-attr] # VideoInfo is first
    assert make.numbers_in(frames_NHWC) == numbers_N.tolist() == list(range(150))
