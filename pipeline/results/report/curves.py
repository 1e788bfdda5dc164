"""The curves of a training run as SVG paths of at most POINTS points each, however many steps there are.

Steps are grouped into equal intervals, from the first step to the last. Values that are NaN or infinite are left out of
all means and sums. An interval without any other value is a gap in the line.

Legend: S steps, P intervals that have a step, E evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from markupsafe import Markup

POINTS = 400  # of a path
MARKS = 50  # evaluations, the last of which is one of them
SMOOTHED = 20  # a moving mean is over one of so many parts of the run
HIGHEST_LOSS = 3  # times the loss at the start, or its median if that is higher: greater values are drawn at the top
ROWS = 10  # of the table
TICKS = 5
COLUMNS = ("epoch", "loss", "top1", "lr", "seconds", "waiting_s", "clips")
LEFT, RIGHT, TOP, BOTTOM = 48, 390, 8, 146  # edges of the plotted area in SVG units, also in training.html

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high` at the positions from `start` to `end`, and ticks: (position, text)."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]

    def at(self, values: npt.ArrayLike) -> Floats:
        """The positions of values. A value beyond an end is drawn at that end; NaN stays NaN."""
        share = (np.clip(np.asarray(values, np.float64), self.low, self.high) - self.low) / (self.high - self.low)
        return np.round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True, slots=True)
class Plot:
    """One plot over steps: lines as (CSS class, path), marks as (CSS class, x, y). `said` is its text, in words."""

    said: str
    x: Axis
    y: Axis
    lines: tuple[tuple[str, Markup], ...]
    marks: tuple[tuple[str, float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Interval:
    """Steps `first` to `last`: `epoch` at its end, means, and the sum of `seconds`. A mean of no values is NaN.

    `waiting` is the share of `seconds` that was spent waiting for data, in [0, 1].
    """

    first: int
    last: int
    epoch: float
    loss: float
    top1: float
    lr: float
    seconds: float
    waiting: float
    clips_per_s: float


@dataclass(frozen=True, slots=True)
class Curves:
    """Plots, a table of at most ROWS intervals, and the whole run as one interval, or None without any step.

    The plots show loss, top-1 accuracy, learning rate, and the share of the time spent waiting for data.
    `loss_now` is the last value of the smoothed loss. The loss of `not_finite` steps is NaN or infinite, first that of
    `first_not_finite`; the loss of `above` steps is above its axis.
    """

    loss: Plot
    top1: Plot
    lr: Plot
    waiting: Plot
    table: tuple[Interval, ...]
    whole: Interval | None
    n_steps: int
    loss_now: float
    not_finite: int
    first_not_finite: int | None
    above: int


def training_curves(metrics: pa.Table, tests: pa.Table) -> Curves | None:
    """The curves of the tables of a TrainingReport, both sorted by step. None if both are empty."""
    of = {name: metrics[name].to_numpy().astype(np.float64) for name in COLUMNS}
    step_S, test_E = (table["step"].to_numpy().astype(np.int64) for table in (metrics, tests))
    ends = np.concatenate((step_S[:1], step_S[-1:], test_E[:1], test_E[-1:]))
    if not ends.size:
        return None
    x = _step_axis(int(ends.min()), int(ends.max()))
    starts_P = interval_starts(step_S, POINTS)
    x_P = x.at(means(step_S, starts_P))
    window = len(starts_P) // SMOOTHED | 1

    def line(y: Axis, line_P: Floats, raw: str = "") -> tuple[tuple[str, Markup], ...]:
        faint = (("faint", _raw_path(step_S, of[raw], x, y)),) if raw else ()
        return (*faint, ("line", _path(x_P, y.at(line_P))))

    loss_P = means(of["loss"], starts_P, window)
    loss_y = _loss_axis(of["loss"], loss_P)
    top1_P = means(of["top1"], starts_P, window)
    rates = {name: tests[name].to_numpy().astype(np.float64) for name in ("video_hit1", "clip_hit1")}
    top1_y = _axis(0, _highest(of["top1"], *rates.values()), _percent_tick)
    lr_P = means(of["lr"], starts_P)
    lr_y = _axis(0, _highest(lr_P), number)
    waiting_P = ratios(of["waiting_s"], of["seconds"], starts_P, window)
    waiting_y = _axis(0, 1, _percent_tick)
    shown_E = np.linspace(0, len(test_E) - 1, min(len(test_E), MARKS)).round().astype(np.int64)
    x_E, y_E = x.at(test_E[shown_E]), {name: top1_y.at(rates[name][shown_E]) for name in rates}
    marks = [(name, *at) for name in rates for at in zip(x_E.tolist(), y_E[name].tolist(), strict=True)]
    bad_S = ~np.isfinite(of["loss"])
    return Curves(
        loss=Plot(_said(loss_P, number), x, loss_y, line(loss_y, loss_P, "loss")),
        top1=Plot(
            _said(top1_P, percent),
            x,
            top1_y,
            (*line(top1_y, top1_P, "top1"), ("test", _path(x_E, y_E["video_hit1"]))),
            tuple(mark for mark in marks if math.isfinite(mark[2])),
        ),
        lr=Plot(_said(lr_P, number), x, lr_y, line(lr_y, lr_P)),
        waiting=Plot(_said(waiting_P, percent), x, waiting_y, line(waiting_y, waiting_P)),
        table=_intervals(step_S, of, ROWS),
        whole=next(iter(_intervals(step_S, of, 1)), None),
        n_steps=len(step_S),
        loss_now=float(loss_P[-1]) if loss_P.size else math.nan,
        not_finite=int(bad_S.sum()),
        first_not_finite=int(step_S[bad_S][0]) if bad_S.any() else None,
        above=int((of["loss"][~bad_S] > loss_y.high).sum()),
    )


def interval_starts(step_S: Ints, most: int) -> Ints:
    """The index of the first step of each of at most `most` equal intervals of steps, without empty intervals."""
    if not step_S.size:
        return np.zeros(0, np.int64)
    span = int(step_S[-1] - step_S[0]) + 1
    at_S = (step_S - step_S[0]) * most // span
    return np.flatnonzero(np.diff(at_S, prepend=-1))


def ratios(above_S: Floats, below_S: Floats, starts_P: Ints, window: int = 1) -> Floats:
    """The sum of one column by the sum of another, (P,), over `window` intervals (odd) around each interval.

    Steps where either value is NaN or infinite are left out. NaN where an interval has no other step.
    """
    if not starts_P.size:
        return np.zeros(0)
    finite_S = np.isfinite(above_S) & np.isfinite(below_S)
    counts_P = np.add.reduceat(finite_S.astype(np.int64), starts_P)
    above_P, below_P = (
        np.convolve(np.add.reduceat(np.where(finite_S, one_S, 0), starts_P), np.ones(window), "same")
        for one_S in (above_S, below_S)
    )
    ratios_P = np.full(len(starts_P), np.nan)
    np.divide(above_P, below_P, out=ratios_P, where=(counts_P > 0) & (below_P != 0))
    return ratios_P


def means(values_S: Floats | Ints, starts_P: Ints, window: int = 1) -> Floats:
    """The mean of a column over `window` intervals around each interval, (P,)."""
    return ratios(values_S.astype(np.float64), np.ones(len(values_S)), starts_P, window)


def _intervals(step_S: Ints, of: dict[str, Floats], most: int) -> tuple[Interval, ...]:
    if not step_S.size:
        return ()
    starts_P = interval_starts(step_S, most)
    ends_P = np.append(starts_P[1:], len(step_S)) - 1
    columns = (
        of["epoch"][ends_P],
        *(means(of[name], starts_P) for name in ("loss", "top1", "lr")),
        np.add.reduceat(np.where(np.isfinite(of["seconds"]), of["seconds"], 0), starts_P),
        *(ratios(of[name], of["seconds"], starts_P) for name in ("waiting_s", "clips")),
    )
    return tuple(
        Interval(int(first), int(last), *rest)
        for first, last, *rest in zip(
            step_S[starts_P], step_S[ends_P], *(column.tolist() for column in columns), strict=True
        )
    )


def _path(x_P: Floats, y_P: Floats) -> Markup:
    """A line through points, with a gap where y is NaN. A point between two gaps becomes a short dash."""
    at = np.flatnonzero(~np.isnan(y_P))
    parts = []
    for part in np.split(at, np.flatnonzero(np.diff(at) > 1) + 1) if at.size else ():
        points = [f"{x:g} {y:g}" for x, y in zip(x_P[part].tolist(), y_P[part].tolist(), strict=True)]
        parts.append("M" + "L".join(points) if len(points) > 1 else f"M{x_P[part[0]] - 2:g} {y_P[part[0]]:g}h4")
    return Markup("".join(parts))


def _raw_path(step_S: Ints, values_S: Floats, x: Axis, y: Axis) -> Markup:
    """Each value if there are at most POINTS, else the least and the greatest value of POINTS / 2 intervals."""
    finite_S = np.where(np.isfinite(values_S), values_S, np.nan)
    if len(step_S) <= POINTS:
        return _path(x.at(step_S), y.at(finite_S))
    starts_P = interval_starts(step_S, POINTS // 2)
    ends_P2 = np.stack((np.fmin.reduceat(finite_S, starts_P), np.fmax.reduceat(finite_S, starts_P)), 1)
    return _path(np.repeat(x.at(means(step_S, starts_P)), 2), y.at(ends_P2.ravel()))


def _step_axis(first: int, last: int) -> Axis:
    high = max(last, first + 1)
    axis = Axis(first, high, LEFT, RIGHT, ())
    ticks = [value for value in _round_values(first, high, 1) if first <= value <= last] or [first]
    return Axis(first, high, LEFT, RIGHT, tuple((float(axis.at(value)), _short(value)) for value in ticks))


def _axis(low: float, high: float, text: Callable[[float], str]) -> Axis:
    """An axis from the bottom to the top, whose ends are ticks."""
    values = _round_values(low, high, 1e-12)
    axis = Axis(values[0], values[-1], BOTTOM, TOP, ())
    return Axis(values[0], values[-1], BOTTOM, TOP, tuple((float(axis.at(value)), text(value)) for value in values))


def _loss_axis(loss_S: Floats, loss_P: Floats) -> Axis:
    """From 0, or from near the lowest loss if that is more than half of the highest. See HIGHEST_LOSS."""
    finite_S, smooth_P = loss_S[np.isfinite(loss_S)], loss_P[np.isfinite(loss_P)]
    if not finite_S.size:
        return _axis(0, 1, number)
    low = float(finite_S.min())
    limit = HIGHEST_LOSS * max(float(smooth_P[0]), float(np.median(finite_S)))
    high = max(low, min(float(finite_S.max()), limit))
    return _axis(0 if 0 <= low < high / 2 else low, high, number)


def _highest(*columns: Floats) -> float:
    """The greatest finite value; 1 without one."""
    every = np.concatenate(columns)
    return float(every[np.isfinite(every)].max(initial=0)) or 1.0


def _round_values(low: float, high: float, least_step: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at least two and about TICKS, that enclose [low, high]."""
    size = max((high - low) / TICKS, least_step) if high > low else abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(size))
    step = next(power * one for one in (1, 2, 5, 10) if power * one >= size * (1 - 1e-9))
    first = math.floor(low / step)
    return [step * one for one in range(first, max(math.ceil(high / step), first + 1) + 1)]


def _said(line_P: Floats, text: Callable[[float], str]) -> str:
    seen = line_P[np.isfinite(line_P)]
    return f"{text(seen[0])} at the start, {text(seen[-1])} at the end" if seen.size else "no values"


def number(value: float) -> str:
    """A number of at most four digits."""
    return "NaN" if math.isnan(value) else f"{value:.4g}"


def percent(share: float) -> str:
    """A share in [0, 1] as a percentage with one decimal."""
    return "NaN" if math.isnan(share) else f"{share:.1%}"


def _percent_tick(share: float) -> str:
    return f"{100 * share:g}%"


def _short(step: float) -> str:
    """A number of steps, such as 800, 12k or 1.5M."""
    if step >= 1e6:
        return f"{step / 1e6:g}M"
    return f"{step / 1e3:g}k" if step >= 1e4 else f"{step:g}"
