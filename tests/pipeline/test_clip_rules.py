"""Clip arithmetic: which frames make which clip."""

from __future__ import annotations

import hashlib
from fractions import Fraction
from itertools import pairwise
from math import floor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p3d.pipeline.clips.pool import pool, pool_columns
from p3d.pipeline.clips.rules import Sampling, clip_spans, frame_numbers, needed_frames, parse_sampling, settled_spans
from p3d.pipeline.types import ClipSpan

samplings = st.builds(
    lambda rule, *numbers: Sampling(rule, *numbers, seed=5 if rule == "random" else None, video_id="a"),
    st.sampled_from(["every", "uniform", "spread", "random"]),
    st.integers(1, 40),
    st.integers(1, 20),
    st.integers(1, 4),
)
frame_counts = st.integers(1, 300)


@given(samplings, frame_counts)
def test_every_clip_lies_inside_the_video_and_is_numbered_in_order(sampling: Sampling, n_frames: int) -> None:
    """A video with a frame has a clip, clips are numbered from 0, and [start, end) is always inside the video."""
    spans = clip_spans(sampling, n_frames)
    assert [span.index for span in spans] == list(range(len(spans))) and spans
    assert all(0 <= span.start_frame < span.end_frame <= n_frames for span in spans)


@given(samplings, frame_counts)
def test_starts_never_go_back(sampling: Sampling, n_frames: int) -> None:
    """Starts strictly increase under every other rule; `uniform` ones never decrease (a short video repeats them)."""
    steps = np.diff([span.start_frame for span in clip_spans(sampling, n_frames)])
    assert (steps >= 0).all() if sampling.rule == "uniform" else (steps > 0).all()


@given(st.integers(1, 20), st.data(), frame_counts)
def test_no_frame_is_left_out_when_the_stride_is_at_most_the_span(t: int, data: st.DataObject, n_frames: int) -> None:
    """`every:S` with S <= span and frame_step 1 uses every frame of the video."""
    sampling = Sampling("every", data.draw(st.integers(1, t)), clip_frames=t)
    assert sampling.needs_every_frame
    np.testing.assert_array_equal(needed_frames(sampling, n_frames), np.arange(n_frames))


@given(samplings, frame_counts)
def test_the_last_clip_of_every_ends_at_the_last_frame(sampling: Sampling, n_frames: int) -> None:
    """The end of a video is never dropped by the `every` rule."""
    if sampling.rule == "every":
        assert clip_spans(sampling, n_frames)[-1].end_frame == n_frames


def test_a_clip_is_settled_with_its_last_frame() -> None:
    """Not one frame later: otherwise a batch would wait for a frame that may never arrive."""
    sampling = Sampling("every", 4, clip_frames=8)
    assert [settled_spans(sampling, n_seen) for n_seen in (7, 8, 11, 12)] == [0, 1, 1, 2]


@given(samplings, frame_counts, st.integers(0, 200))
def test_settled_clips_stay_whatever_follows(sampling: Sampling, n_seen: int, n_more: int) -> None:
    """The first `settled_spans` clips of the frames seen so far are those of every longer video."""
    settled = settled_spans(sampling, n_seen)
    now, later = clip_spans(sampling, n_seen), clip_spans(sampling, n_seen + n_more)
    assert settled <= len(now) and now[:settled] == later[:settled]
    assert all(span.end_frame <= n_seen for span in now[:settled])


@given(samplings, frame_counts)
def test_needed_frames_are_those_of_the_clips(sampling: Sampling, n_frames: int) -> None:
    """The frames to decode are exactly the union of the clips' frames, sorted, each once."""
    wanted = {int(f) for span in clip_spans(sampling, n_frames) for f in frame_numbers(sampling, span, n_frames)}
    assert needed_frames(sampling, n_frames).tolist() == sorted(wanted)


@given(samplings, frame_counts)
def test_padding_counts_the_repeats_of_the_last_frame(sampling: Sampling, n_frames: int) -> None:
    """A clip has T frames; `n_padded` of them are past the end. Only a video shorter than one span has any."""
    for span in clip_spans(sampling, n_frames):
        numbers_T = frame_numbers(sampling, span, n_frames)
        unbounded_T = span.start_frame + np.arange(sampling.clip_frames) * sampling.frame_step
        assert len(numbers_T) == sampling.clip_frames
        assert span.n_padded == int((unbounded_T >= n_frames).sum())
        assert (numbers_T[sampling.clip_frames - span.n_padded :] == n_frames - 1).all()
        assert n_frames < sampling.span or span.n_padded == 0


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), frame_counts)
def test_uniform_is_the_rule_of_the_authors(count: int, t: int, step: int, n_frames: int) -> None:
    """Clip i of `uniform:N` starts at floor(i * (n - span) / N), and at 0 if the video is shorter than a span."""
    sampling = Sampling("uniform", count, clip_frames=t, frame_step=step)
    starts = [span.start_frame for span in clip_spans(sampling, n_frames)]
    assert starts == [max(0, int(np.floor(i * (n_frames - sampling.span) / count + 1e-9))) for i in range(count)]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), frame_counts)
