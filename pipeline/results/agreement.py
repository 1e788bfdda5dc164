"""Do stored clips agree with those that were computed again, and what does a sample of them say about all? No I/O.

    rows drawn by a seed ──> each compared: bits, else cosine ──> how many are wrong ──> how many may be among all

D feature dimension, K other clips of the video.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from p3d.pipeline.extract import ClipValues
from p3d.pipeline.types import FLOAT32, FLOAT64

How = Literal["bits", "cosine", "wrong", "unchecked"]

CHANCE = 0.05  # of drawing no more wrong rows than were found, if as many are wrong as `most_wrong` says
ROUNDING = 1e-9  # of a chance, relative
SECONDS = 1e-6  # by which times may differ where bits may
LENGTH = 0.01  # by which the length of a vector may differ, relative, where bits may
FEW = 2  # values that differ, at most, in a row that is nearly right
NEARER = 4.0  # times, in cosine distance, that another clip is nearer than the right one


@dataclass(frozen=True, slots=True)
class Compared:
    """How a stored clip agrees with the one that was computed again, and what is wrong with it, or not the same.

    "bits": all of it is the same. "cosine": it differs by no more than another machine's numbers may. "unchecked" is
    a clip that could not be computed again.
    """

    how: How
    cause: str = ""


def compare(stored: ClipValues, again: ClipValues, others_KD: FLOAT32, most: float) -> Compared:
    """Compare a clip with the one that was computed again. `most` is the cosine distance that is allowed.

    `others_KD` are the stored vectors of the other clips of the video.
    """
    if stored.span != again.span:
        return Compared("wrong", f"the clip rule gives {_frames(again)}, and the row says {_frames(stored)}")
    apart_s = max(abs(stored.start_s - again.start_s), abs(stored.end_s - again.end_s))
    if apart_s > SECONDS:
        given, held = (f"{one.start_s:.6f} s to {one.end_s:.6f} s" for one in (again, stored))
        return Compared("wrong", f"its frames are at {given}, and the row says {held}")
    pairs = [(stored.feature_D, again.feature_D)]
    pairs += [(stored.prob_K, again.prob_K)] if len(stored.prob_K) or len(again.prob_K) else []
    n_values = sum(len(one) for one, _ in pairs)
    n_other = sum(int((one.view(np.uint32) != other.view(np.uint32)).sum()) for one, other in pairs)
    if not n_other and not apart_s:
        return Compared("bits")
    verb = "differs" if n_other == 1 else "differ"
    differ = f"{n_other} of {n_values} values {verb}" if n_other else "its seconds differ"
    distance = max(_distances(one, other[None])[0] for one, other in pairs)
    if not distance <= most or not all(_as_long(*pair) for pair in pairs):  # also of NaN
        few = n_other <= FEW
        return Compared("wrong", f"{differ}, as by a flipped bit or an edit" if few else _far(differ, distance, most))
    if len(others_KD):
        nearest = _distances(again.feature_D, others_KD)
        own, least = _distances(again.feature_D, stored.feature_D[None])[0], float(nearest.min())
        if least * NEARER < own:
            return Compared("wrong", f"{differ}, and another clip of the video is nearer: another frame")
    return Compared("cosine", f"{differ}; cosine distance {distance:.1g}")


def exactly(one: Compared) -> Compared:
    """A comparison where bits must be equal: a clip that agrees by cosine only is wrong."""
    if one.how != "cosine":
        return one
    return replace(one, how="wrong", cause=f"{one.cause}, though all that decides the bits is as recorded")


def most_wrong(n_rows: int, n_checked: int, n_wrong: int) -> int:
    """The largest number of wrong rows among `n_rows` of which a sample shows only `n_wrong`, with a chance of CHANCE.

    The sample has `n_checked` rows, drawn at random without repetition (hypergeometric). All rows if it is empty.
    """
    low, high = n_wrong, n_rows - (n_checked - n_wrong)  # so many are wrong for certain, and can be
    while low < high:
        middle = (low + high + 1) // 2
        if chance_of_few(n_rows, middle, n_checked, n_wrong) >= CHANCE * (1 - ROUNDING):
            low = middle
        else:
            high = middle - 1
    return low


def chance_of_few(n_rows: int, n_bad: int, n_drawn: int, most: int) -> float:
    """The chance that `n_drawn` of `n_rows` rows, `n_bad` of them wrong, have at most `most` wrong ones."""
    first = max(0, n_drawn - (n_rows - n_bad))  # fewer cannot be drawn
    if first > most:
        return 0.0
    log = _log_choose(n_bad, first) + _log_choose(n_rows - n_bad, n_drawn - first) - _log_choose(n_rows, n_drawn)
    at = np.arange(first, min(most, n_bad, n_drawn), dtype=np.float64)
    steps = np.log((n_bad - at) * (n_drawn - at)) - np.log((at + 1) * (n_rows - n_bad - n_drawn + at + 1))
    logs = log + np.concatenate(([0.0], np.cumsum(steps)))  # of the chance of each number of wrong rows
    return min(1.0, float(np.exp(logs).sum()))


def _log_choose(n: int, k: int) -> float:
    """The logarithm of n over k, as a sum over the fewer of both: differences of `lgamma` lose digits for large n."""
    i = np.arange(min(k, n - k), dtype=np.float64)
    return float(np.log((n - i) / (i + 1)).sum())


def _distances(one_D: FLOAT32, others_KD: FLOAT32) -> FLOAT64:
    """The cosine distance of a vector from each of K others, [K] float64; NaN for a vector of zeros."""
    one, others = one_D.astype(np.float64), others_KD.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        units = others / np.linalg.norm(others, axis=1, keepdims=True) - one / np.linalg.norm(one)
    apart_K: FLOAT64 = (units * units).sum(axis=1) / 2  # 1 - cosine, without its loss of digits near 0
    return apart_K


def _as_long(one_D: FLOAT32, other_D: FLOAT32) -> bool:
    one, other = (float(np.linalg.norm(vector.astype(np.float64))) for vector in (one_D, other_D))
    return abs(one / other - 1) <= LENGTH


def _far(differ: str, distance: float, most: float) -> str:
    likely = "another frame, another video or other weights"
    return f"{differ}, as of {likely}; cosine distance {distance:.2g} (at most {most:.2g})"


def _frames(clip: ClipValues) -> str:
    padded = f" and {clip.span.n_padded} padded" if clip.span.n_padded else ""
    return f"frames {clip.span.start_frame} to {clip.span.end_frame}{padded}"
