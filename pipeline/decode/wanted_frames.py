"""Which frames of a video do its clips need? All routes ask this, frame by frame or for all frames at once.

Without `fps` a frame has one tick, its own number. With `fps` it has the ticks at which it is on screen. There may be
none, if another frame replaces it before the next tick: it need not be sent. If there are several, it is sent once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p3d.pipeline.clips import rate
from p3d.pipeline.clips.rules import Sampling, needed_frames, ticks_of
from p3d.pipeline.errors import Reason, VideoError
from p3d.pipeline.types import FLOAT64, INT64


@dataclass(frozen=True, slots=True)
class Wanted:
    """The frames at one of the sorted `ticks_M`; None means any tick. With `numbers_M`, just those, sorted."""

    sampling: Sampling | None
    ticks_M: INT64 | None
    numbers_M: INT64 | None = None

    def has(self, number: int, start_s: float, end_s: float) -> bool:
        """Is frame `number`, on screen [start_s, end_s) seconds, one of them?"""
        if self.numbers_M is not None:
            at = int(np.searchsorted(self.numbers_M, number))
            return at < len(self.numbers_M) and int(self.numbers_M[at]) == number
        if self.sampling is None:
            return False
        first, end = ticks_of(self.sampling, number, start_s, end_s)
        if self.ticks_M is None:
            return first < end
        at = int(np.searchsorted(self.ticks_M, first))
        return at < len(self.ticks_M) and int(self.ticks_M[at]) < end

    def of(self, start_s_N: FLOAT64, end_s_N: FLOAT64) -> INT64:
        """The sorted numbers of the wanted frames among N frames; equivalent to calling `has` for each."""
        if self.numbers_M is not None:
            return self.numbers_M
        numbers_N = np.arange(len(start_s_N), dtype=np.int64)
        if self.sampling is None:
            return numbers_N[:0]
        first_N, end_N = numbers_N, numbers_N + 1
        if self.sampling.fps is not None:
            first_N, end_N = (rate.first_ticks(self.sampling.fps, times_N) for times_N in (start_s_N, end_s_N))
            end_N[:1] = np.maximum(end_N[:1], 1)
        if self.ticks_M is None:
            return numbers_N[first_N < end_N]
        return numbers_N[np.searchsorted(self.ticks_M, first_N) < np.searchsorted(self.ticks_M, end_N)]


def check_gap(sampling: Sampling | None, longest_s: float) -> None:
    """VideoError if `sampling` would repeat a frame that stays on screen for `longest_s` beyond what a video does.

    Recordings that were joined may lie hours apart. Resampled, the gap would become clips of one still picture.
    """
    if sampling is not None and sampling.fps is not None and longest_s > rate.MAX_SHOWN_S:
        detail = (
            f"one frame stays on screen for {longest_s:.0f} s, as where two recordings are joined; with --fps at most "
            f"{rate.MAX_SHOWN_S:.0f} s: split the file there, or embed it without --fps"
        )
        raise VideoError(Reason.UNSUPPORTED, detail)


NONE = Wanted(None, None)  # for a pass that only counts


def wanted_by(sampling: Sampling, n_ticks: int) -> Wanted:
    """The frames that the clips of a video need, if they are laid out over `n_ticks` frames or ticks."""
    return Wanted(sampling, None if sampling.needs_every_frame else needed_frames(sampling, n_ticks))
