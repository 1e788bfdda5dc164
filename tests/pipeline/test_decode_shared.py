"""Real and hostile sample files: each has its documented result, and every clip equals that of an independent reader.

The samples (44 files, `tests/samples/samples.toml`) are not part of the repository; `make samples` fetches some.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest
from av.filter import Graph

from p3d.pipeline.clips.rules import Sampling, clip_spans, frame_numbers, parse_sampling
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.probe import probe
from p3d.pipeline.decode.routes.choice import route
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FrameBlock, FrameSpec, VideoEnd, VideoInfo
from p3d.pipeline.types.policy import DecodeLimits, DecodePolicy
from tests import samples

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(182, 242))
SAMPLINGS = [parse_sampling("every:16", clip_frames=16), parse_sampling("uniform:20", clip_frames=16)]
RESAMPLED = parse_sampling("every:8", clip_frames=8, fps=10.0)
# Both routes agree bit for bit with the reader below on every file (measured). Another build of FFmpeg may round
# differently, so a few levels of 255 are allowed; a wrong frame differs by far more.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 5, 0.05

REASON = re.compile(r"`(\w+)`(?:; (\d+) with `--partial keep`)?: ")


def documented() -> Iterator[tuple[str, tuple[str, int] | Reason, int]]:
    """(file, (route, frames) or its failure reason, frames under `--partial keep`) of docs/reference/samples.md."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "samples.md").read_text()
    block = page.partition("<!-- generated: samples -->")[2].partition("<!-- end -->")[0]
    for line in block.strip().splitlines()[2:]:
        name, route, n_frames, outcome = (cell.strip() for cell in line.strip("|").split("|"))
        failed = REASON.match(outcome)
        if route:
            yield name, (route, int(n_frames)), 0
        else:
            assert failed is not None, line
            yield name, Reason(failed[1]), int(failed[2] or 0)


# file -> (route, frames) or the reason of its failure, under `--decoder auto --partial fail`: the table of the page
EXPECTED: dict[str, tuple[str, int] | Reason] = {name: result for name, result, _ in documented()}
KEPT = [(name, n_kept) for name, _, n_kept in documented() if n_kept]
GOOD = [name for name, result in EXPECTED.items() if isinstance(result, tuple)]
BAD = [name for name, result in EXPECTED.items() if isinstance(result, Reason)]
TURN_FILTERS = {-90: ["transpose=clock"], 90: ["transpose=cclock"], 180: ["hflip", "vflip"], -180: ["hflip", "vflip"]}


def sample(name: str) -> str:
    return str(samples.need(f"videos/{name}"))


def reference(path: str) -> tuple[np.ndarray, np.ndarray, float]:
    """(frames [N, 160, 160, 3], start_s [N], end of the last one): all frames from front to back, without our code."""
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
        elif isinstance(message, VideoEnd):
            return infos[-1], found, message
    raise AssertionError("no VideoEnd")


@pytest.mark.fault(17, 18)
@pytest.mark.timeout(60)  # two of these files make decord hang without end
@pytest.mark.parametrize("name", GOOD)
def test_every_clip_equals_that_of_the_reference(name: str) -> None:
    """Frames and times of every clip, under both sampling rules and resampled, on the documented route."""
    path = sample(name)
    frames_NHWC, start_s_N, end_s = reference(path)
    expected_route, n_frames = EXPECTED[name]
    faster = "faster" in route(probe(path, DecodeLimits()), DecodePolicy(), SPEC)[1]
    times = list(zip(start_s_N, np.append(start_s_N[1:], end_s), strict=True))
    for sampling in SAMPLINGS:
        info, found, end = decoded(path, sampling, DecodePolicy())
        assert info.route == expected_route or (sampling is not SAMPLINGS[0] and info.route == "pyav")  # GOPs left out
        assert info.n_frames == end.n_frames == len(frames_NHWC) == n_frames
        assert end.duration_s == pytest.approx(end_s, abs=1e-6)
        spans = clip_spans(sampling, n_frames)
        for number in {n for span in spans for n in frame_numbers(sampling, span, n_frames).tolist()}:
            assert found[number][1:] == pytest.approx(times[number], abs=1e-6)
            assert_same(found[number][0], frames_NHWC[number])
        if sampling is SAMPLINGS[0]:  # the other route gives the same, bit for bit, or refuses
            other = "pyav" if expected_route == "decord" else "decord"
            try:
                _, by_other, _ = decoded(path, sampling, DecodePolicy(decoder=other))  # type: ignore[arg-type] # one of them
            except VideoError as error:
                assert (other, error.reason) == ("decord", Reason.UNSUPPORTED)
                assert not faster, "decord reads it; PyAV is only chosen for speed"
                continue
            assert by_other.keys() == found.keys()
            assert all((by_other[n][0] == found[n][0]).all() and by_other[n][1:] == found[n][1:] for n in found)
    _, found, end = decoded(path, RESAMPLED, DecodePolicy())
    screen = on_screen(10.0, start_s_N, end_s)
    assert (end.n_frames, end.resampled_frames) == (n_frames, len(screen))
    spans = clip_spans(RESAMPLED, len(screen))
    for number in {screen[tick] for span in spans for tick in frame_numbers(RESAMPLED, span, len(screen))}:
        assert_same(found[number][0], frames_NHWC[number])


def assert_same(pixels: np.ndarray, expected: np.ndarray) -> None:
    if (pixels == expected).all():
        return
    difference = np.abs(pixels.astype(int) - expected)
    assert difference.max() <= MAX_DIFFERENCE and difference.mean() <= MEAN_DIFFERENCE


def on_screen(fps: float, start_s_N: np.ndarray, end_s: float) -> list[int]:
    """The frame that a viewer sees at each tick: the last that has begun, within a millisecond."""
    n_ticks = max(1, int(np.ceil((end_s - 0.001) * fps - 1e-9)))
    return [int((start_s_N <= (tick + 1e-9) / fps + 0.001).sum()) - 1 for tick in range(n_ticks)]


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


@pytest.mark.fault(16)
@pytest.mark.parametrize(("name", "n_frames"), KEPT)
def test_the_frames_before_the_damage_are_kept_on_request(name: str, n_frames: int) -> None:
    """`--partial keep` gives the good frames, marks the video, and lays its clips out on these frames."""
    claimed = {"generated/trunc_faststart_50.mp4": 64, "generated/corrupt_200bytes.mp4": 64}
    for sampling in SAMPLINGS:
        info, found, end = decoded(sample(name), sampling, DecodePolicy(partial="keep"))
        assert info.claimed_frames == claimed.get(name, info.claimed_frames)
        assert (end.n_frames, end.truncated) == (n_frames, True)
        for span in clip_spans(sampling, n_frames):
            assert set(frame_numbers(sampling, span, n_frames).tolist()) <= found.keys()


def test_every_sample_has_an_expectation() -> None:
    """The table of docs/reference/samples.md names exactly the videos of the list."""
    assert set(samples.names_below("videos")) == EXPECTED.keys()
