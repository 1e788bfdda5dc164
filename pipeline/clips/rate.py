"""Resampling to a fixed rate: which frame is shown at time k / fps? Pure arithmetic; no pixel is copied.

A frame is shown from its own time until that of the next frame, the last one until its end. **Tick** k of the resampled
video is the frame shown at k / fps, so a frame has the ticks [first, end). A frame may have no tick or many:

    seconds            0           0.5 0.6             1.2
    frame              |0          |1  |2              |      frame 0   ticks [0, 1)
    ticks, 2 per s     0           1           2              frame 1   ticks [1, 2)
                                                              frame 2   ticks [2, 3)

Ticks continue as long as a frame is shown, and there is at least one. A frame counts as shown from STAMP_S before its
time, because Matroska rounds times to milliseconds, so the difference of two times is wrong by up to 1 ms. A video that
already has the requested rate must not change.
"""

from __future__ import annotations

import math

import numpy as np

from p3d.pipeline.types import FLOAT64, INT64

STAMP_S = 0.001  # largest error of a time relative to the first frame
MAX_SHOWN_S = 3600.0  # a frame that stays on screen for longer is a gap between recordings, which is not resampled
MAX_FPS = 240.0  # ticks are 4 ms apart at least, four times STAMP_S
_NOISE = 1e-9  # ticks: rounding error of an exact multiple in float64


def first_tick(fps: float, time_s: float) -> int:
    """The first tick of a frame that is shown from `time_s`, in seconds from the first frame of the video."""
    return max(0, math.ceil((time_s - STAMP_S) * fps - _NOISE))


def first_ticks(fps: float, times_s_N: FLOAT64) -> INT64:
    """`first_tick` of each of N times: [N] float64 -> [N] int64."""
    return np.maximum(np.ceil((times_s_N - STAMP_S) * fps - _NOISE), 0).astype(np.int64)


def n_ticks(fps: float, duration_s: float) -> int:
    """The number of ticks of a video with at least one decoded frame: at least 1."""
    return max(1, first_tick(fps, duration_s))


def whole_ticks(fps: float, end_s: float) -> int:
    """The number of ticks whose time [k / fps, (k + 1) / fps) ends before `end_s`, whatever follows."""
    return min(first_tick(fps, end_s), math.floor(end_s * fps + _NOISE))
