"""Which frames of a video do its clips need? Asked by both routes, frame by frame or of all frames at once.

Without `fps` a frame has one place, its own number. With `fps` it has the ticks for which it is on screen: none, if
another takes its place before the next tick (then it need not be sent), or many (then it is sent once).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from p3d.pipeline.clips import rate
from p3d.pipeline.clips.rules import Sampling, needed_frames, ticks_of
from p3d.pipeline.types import FLOAT64, INT64


@dataclass(frozen=True, slots=True)
class Wanted:
    """Frames that stand at one of `ticks_M`, sorted; at any place for None. With `numbers_M`, just these, sorted."""

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
        """The numbers of those of N frames, sorted; the same as asking for each."""
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


NONE = Wanted(None, None)  # for a pass that only counts


def wanted_by(sampling: Sampling, n_ticks: int) -> Wanted:
    """What the clips of a video need that is laid out over `n_ticks` frames or ticks."""
    return Wanted(sampling, None if sampling.needs_every_frame else needed_frames(sampling, n_ticks))