def test_spread_centres_clips_on_equal_parts(count: int, t: int, step: int, n_frames: int) -> None:
    """Clip i of `spread:N` starts half a span before the middle of part i, rounded down and moved into the video; equal
    starts count once."""
    sampling = Sampling("spread", count, clip_frames=t, frame_step=step)
    middles = [Fraction(n_frames, count) * (i + Fraction(1, 2)) for i in range(count)]
    starts = {
        min(max(floor(middle - Fraction(sampling.span, 2)), 0), max(n_frames - sampling.span, 0)) for middle in middles
    }
    assert [span.start_frame for span in clip_spans(sampling, n_frames)] == sorted(starts)


@pytest.mark.parametrize(
    ("n_frames", "starts"),
    [(18, [1, 7, 13]), (6, [0, 1, 2]), (5, [0, 1]), (4, [0]), (1, [0]), (3000, [498, 1498, 2498])],
)
def test_spread_of_known_videos(n_frames: int, starts: list[int]) -> None:
    """`spread:3` of clips of 4 frames: the examples of the docstring, short videos, and the ends of a long one."""
    assert [one.start_frame for one in clip_spans(parse_sampling("spread:3", clip_frames=4), n_frames)] == starts


def test_more_parts_than_frames_take_every_start() -> None:
    """A number of clips far beyond the frames is answered at once."""
    sampling = parse_sampling("spread:999999999", clip_frames=4)
    assert [one.start_frame for one in clip_spans(sampling, 10)] == list(range(7))


def test_the_example_of_the_docstring() -> None:
    """span 16, S 16, 40 frames: [0, 16) [16, 32) [24, 40)."""
    spans = clip_spans(parse_sampling("every:16", clip_frames=16), 40)
    assert [(span.start_frame, span.end_frame) for span in spans] == [(0, 16), (16, 32), (24, 40)]


def test_no_frames_make_no_clips() -> None:
    """A video without frames has no clips and needs no frames."""
    sampling = parse_sampling("uniform:20", clip_frames=16)
    assert clip_spans(sampling, 0) == [] and len(needed_frames(sampling, 0)) == 0


# --- random:N@SEED ----------------------------------------------------------------------------------------------------


def random_starts(count: int, seed: int, video_id: str, n_frames: int, *, t: int = 16, step: int = 1) -> list[int]:
    sampling = parse_sampling(f"random:{count}@{seed}", clip_frames=t, frame_step=step).for_video(video_id)
    return [span.start_frame for span in clip_spans(sampling, n_frames)]


@given(st.integers(1, 60), st.integers(0, 10**18 - 1), st.text(max_size=9), frame_counts, st.integers(1, 4))
def test_random_starts_are_different_and_inside(count: int, seed: int, video_id: str, n: int, step: int) -> None:
    """`random:N@SEED` gives N different starts in [0, n - span], or all that exist; a repeated draw is equal."""
    starts = random_starts(count, seed, video_id, n, step=step)
    n_starts = max(1, n - 15 * step)
    assert len(set(starts)) == len(starts) == min(count, n_starts)
    assert starts == sorted(starts) and starts[0] >= 0 and starts[-1] < n_starts
    assert random_starts(count, seed, video_id, n, step=step) == starts


