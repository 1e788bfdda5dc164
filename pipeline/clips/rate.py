"""Resampling to a fixed rate: which frame is on screen at time k / fps? Pure arithmetic; no pixel is copied.

A frame is on screen from its own time until the next frame's, the last one until its end. **Tick** k of the resampled
video is the frame on screen at k / fps, so a frame has the ticks [first, end), a run that may be empty or long:

    seconds            0           0.5 0.6             1.2
    frame              |0          |1  |2              |      frame 0   ticks [0, 1)
    ticks, 2 per s     0           1           2              frame 1   ticks [1, 2)
                                                              frame 2   ticks [2, 3)

Ticks go on as long as a frame is on screen, and there is at least one. A frame counts as on screen from STAMP_S before
its time: Matroska rounds times to milliseconds, so the difference of two of them is wrong by up to one, and a video
that already has the wanted rate must come out as it is.
"""

from __future__ import annotations

import math

import numpy as np

from p3d.pipeline.types import FLOAT64, INT64

STAMP_S = 0.001  # how wrong a time from the first frame may be
MAX_FPS = 240.0  # ticks are 4 ms apart at least, four times STAMP_S
_NOISE = 1e-9  # of a tick: what float64 leaves of an exact multiple


def first_tick(fps: float, time_s: float) -> int:
    """The first tick that a frame shown from `time_s` on may have; seconds from the first frame of the video."""
    return max(0, math.ceil((time_s - STAMP_S) * fps - _NOISE))


def first_ticks(fps: float, times_s_N: FLOAT64) -> INT64:
    """The same of many times, [N] int64."""
    return np.maximum(np.ceil((times_s_N - STAMP_S) * fps - _NOISE), 0).astype(np.int64)


def n_ticks(fps: float, duration_s: float) -> int:
    """Ticks of a whole video, of which a frame was decoded: at least one."""
    return max(1, first_tick(fps, duration_s))


def whole_ticks(fps: float, end_s: float) -> int:
    """How many ticks have their time [k / fps, (k + 1) / fps) before `end_s`, whatever follows."""
    return min(first_tick(fps, end_s), math.floor(end_s * fps + _NOISE))
