"""Clip arithmetic: which frames make which clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.clips import Sampling, clip_spans, frame_numbers, needed_frames, parse_sampling, settled_spans

samplings = st.builds(
    Sampling,
    rule=st.sampled_from(["every", "uniform"]),
    value=st.integers(1, 40),
    clip_frames=st.integers(1, 20),
    frame_step=st.integers(1, 4),
)
frame_counts = st.integers(1, 300)


@given(samplings, frame_counts)
def test_every_clip_lies_inside_the_video_and_is_numbered_in_order(sampling: Sampling, n_frames: int) -> None:
    """A video with a frame has a clip, clips are numbered from 0, and [start, end) never leaves the video."""
    spans = clip_spans(sampling, n_frames)
    assert [span.index for span in spans] == list(range(len(spans))) and spans
    assert all(0 <= span.start_frame < span.end_frame <= n_frames for span in spans)


@given(samplings, frame_counts)
def test_starts_never_go_back(sampling: Sampling, n_frames: int) -> None:
    """`every` starts strictly increase; `uniform` starts never decrease (a short video repeats them)."""
    steps = np.diff([span.start_frame for span in clip_spans(sampling, n_frames)])
    assert (steps > 0).all() if sampling.rule == "every" else (steps >= 0).all()


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
    """Not a frame later: a batch would wait for a frame that may never come."""
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
    """A clip has T frames; `n_padded` of them stand past the end, and only a video below one span has any."""
    for span in clip_spans(sampling, n_frames):
        numbers_T = frame_numbers(sampling, span, n_frames)
        unbounded_T = span.start_frame + np.arange(sampling.clip_frames) * sampling.frame_step
        assert len(numbers_T) == sampling.clip_frames
        assert span.n_padded == int((unbounded_T >= n_frames).sum())
        assert (numbers_T[sampling.clip_frames - span.n_padded :] == n_frames - 1).all()
        assert n_frames < sampling.span or span.n_padded == 0


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 4), frame_counts)
def test_uniform_is_the_rule_of_the_authors(count: int, t: int, step: int, n_frames: int) -> None:
    """Clip i of `uniform:N` starts at floor(i * (n - span) / N), and at 0 where the video is shorter than a span."""
    sampling = Sampling("uniform", count, clip_frames=t, frame_step=step)
    starts = [span.start_frame for span in clip_spans(sampling, n_frames)]
    assert starts == [max(0, int(np.floor(i * (n_frames - sampling.span) / count + 1e-9))) for i in range(count)]


def test_the_example_of_the_docstring() -> None:
    """span 16, S 16, 40 frames: [0, 16) [16, 32) [24, 40)."""
    spans = clip_spans(parse_sampling("every:16", clip_frames=16), 40)
    assert [(span.start_frame, span.end_frame) for span in spans] == [(0, 16), (16, 32), (24, 40)]


def test_no_frames_make_no_clips() -> None:
    """A video of no frames has no clips and needs no frames."""
    sampling = parse_sampling("uniform:20", clip_frames=16)
    assert clip_spans(sampling, 0) == [] and len(needed_frames(sampling, 0)) == 0


@pytest.mark.parametrize("text", ["every", "every:0", "uniform:-1", "each:3", "every:1.5", " every:16", "every:16\n"])
def test_a_malformed_rule_is_refused(text: str) -> None:
    """What is not `every:S` or `uniform:N` with a positive number is a ValueError."""
    with pytest.raises(ValueError, match="clips are every"):
        parse_sampling(text, clip_frames=16)


@pytest.mark.parametrize("values", [("each", 1, 16, 1), ("every", 0, 16, 1), ("every", 1, 0, 1), ("every", 1, 16, 0)])
def test_a_rule_that_cannot_be_is_refused_however_it_is_made(values: tuple) -> None:
    """A Sampling holds one of two rules and positive numbers."""
    with pytest.raises(ValueError, match=r"each|at least 1"):
        Sampling(*values)