def test_random_starts_are_those_of_every_version() -> None:
    """SHAKE-256 and Floyd's sampling, reimplemented from the docstring: the numbers must never change."""
    assert random_starts(4, 7, "a/b.mp4", 300) == [18, 99, 107, 108]
    words = np.frombuffer(hashlib.shake_256(b"7\na/b.mp4").digest(8 * 4), ">u8").tolist()
    assert sorted(word * last // 2**64 for word, last in zip(words, range(282, 286), strict=True)) == [18, 99, 107, 108]


def test_random_starts_differ_between_videos_and_seeds() -> None:
    """The draw depends on both the seed and the id, and the two cannot be confused when they are joined."""
    drawn = [random_starts(5, *key, 10_000) for key in ((1, "a"), (2, "a"), (1, "b"), (1, "2\na"), (12, "a"), (1, ""))]
    assert len({tuple(starts) for starts in drawn}) == len(drawn)


def test_every_random_start_is_as_likely_as_any_other() -> None:
    """Over 4000 seeds, each of the 25 starts is drawn about equally often (chi-squared, 24 degrees of freedom: 99.99 %
    are below 60), and so is each pair of neighbours: the starts of one draw are not consecutive."""
    draws = [random_starts(5, seed, "v", 40) for seed in range(4000)]
    counts_S = np.bincount(np.concatenate(draws), minlength=25)
    assert len(counts_S) == 25
    assert ((counts_S - 800) ** 2 / 800).sum() < 60
    pairs = sum(after - before == 1 for starts in draws for before, after in pairwise(starts))
    assert abs(pairs - 4000 * 24 * (5 * 4) / (25 * 24)) < 5 * np.sqrt(3200)


def test_parsed_random_clips_need_a_video() -> None:
    """A draw without the id of the video would be the same for all videos."""
    with pytest.raises(ValueError, match="for_video"):
        clip_spans(parse_sampling("random:3@0", clip_frames=16), 100)


def test_a_video_of_one_start_has_one_random_clip() -> None:
    """A video of at most one span has one clip, padded if needed, however many clips were requested."""
    sampling = parse_sampling("random:20@0", clip_frames=16).for_video("v")
    for n_frames in (1, 15, 16):
        assert clip_spans(sampling, n_frames) == [ClipSpan(0, 0, n_frames, 16 - n_frames)]


MALFORMED = [
    *("every", "every:0", "uniform:-1", "each:3", "every:1.5", " every:16", "every:16\n", "every:16@3", "uniform:2@0"),
    *("spread:0", "spread", "spread:2@0", "spread:1.5"),
    *("random:20", "random:0@1", "random:@1", "random:20@", "random:20@-1", "random:20@x", f"random:2@{10**18}"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_rule_is_refused(text: str) -> None:
    """Anything but a known rule with a positive number is a ValueError that shows them."""
    with pytest.raises(ValueError, match=r"clips must be every:STRIDE .*random:COUNT@SEED, such as every:16"):
        parse_sampling(text, clip_frames=16)


@pytest.mark.parametrize("text", ["every:16", "uniform:20", "spread:20", "random:20@0"])
def test_a_rule_is_what_was_typed(text: str) -> None:
    """The rule, its number, its seed and the clip length are those of the command line."""
    rule, _, number = text.partition(":")
    seed = 0 if rule == "random" else None
    expected = Sampling(rule, int(number.partition("@")[0]), 16, 2, seed=seed)  # type: ignore[arg-type] # one of three
    assert parse_sampling(text, clip_frames=16, frame_step=2) == expected
    assert expected.needs_every_frame is False and expected.needs_the_count == (rule != "every")


@pytest.mark.parametrize("values", [("each", 1, 16, 1), ("every", 0, 16, 1), ("every", 1, 0, 1), ("every", 1, 16, 0)])
def test_an_invalid_rule_is_refused_however_it_is_made(values: tuple) -> None:
    """A Sampling holds a known rule and positive numbers."""
    with pytest.raises(ValueError, match=r"each|at least 1"):
        Sampling(*values)


@pytest.mark.parametrize("values", [("random", 1, 16, 1), ("every", 1, 16, 1, None, 0), ("uniform", 1, 16, 1, None, 3)])
def test_a_seed_belongs_to_random_clips_alone(values: tuple) -> None:
    """Random clips without a seed, or another rule with a seed, are refused."""
    with pytest.raises(ValueError, match="only random clips need a seed"):
        Sampling(*values)


def test_random_clips_of_no_video_are_refused() -> None:
    """Their starts depend on the video's id, so it must be given first."""
    with pytest.raises(ValueError, match=r"^random clips depend on the video: use `sampling"):
        clip_spans(Sampling("random", 2, 16, 1, None, 0), 100)


def test_every_pooling_has_its_own_column() -> None:
    """A second vector is named after its pooling, and an unknown one is an error, not another one's value."""
    assert pool_columns("mean+max") == ["embedding", "embedding_max"] and pool_columns("max") == ["embedding"]
    for how in ("median", "mean+median", "max+mean", "mean+mean", ""):
        with pytest.raises(ValueError, match="unknown pooling"):
            pool(np.ones((2, 3), np.float32), how)
