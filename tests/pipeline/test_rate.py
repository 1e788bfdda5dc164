"""Resampling: tick k of a video is the frame shown at k / fps, whatever the video's own times are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.pipeline.clips import rate
from p3d.pipeline.clips.rules import (
    Sampling,
    clip_spans,
    frame_numbers,
    laid_over,
    parse_sampling,
    ticks_of,
    whole_ticks,
)
from p3d.pipeline.decode.frames import open_frames
from p3d.pipeline.decode.wanted_frames import wanted_by
from p3d.pipeline.extract import extract_shard
from p3d.pipeline.types import DecodeMessage, FrameBlock, FrameSpec, ShardPlan, VideoEnd, VideoInfo, VideoRef
from p3d.pipeline.types.policy import DecodePolicy
from tests.zoo import make

rates = st.one_of(st.integers(1, 240).map(float), st.floats(0.1, 240), st.just(30000 / 1001))
gaps_ms = st.lists(st.integers(1, 3000), min_size=1, max_size=40)


def on_screen(fps: float, start_s_N: np.ndarray, duration_s: float) -> list[int]:
    """The rule, written directly: at k / fps, the latest frame that has started (within 1 ms), up to the end."""
    found, k = [], 0
    while not found or k / fps < duration_s - rate.STAMP_S - 1e-9 / fps:
        found.append(max(i for i, start_s in enumerate(start_s_N) if start_s - rate.STAMP_S <= (k + 1e-9) / fps))
        k += 1
    return found


@given(rates, gaps_ms)
def test_a_tick_is_the_frame_on_screen(fps: float, gaps: list[int]) -> None:
    """The tick ranges of all frames together match the directly written rule, and leave no tick out."""
    edges_s = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    sampling = Sampling("every", 1, 1, fps=fps)
    ticks: dict[int, int] = {}
    for number, (start_s, end_s) in enumerate(itertools.pairwise(edges_s)):
        ticks |= dict.fromkeys(range(*ticks_of(sampling, number, start_s, end_s)), number)
    expected = on_screen(fps, edges_s[:-1], edges_s[-1])
    assert ticks == dict(enumerate(expected)) and len(expected) == rate.n_ticks(fps, edges_s[-1])


@given(st.integers(1, 240), st.integers(1, 500), st.booleans())
def test_a_video_of_the_wanted_rate_stays_as_it_is(fps: int, n_frames: int, rounded: bool) -> None:
    """Resampled to its own rate, a video keeps each frame once, with exact times and with times rounded to 1 ms."""
    edges_s = np.arange(n_frames + 1) / fps
    edges_s = np.round(edges_s, 3) if rounded else edges_s
    first_N, end_N = rate.first_ticks(fps, edges_s[:-1]), rate.first_ticks(fps, edges_s[1:])
    np.testing.assert_array_equal(first_N, np.arange(n_frames))
    np.testing.assert_array_equal(end_N, np.arange(1, n_frames + 1))


@given(
    rates,
    gaps_ms,
    st.sampled_from(["every", "uniform", "spread"]),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 3),
)
def test_exactly_the_frames_that_clips_need_are_wanted(
    fps: float, gaps: list[int], rule: str, value: int, t: int, step: int
) -> None:
    """Asked one by one or all at once, the answer is the same: the frames at the ticks of the clips."""
    edges_s = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    start_s_N, end_s_N = edges_s[:-1], edges_s[1:]
    sampling = Sampling(rule, value, t, step, fps)  # type: ignore[arg-type]
    n_ticks = laid_over(sampling, len(gaps), edges_s[-1])
    screen = on_screen(fps, start_s_N, edges_s[-1])
    spans = clip_spans(sampling, n_ticks)
    needed = {screen[tick] for span in spans for tick in frame_numbers(sampling, span, n_ticks)}
    wanted = wanted_by(sampling, n_ticks)
    one_by_one = [i for i in range(len(gaps)) if wanted.has(i, start_s_N[i], end_s_N[i])]
    assert one_by_one == wanted.of(start_s_N, end_s_N).tolist()
    assert needed <= set(one_by_one) and set(one_by_one) - needed <= {0}  # frame 0 is also wanted if shown under 1 ms


@given(rates, gaps_ms, st.integers(1, 3000))
def test_whole_ticks_end_before_whatever_follows(fps: float, gaps: list[int], more: int) -> None:
    """The ticks that are complete after a frame lie before its end, and no later frame changes them."""
    sampling, end_s = Sampling("every", 1, 1, fps=fps), sum(gaps) / 1000
    whole = whole_ticks(sampling, len(gaps) - 1, end_s)
    assert whole / fps <= end_s + 1e-6 and whole <= rate.n_ticks(fps, end_s)
    assert ticks_of(sampling, len(gaps), end_s, end_s + more / 1000)[0] >= whole


@given(
    st.floats(0.5, 60),
    gaps_ms,
    st.sampled_from(["every", "uniform", "spread"]),
    st.integers(1, 30),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 5),
)
def test_rows_are_cut_as_frames_arrive_and_are_those_on_screen(
    fps: float, gaps: list[int], rule: str, value: int, t: int, step: int, block: int
) -> None:
    """However frames are spaced and sent, each row has the frames shown at its ticks, and never ends too late."""
    edges_s = np.concatenate([[0], np.cumsum(gaps)]) / 1000
    duration_s = float(edges_s[-1])
    sampling = Sampling(rule, value, t, step, fps)  # type: ignore[arg-type]
    n_ticks = laid_over(sampling, len(gaps), duration_s)
    numbers = wanted_by(sampling, n_ticks).of(edges_s[:-1], edges_s[1:])
    frames_NHWC = np.arange(len(gaps), dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    seen: list[list[int]] = []

    def encode(frames_NHWC: np.ndarray, index_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.extend([int(frames_NHWC[at, 0, 0, 0]) for at in index_T] for index_T in index_BT)
        return np.ones((len(index_BT), 1), np.float32), np.empty((len(index_BT), 0), np.float32)

    info = VideoInfo(len(gaps), 1, 1, 0, 25.0, duration_s, "mp4", "h264", 0, "pyav", fps)
    parts = [numbers[at : at + block] for at in range(0, len(numbers), block)]
    blocks = [FrameBlock(part, edges_s[part], edges_s[part + 1], frames_NHWC[part]) for part in parts]
    messages = [(0, message) for message in (info, *blocks, VideoEnd(len(gaps), duration_s))]
    shard = ShardPlan(1, "0" * 8, 0, (VideoRef("v", "v", "file:///v", "", 1),))
    rows = extract_shard(
        shard, messages, encode, sampling=sampling, batch_size=2, feature_dim=1, n_scores=0, embedding_dtype="float32"
    )
    screen, spans = on_screen(fps, edges_s[:-1], duration_s), clip_spans(sampling, n_ticks)
    numbers_T = [frame_numbers(sampling, span, n_ticks).tolist() for span in spans]
    assert seen == [[screen[k] for k in ticks] for ticks in numbers_T]
    assert [clip.span for clip in rows.clips] == spans
    for clip, ticks in zip(rows.clips, numbers_T, strict=True):
        assert clip.start_s == ticks[0] / fps
        assert clip.end_s == pytest.approx(min((ticks[-1] + 1) / fps, duration_s), abs=1e-9)
        assert clip.end_s <= duration_s + 1e-9 / fps


@pytest.mark.parametrize("fps", [0, -1, 241, float("nan")])
def test_an_invalid_rate_is_refused(fps: float) -> None:
    """0, negative rates, rates above 240 and NaN are an error when the sampling is made."""
    with pytest.raises(ValueError, match="fps must be more than 0"):
        parse_sampling("every:16", clip_frames=16, fps=fps)
    assert parse_sampling("every:16", clip_frames=16, fps=240).fps == 240


def test_one_frame_is_on_screen_for_as_long_as_any() -> None:
    """A video of a single frame has ticks for its whole duration; one without frames has no tick."""
    sampling = parse_sampling("every:16", clip_frames=16, fps=25)
    assert laid_over(sampling, 1, 1.0) == 25
    assert laid_over(sampling, 0, 1.0) == 0


# --- real videos ----------------------------------------------------------------------------------------------------

SPEC = FrameSpec(crop_hw=(160, 160), resize_hw=(160, 160))
SHOWN = {
    "cfr30.mp4": [round(i * 100 / 30) for i in range(60)],
    "cfr50.mkv": [2 * i for i in range(80)],
    "vfr.mp4": [7 * i + (3, 0, 5)[i % 3] - 3 * (i == 0) for i in range(50)],
    "still.mp4": [*range(0, 40, 4), *range(6000, 6040, 4)],  # one frame stays for a minute
}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Numbered videos whose frames are shown at the times of SHOWN, in 1/100 s."""
    root = tmp_path_factory.mktemp("rates")
    options = {"preset": "ultrafast", "bf": "0"}
    return {
        name: make.video(root / name, "libx264", len(pts), pts=pts, ticks_per_s=100, options=options, gop=10)
        for name, pts in SHOWN.items()
    }


