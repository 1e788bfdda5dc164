"""Pure index arithmetic: which frames make which clip.

A clip of T frames taken every `frame_step` frames spans `(T - 1) * frame_step + 1` frames of the video:

    frame_step 2, T 4, span 7      0 . 1 . 2 . 3
    video                          0 1 2 3 4 5 6 7 8 9

`every:S` starts clips at 0, S, 2S ... as long as they fit, plus one last clip that ends at the last frame, so that no
frame is left out:

    span 16, S 16, 40 frames       [0, 16) [16, 32) [24, 40)

`uniform:N` starts clip i at floor(i * (n - span) / N): the rule of the P3D authors' own sampler (their issue 7; N = 20
in the paper). A video shorter than a span is padded by its last frame, and the rows count how many frames were.

`random:N@SEED` draws N different starts, each set of N of them as likely as any other, and takes them in order (the
paper tests on Sports-1M with 20 random clips a video). A video that has fewer starts gives each of them once, so no row
is there twice; one shorter than a span gives its one padded clip. The draw follows from SEED, the video's id and its
frame count alone, never from who decodes it or when: Floyd's sampling over the 64-bit words of SHAKE-256 (FIPS 202) of
"SEED\nvideo_id". numpy's generators may give other numbers in another version; this cannot.

With a rate (`fps`), all of this is laid over the ticks of the resampled video (`clips.rate`) in place of its frames.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from p3d.pipeline.clips import rate
from p3d.pipeline.types import INT64, ClipSpan

Rule = Literal["every", "uniform", "random"]
_FORMS = "every:STRIDE (in frames), uniform:COUNT or random:COUNT@SEED"


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling rule of a job. `value` is S of `every:S` (a stride in frames) or the count N of the others.

    With `fps`, the frames it counts are the ticks of the video resampled to that rate.

    `seed` is that of `random:N@SEED`, which also needs to know the video: see `for_video`.
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
            raise ValueError(f"clip rule {self.rule!r} with {self.seed = }: random clips need one, others have none")
        if min(self.value, self.clip_frames, self.frame_step) < 1:
            raise ValueError(f"{self.value = }, {self.clip_frames = } and {self.frame_step = } must be at least 1")
        if self.fps is not None and not 0 < self.fps <= rate.MAX_FPS:
            raise ValueError(f"fps is more than 0 and at most {rate.MAX_FPS:g}, not {self.fps}")

    @property
    def span(self) -> int:
        """Frames of video that one clip covers."""
        return (self.clip_frames - 1) * self.frame_step + 1

    def for_video(self, video_id: str) -> Sampling:
        """The rule as it holds for one video; only random clips differ from one to the next."""
        return replace(self, video_id=video_id)

    @property
    def needs_the_count(self) -> bool:
        """True where the clips follow from the video's frame count, so that none is sure before it is known."""
        return self.rule != "every"

    @property
    def needs_every_frame(self) -> bool:
        """True where the clips leave no frame out, so that a decoder need not know the frame count beforehand."""
        return self.rule == "every" and self.frame_step == 1 and self.value <= self.span


def parse_sampling(text: str, *, clip_frames: int, frame_step: int = 1, fps: float | None = None) -> Sampling:
    """`every:16`, `uniform:20` or `random:20@0` -> Sampling. ValueError with what is allowed."""
    match = re.fullmatch(r"(every|uniform|random):([0-9]{1,9})(?:@([0-9]{1,18}))?", text)
    if match is None or int(match[2]) < 1 or (match[3] is None) == (match[1] == "random"):
        raise ValueError(f"clips are {_FORMS}, such as every:16, not {text!r}")
    rule: Rule = match[1]  # type: ignore[assignment] # one of the three, by the pattern
    seed = None if match[3] is None else int(match[3])
    return Sampling(rule, int(match[2]), clip_frames, frame_step, fps, seed)


def laid_over(sampling: Sampling, n_frames: int, duration_s: float) -> int:
    """How many frames the clips of a video are laid over: its own, or the ticks of its duration."""
    return n_frames if sampling.fps is None or n_frames < 1 else rate.n_ticks(sampling.fps, duration_s)


