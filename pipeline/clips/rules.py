"""Pure index arithmetic: which frames make which clip.

A clip of T frames taken every `frame_step` frames spans `(T - 1) * frame_step + 1` frames of the video:

    frame_step 2, T 4, span 7      0 . 1 . 2 . 3
    video                          0 1 2 3 4 5 6 7 8 9

`every:S` starts clips at 0, S, 2S ... while they fit, plus one last clip that ends at the last frame. With `frame_step`
1 and S at most the span, no frame is left out:

    span 16, S 16, 40 frames       [0, 16) [16, 32) [24, 40)

`uniform:N` starts clip i at floor(i * (n - span) / N), the rule of the P3D authors' sampler (their issue 7; N = 20 in
the paper). It leaves out the end of a long video. A video shorter than a span is padded with its last frame, and the
rows count the padded frames.

`spread:N` cuts the video into N equal parts and centres a clip on the middle of each: clip i starts at
floor((2 i + 1) n / (2 N) - span / 2), moved into [0, n - span]. Equal starts, as in a short video, are taken once:

    span 4, N 3, 18 frames         [1, 5) [7, 11) [13, 17)
    span 4, N 3, 6 frames          [0, 4) [1, 5) [2, 6)

`random:N@SEED` draws N different starts, with equal probability for each set of N, and sorts them (the paper tests on
Sports-1M with 20 random clips per video). A video with fewer possible starts uses each of them once, so no row is
duplicated; one shorter than a span has one padded clip. The draw depends only on SEED, the video's id and its frame
count: Floyd's sampling over the 64-bit words of SHAKE-256 (FIPS 202) of "SEED\nvideo_id". numpy's generators are not
used, because they may return other numbers in another version.

With a rate (`fps`), all of this applies to the ticks of the resampled video (`clips.rate`) instead of its frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from p3d.pipeline.clips import rate
from p3d.pipeline.clips.draw import numbers_drawn
from p3d.pipeline.types import INT64, ClipSpan

Rule = Literal["every", "uniform", "spread", "random"]
_FORMS = "every:STRIDE (in frames), uniform:COUNT, spread:COUNT or random:COUNT@SEED"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling rule of a job. `value` is S of `every:S` (a stride in frames) or the count N of the other rules.

    With `fps`, frames mean the ticks of the video resampled to that rate. `seed` is that of `random:N@SEED`, which also
    needs the id of the video: see `for_video`.
    """

    rule: Rule
    value: int
    clip_frames: int
    frame_step: int = 1
    fps: float | None = None
    seed: int | None = None
    video_id: str | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"unknown clip rule {self.rule!r}: {_FORMS}")
        if (self.seed is not None) != (self.rule == "random"):
            raise ValueError(f"clip rule {self.rule!r} with {self.seed = }: only random clips need a seed")
        if min(self.value, self.clip_frames, self.frame_step) < 1:
            raise ValueError(f"{self.value = }, {self.clip_frames = } and {self.frame_step = } must be at least 1")
        if self.fps is not None and not 0 < self.fps <= rate.MAX_FPS:
            raise ValueError(f"fps must be more than 0 and at most {rate.MAX_FPS:g}, not {self.fps}")

    @property
    def span(self) -> int:
        """Frames of video that one clip covers."""
        return (self.clip_frames - 1) * self.frame_step + 1

    def for_video(self, video_id: str) -> Sampling:
        """The rule for one video. Only random clips differ between videos."""
        return replace(self, video_id=video_id)

    @property
    def needs_the_count(self) -> bool:
        """True if the clips depend on the video's frame count, so that none is certain before the count is known."""
        return self.rule != "every"

    @property
    def needs_every_frame(self) -> bool:
        """True if the clips leave no frame out, so that a decoder need not know the frame count beforehand."""
        return self.rule == "every" and self.frame_step == 1 and self.value <= self.span


def parse_sampling(text: str, *, clip_frames: int, frame_step: int = 1, fps: float | None = None) -> Sampling:
    """Parse `every:16`, `uniform:20`, `spread:20` or `random:20@0`. ValueError names the allowed forms."""
    match = re.fullmatch(r"(every|uniform|spread|random):([0-9]{1,9})(?:@([0-9]{1,18}))?", text)
    if match is None or int(match[2]) < 1 or (match[3] is None) == (match[1] == "random"):
        raise ValueError(f"clips must be {_FORMS}, such as every:16, not {text!r}")
    rule: Rule = match[1]  # type: ignore[assignment] # one of them, by the pattern
    seed = None if match[3] is None else int(match[3])
    return Sampling(rule, int(match[2]), clip_frames, frame_step, fps, seed)


def laid_over(sampling: Sampling, n_frames: int, duration_s: float) -> int:
    """The number of frames from which the clips of a video are taken: its own, or with `fps` the ticks it has."""
    return n_frames if sampling.fps is None or n_frames < 1 else rate.n_ticks(sampling.fps, duration_s)