def rows_of(
    path: Path, sampling: Sampling, decoder: str
) -> tuple[list[list[int]], list[tuple[float, float]], VideoEnd]:
    """(the numbers written in the T frames of each clip, its seconds, the end) of a real decode and extraction."""
    seen: list[list[int]] = []
    ends: list[VideoEnd] = []

    def encode(frames_NHWC: np.ndarray, index_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert len(frames_NHWC) == len(np.unique(index_BT))  # each frame is sent once
        numbers = make.numbers_in(frames_NHWC)
        seen.extend([numbers[at] for at in index_T] for index_T in index_BT)
        return np.ones((len(index_BT), 1), np.float32), np.empty((len(index_BT), 0), np.float32)

    def messages() -> Iterator[tuple[int, DecodeMessage]]:
        for message in open_frames(str(path), SPEC, sampling, policy=DecodePolicy(decoder=decoder)):  # type: ignore[arg-type]
            if isinstance(message, VideoEnd):
                ends.append(message)
            yield 0, message

    shard = ShardPlan(1, "0" * 8, 0, (VideoRef("v", path.name, path.as_uri(), "", 1),))
    rows = extract_shard(
        shard, messages(), encode, sampling=sampling, batch_size=1, feature_dim=1, n_scores=0, embedding_dtype="float32"
    )
    return seen, [(clip.start_s, clip.end_s) for clip in rows.clips], ends[-1]


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("fps", [25.0, 12.5, 60.0])
@pytest.mark.parametrize("rule", ["every:8", "uniform:5", "spread:5", "every:20"])
@pytest.mark.parametrize("name", SHOWN)
def test_clips_of_a_real_video_are_those_on_screen(
    name: str, rule: str, fps: float, decoder: str, videos: dict[str, Path]
) -> None:
    """Both decoders; constant, variable and very long frames: each clip has what a viewer sees at its ticks."""
    sampling = parse_sampling(rule, clip_frames=8, fps=fps)
    seen, times, end = rows_of(videos[name], sampling, decoder)
    start_s_N = np.array(SHOWN[name]) / 100
    screen = on_screen(fps, start_s_N, end.duration_s)
    assert end.n_frames == len(SHOWN[name]) and end.resampled_frames == len(screen)
    spans = clip_spans(sampling, len(screen))
    assert seen == [[screen[k] for k in frame_numbers(sampling, span, len(screen))] for span in spans]
    assert times == [(s.start_frame / fps, min(s.end_frame / fps, end.duration_s)) for s in spans]


def test_frames_between_two_ticks_are_not_sent(videos: dict[str, Path]) -> None:
    """At a lower rate only the frames shown at a tick are sent; a frame shown for a minute is sent once."""
    for name, fps, n_sent in (("cfr50.mkv", 12.5, 20), ("still.mp4", 25.0, 20)):
        sampling = parse_sampling("every:8", clip_frames=8, fps=fps)
        for decoder in ("decord", "pyav"):
            policy = DecodePolicy(decoder=decoder)  # type: ignore[arg-type]
            messages = open_frames(str(videos[name]), SPEC, sampling, policy=policy)
            assert sum(len(m.numbers_N) for m in messages if isinstance(m, FrameBlock)) == n_sent
