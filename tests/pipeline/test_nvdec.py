"""The GPU decoder: refused where it cannot be used; the requested frames where torchcodec is installed.

On the CPU torchcodec decodes with FFmpeg, so numbers, times, sizes and refusals are tested without a GPU. Only the last
test needs one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p3d.jobs.planning.prepare import MAX_DECODE_TASKS
from p3d.jobs.worker.decoding import FETCHED_AHEAD, GPU_SHARE, gpus_of_a_worker
from p3d.pipeline.clips.rules import Sampling, parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.decode.routes.nvdec import not_here, read_nvdec
from p3d.pipeline.decode.wanted_frames import wanted_by
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests.zoo import make

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))  # whole pictures, for the numbers in them
EVERY = parse_sampling("every:16", clip_frames=16)
NVDEC = DecodePolicy(decoder="nvdec")


def on_cpu() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, OSError, RuntimeError):
        return False
    return True


needs_torchcodec = pytest.mark.skipif(not on_cpu(), reason="torchcodec, or an FFmpeg that it can use, is not installed")
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


@pytest.mark.parametrize("decode_tasks", [1, MAX_DECODE_TASKS])
def test_a_gpu_serves_its_worker_and_all_its_decodes(decode_tasks: int) -> None:
    """Otherwise Ray would let the decodes wait for a GPU without end."""
    share = 1 - gpus_of_a_worker("nvdec", decode_tasks)
    assert share == pytest.approx(FETCHED_AHEAD * decode_tasks * GPU_SHARE) and share < 0.5
    assert gpus_of_a_worker("auto", decode_tasks) == 1


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
    messages = list(open_frames(str(path), SPEC, EVERY, policy=NVDEC))
    numbers_N, _, _, frames_NHWC = joined([message for message in messages if isinstance(message, FrameBlock)])
    assert messages[0].route == "nvdec"  # type: ignore[union-attr] # VideoInfo is first
    assert make.numbers_in(frames_NHWC) == numbers_N.tolist() == list(range(150))