def ticks_of(sampling: Sampling, number: int, start_s: float, end_s: float) -> tuple[int, int]:
    """The ticks [first, end) of frame `number`, which is shown in [start_s, end_s). Without `fps`, a frame is one tick.

    If two frames claim one tick, the later one gets it: the first frame is given tick 0 before it is known whether
    another follows within a millisecond.
    """
    if sampling.fps is None:
        return number, number + 1
    return rate.first_tick(sampling.fps, start_s), max(rate.first_tick(sampling.fps, end_s), 1 - min(number, 1))


def whole_ticks(sampling: Sampling, number: int, end_s: float) -> int:
    """The number of ticks that no later frame can change after frame `number`, which ends at `end_s`."""
    return number + 1 if sampling.fps is None else rate.whole_ticks(sampling.fps, end_s)


def clip_spans(sampling: Sampling, n_frames: int) -> list[ClipSpan]:
    """All clips of a video of `n_frames` presentable frames, by start; empty only for a video without frames.

    ValueError for random clips without a video: see `Sampling.for_video`.
    """
    if n_frames < 1:
        return []
    last_start = n_frames - sampling.span  # negative if the video is shorter than a span
    if sampling.rule == "uniform":
        starts = [i * max(last_start, 0) // sampling.value for i in range(sampling.value)]
    elif sampling.rule == "spread":
        starts = _spread_starts(sampling, n_frames)
    elif sampling.rule == "random":
        starts = _random_starts(sampling, max(last_start, 0) + 1)
    else:
        starts = list(range(0, max(last_start, 0) + 1, sampling.value))
        if last_start > starts[-1]:
            starts.append(last_start)
    return [_span(sampling, i, start, n_frames) for i, start in enumerate(starts)]


def _spread_starts(sampling: Sampling, n_frames: int) -> list[int]:
    """The different starts of clips that are centred on the middles of N equal parts, in order, in whole numbers."""
    count, span = min(sampling.value, n_frames), sampling.span  # more parts than frames give no other starts
    last_start = max(n_frames - span, 0)
    starts = (((2 * i + 1) * n_frames - count * span) // (2 * count) for i in range(count))
    return list(dict.fromkeys(min(max(start, 0), last_start) for start in starts))


def _random_starts(sampling: Sampling, n_starts: int) -> list[int]:
    """At most `sampling.value` different numbers of [0, n_starts), sorted. All sets of them are equally likely."""
    if sampling.video_id is None:
        raise ValueError("random clips depend on the video: use `sampling.for_video(video_id)`")
    return numbers_drawn(f"{sampling.seed}\n{sampling.video_id}", sampling.value, n_starts)


def settled_spans(sampling: Sampling, n_seen: int) -> int:
    """How many of the first clips can no longer change after `n_seen` frames, however long the video is.

    These are the clips of the regular `every:S` grid that end within the frames seen; 0 for rules that need the count.
    """
    if sampling.needs_the_count or n_seen < sampling.span:
        return 0
    return (n_seen - sampling.span) // sampling.value + 1


def grid_span(sampling: Sampling, index: int) -> ClipSpan:
    """Clip `index` of the regular `every:S` grid, without padding. Equal to that of `clip_spans` once it is settled."""
    start = index * sampling.value
    return ClipSpan(index, start, start + sampling.span, 0)


def frame_numbers(sampling: Sampling, span: ClipSpan, n_frames: int) -> INT64:
    """The T frame numbers of one clip, [T] int64. Past the end of the video, the last frame is repeated."""
    numbers_T = span.start_frame + np.arange(sampling.clip_frames, dtype=np.int64) * sampling.frame_step
    return np.minimum(numbers_T, n_frames - 1)


def needed_frames(sampling: Sampling, n_frames: int) -> INT64:
    """The numbers of the frames that the clips of the video need, sorted and unique, [M] int64."""
    spans = clip_spans(sampling, n_frames)
    if not spans:
        return np.empty(0, np.int64)
    return np.unique(np.concatenate([frame_numbers(sampling, span, n_frames) for span in spans]))


def looked_at(sampling: Sampling, spans: Sequence[ClipSpan], n_frames: int) -> float:
    """The share of the frames of a video that are part of a clip, 0 to 1."""
    if not spans:
        return 0.0
    if sampling.needs_every_frame:
        return 1.0
    starts_B = np.array([span.start_frame for span in spans], np.int64)
    numbers_BT = starts_B[:, None] + np.arange(sampling.clip_frames, dtype=np.int64) * sampling.frame_step
    return len(np.unique(np.minimum(numbers_BT, n_frames - 1))) / n_frames


def _span(sampling: Sampling, index: int, start: int, n_frames: int) -> ClipSpan:
    frames_there = min(sampling.clip_frames, -(-(n_frames - start) // sampling.frame_step))
    return ClipSpan(index, start, min(start + sampling.span, n_frames), sampling.clip_frames - frames_there)