def ticks_of(sampling: Sampling, number: int, start_s: float, end_s: float) -> tuple[int, int]:
    """Where frame `number`, on screen [start_s, end_s), stands among those the clips are laid over: [first, end).

    Of two frames that claim one place the later has it: the first frame is given tick 0 before it is known whether
    another follows within a millisecond.
    """
    if sampling.fps is None:
        return number, number + 1
    return rate.first_tick(sampling.fps, start_s), max(rate.first_tick(sampling.fps, end_s), 1 - min(number, 1))


def whole_ticks(sampling: Sampling, number: int, end_s: float) -> int:
    """How many places no later frame can change once frame `number` has come, which ends at `end_s`."""
    return number + 1 if sampling.fps is None else rate.whole_ticks(sampling.fps, end_s)


def clip_spans(sampling: Sampling, n_frames: int) -> list[ClipSpan]:
    """All clips of a video of `n_frames` presentable frames, by start; empty only for a video of no frames.

    ValueError for random clips of no video in particular.
    """
    if n_frames < 1:
        return []
    room = n_frames - sampling.span
    if sampling.rule == "uniform":
        starts = [i * max(room, 0) // sampling.value for i in range(sampling.value)]
    elif sampling.rule == "random":
        starts = _random_starts(sampling, max(room, 0) + 1)
    else:
        starts = list(range(0, max(room, 0) + 1, sampling.value))
        if room > starts[-1]:
            starts.append(room)
    return [_span(sampling, i, start, n_frames) for i, start in enumerate(starts)]


def _random_starts(sampling: Sampling, n_starts: int) -> list[int]:
    """At most `sampling.value` different numbers of [0, n_starts), sorted; all sets of them are equally likely.

    Floyd's algorithm: the draw from [0, last] that was there already is `last` itself, which never was.
    """
    if sampling.video_id is None:
        raise ValueError("random clips are those of a video: ask `sampling.for_video(video_id)`")
    count = min(sampling.value, n_starts)
    stream = hashlib.shake_256(f"{sampling.seed}\n{sampling.video_id}".encode()).digest(8 * count)
    starts: set[int] = set()
    for at, last in enumerate(range(n_starts - count, n_starts)):
        word = int.from_bytes(stream[8 * at : 8 * at + 8], "big")
        start = word * (last + 1) >> 64  # [0, last]; the bias is below n_starts / 2**64
        starts.add(last if start in starts else start)
    return sorted(starts)


def settled_spans(sampling: Sampling, n_seen: int) -> int:
    """How many of the first clips cannot change any more once `n_seen` frames are there, however long the video is.

    Those of the regular `every:S` grid that end within the frames seen; none of the rules that need the count.
    """
    if sampling.needs_the_count or n_seen < sampling.span:
        return 0
    return (n_seen - sampling.span) // sampling.value + 1


def grid_span(sampling: Sampling, index: int) -> ClipSpan:
    """Clip `index` of the regular `every:S` grid, whole; the same as `clip_spans` gives once it is settled."""
    start = index * sampling.value
    return ClipSpan(index, start, start + sampling.span, 0)


def frame_numbers(sampling: Sampling, span: ClipSpan, n_frames: int) -> INT64:
    """The T frame numbers of one clip, [T] int64; past the end the last frame is repeated."""
    numbers_T = span.start_frame + np.arange(sampling.clip_frames, dtype=np.int64) * sampling.frame_step
    return np.minimum(numbers_T, n_frames - 1)


def needed_frames(sampling: Sampling, n_frames: int) -> INT64:
    """The frames that any clip of the video needs, sorted, each once, [M] int64."""
    spans = clip_spans(sampling, n_frames)
    if not spans:
        return np.empty(0, np.int64)
    return np.unique(np.concatenate([frame_numbers(sampling, span, n_frames) for span in spans]))


def _span(sampling: Sampling, index: int, start: int, n_frames: int) -> ClipSpan:
    frames_there = min(sampling.clip_frames, -(-(n_frames - start) // sampling.frame_step))
    return ClipSpan(index, start, min(start + sampling.span, n_frames), sampling.clip_frames - frames_there)
