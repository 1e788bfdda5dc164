"""All pairs of vectors above a cosine, exactly, with a fraction of the products that comparing every pair takes.

    unit vectors ──heads: the leading axes, and the length of the rest──> bound of the cosine ──> few pairs to compute

For unit vectors x and y with heads Px and Py on orthonormal axes, x.y <= Px.Py + |x - Px| |y - Py|, by Cauchy and
Schwarz. The right side is one product of the heads with that length appended. Only pairs whose bound reaches the
threshold are computed from all features, so nothing is missed. If a block has many such pairs, all of it is computed.
Legend: N vectors, S of a sample, D features, H axes of a head, B and C rows of two blocks, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from p3d.pipeline.results.search.metrics import SLACK, cosines
from p3d.pipeline.types import FLOAT32, INT64

SAMPLE = 1024  # vectors whose leading axes are used
SHARES = (32, 16, 8)  # a head has one of so many features: the fewest of these with which few pairs are candidates
FEW = 1e-5  # candidates among the pairs of the sample: to compute one takes as long as to bound ten thousand
ROWS, COLUMNS = 2048, 4096  # of a block, whose bounds take 32 MiB: BLAS spends more on smaller ones
DENSE = 64  # a block with more than one candidate among so many pairs is computed as a whole
PAIRS = 4096  # computed at a time
Pairs = tuple[INT64, INT64, FLOAT32]  # (first, second, cosine) of P pairs, first < second


def near_pairs(
    units_ND: FLOAT32, threshold: float, on_step: Callable[[int, int], None] | None = None
) -> Iterator[Pairs]:
    """The pairs of unit vectors, which may be mapped, with a cosine of `threshold` or more: each once, in blocks."""
    n_rows = len(units_ND)
    if n_rows < 2:
        return
    heads_NH = heads(units_ND, threshold)
    for first in range(0, n_rows, ROWS):
        mine_BH = heads_NH[first : first + ROWS]
        for second in range(first, n_rows, COLUMNS):
            bound_BC = mine_BH @ heads_NH[second : second + COLUMNS].T
            if bound_BC.max() >= threshold - SLACK:
                found = _near(units_ND, first, second, bound_BC, threshold)
                if len(found[0]):
                    yield found
        if on_step is not None:
            on_step(min(n_rows, first + ROWS), n_rows)


def heads(units_ND: FLOAT32, threshold: float) -> FLOAT32:
    """The coordinates of unit vectors on leading axes of a sample, and a bound of the length of the rest: [N, H + 1].

    The bound is above the true length by more than the rounding error of float32.
    """
    n_rows, dim = units_ND.shape
    sample_SD = np.asarray(units_ND[np.linspace(0, n_rows - 1, min(SAMPLE, n_rows)).astype(np.int64)], np.float64)
    # half of the sample for the axes: on these very vectors they would seem to leave less than on others
    drawn_SD, others_SD = sample_SD[::2], sample_SD[1::2].astype(np.float32)
    _, vectors_SS = np.linalg.eigh(drawn_SD @ drawn_SD.T)
    most = max(1, min(dim // SHARES[-1], len(drawn_SD)))
    axes_DH = np.linalg.qr(drawn_SD.T @ vectors_SS[:, : -most - 1 : -1])[0].astype(np.float32)
    for share in SHARES:
        used_DH = axes_DH[:, : max(1, dim // share)]
        found_SH = _heads(others_SD, used_DH)
        if (found_SH @ found_SH.T >= threshold - SLACK).sum() - len(found_SH) < FEW * len(found_SH) ** 2:
            break
    made_NH = np.empty((n_rows, used_DH.shape[1] + 1), np.float32)
    for first in range(0, n_rows, COLUMNS):
        made_NH[first : first + COLUMNS] = _heads(units_ND[first : first + COLUMNS], used_DH)
    return made_NH


def _heads(units_ND: FLOAT32, axes_DH: FLOAT32) -> FLOAT32:
    head_NH = units_ND @ axes_DH
    rest_N = np.sqrt(np.maximum(0, 1 - np.einsum("nh,nh->n", head_NH, head_NH)) + SLACK)
    return np.concatenate([head_NH, rest_N[:, None]], axis=1)


def _near(units_ND: FLOAT32, first: int, second: int, bound_BC: FLOAT32, threshold: float) -> Pairs:
    """The pairs of a block, by its bounds."""
    ones_P, others_P = np.nonzero(bound_BC >= threshold - SLACK)
    dense = len(ones_P) * DENSE > bound_BC.size
    if dense:
        near_BC = units_ND[first : first + ROWS] @ units_ND[second : second + COLUMNS].T
        ones_P, others_P = np.nonzero(near_BC >= threshold - SLACK)
    after_P = first + ones_P < second + others_P
    ones_P, others_P = ones_P[after_P], others_P[after_P]
    cosine_P = np.minimum(near_BC[ones_P, others_P], np.float32(1)) if dense else np.zeros(len(ones_P), np.float32)
    # at the threshold, rounding decides; float64 does not lose a copy, whose cosine is exactly 1
    unsure = np.flatnonzero(np.abs(cosine_P - threshold) <= SLACK) if dense else np.arange(len(ones_P))
    ones_P, others_P = ones_P + first, others_P + second
    exact_P = np.array(cosine_P, np.float64)
    for at in range(0, len(unsure), PAIRS):
        some = unsure[at : at + PAIRS]
        exact_P[some] = cosines(*(np.asarray(units_ND[rows[some]], np.float64) for rows in (ones_P, others_P)))
    kept = np.flatnonzero(exact_P >= threshold)
    return ones_P[kept], others_P[kept], exact_P[kept].astype(np.float32)
