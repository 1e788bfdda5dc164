"""How near two vectors are: the metrics of `--metric`. A new entry of METRICS is a new choice of it.

Each metric is a *nearness*, of which larger is nearer, in three forms. A matrix product in float32 for all rows finds
candidates. The exact value of single pairs in float64 ranks them. The third form is that of an index. Legend: N rows, Q
query vectors, P pairs of a row and a query, D feature dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from p3d.pipeline.types import FLOAT32, FLOAT64

# bound of the error of float32 scores, relative to 1 for cosine and to the squared lengths for l2; measured errors
# reach 1.2e-6 for 2048 features, and 3.4e-6 for 4096
SLACK = 1e-5


@dataclass(frozen=True, slots=True)
class MetricRule:
    """One metric.

    scaled    queries [Q, D] -> [Q, D]; their product with the rows is the first term of the nearness
    finished  (products [N, Q], changed in place; squared lengths of the rows [N] and of the queries [Q]) -> a bound of
              the error of the nearness in float32
    exact     pairs of rows [P, D] and queries [P, D] in float64 -> nearness [P]
    score     a nearness -> the number that people see
    indexed   vectors [N, D] -> as an index holds them, float32, a new array
    of_index  (products [S, N] of indexed vectors, changed in place; the vectors [N, D]) -> None; makes them a nearness
    faiss     the name of FAISS's metric for the indexed vectors
    largest   True if the nearest has the largest score of that metric
    """

    scaled: Callable[[FLOAT32], FLOAT32]
    finished: Callable[[FLOAT32, FLOAT32, FLOAT32], float]
    exact: Callable[[FLOAT64, FLOAT64], FLOAT64]
    score: Callable[[float], float]
    indexed: Callable[[FLOAT32], FLOAT32]
    of_index: Callable[[FLOAT32, FLOAT32], None]
    faiss: str
    largest: bool


def cosines(a_PD: FLOAT64, b_PD: FLOAT64) -> FLOAT64:
    """The cosine of each pair of rows, [P]; exactly 1 for equal rows, because sqrt(s * s) is s."""
    dot_P, a_P, b_P = (np.sum(x * y, axis=1) for x, y in ((a_PD, b_PD), (a_PD, a_PD), (b_PD, b_PD)))
    found_P: FLOAT64 = np.clip(dot_P / np.sqrt(a_P * b_P), -1.0, 1.0)
    return found_P


def _unit(vectors_ND: FLOAT32) -> FLOAT32:
    made_ND: FLOAT32 = np.array(vectors_ND, np.float32, order="C")
    made_ND /= np.linalg.norm(made_ND, axis=1, keepdims=True)
    return made_ND


def _copied(vectors_ND: FLOAT32) -> FLOAT32:
    return np.array(vectors_ND, np.float32, order="C")


def _by_length(near_NQ: FLOAT32, squares_N: FLOAT32, squares_Q: FLOAT32) -> float:
    near_NQ /= np.sqrt(squares_N)[:, None]
    return SLACK


def _unchanged(near_SN: FLOAT32, vectors_ND: FLOAT32) -> None:
    pass


def _minus_squares(near_NQ: FLOAT32, squares_N: FLOAT32, squares_Q: FLOAT32) -> float:
    near_NQ -= squares_N[:, None]
    near_NQ -= squares_Q
    return SLACK * float(squares_N.max() + squares_Q.max())


def _minus_squared_distance(a_PD: FLOAT64, b_PD: FLOAT64) -> FLOAT64:
    near_P: FLOAT64 = -np.sum((a_PD - b_PD) ** 2, axis=1)
    return near_P


def _minus_half_square(near_SN: FLOAT32, vectors_ND: FLOAT32) -> None:
    """Minus half of the squared distance, up to a term that is the same for all rows."""
    near_SN -= np.einsum("nd,nd->n", vectors_ND, vectors_ND) / 2


METRICS: dict[str, MetricRule] = {
    "cosine": MetricRule(
        scaled=lambda queries_QD: queries_QD / np.sqrt(np.einsum("qd,qd->q", queries_QD, queries_QD))[:, None],
        finished=_by_length,
        exact=cosines,
        score=float,
        indexed=_unit,
        of_index=_unchanged,
        faiss="METRIC_INNER_PRODUCT",
        largest=True,
    ),
    "l2": MetricRule(
        scaled=lambda queries_QD: 2 * queries_QD,
        finished=_minus_squares,
        exact=_minus_squared_distance,
        score=lambda near: float(np.sqrt(-near)),
        indexed=_copied,
        of_index=_minus_half_square,
        faiss="METRIC_L2",
        largest=False,
    ),
}


def rule_of(metric: str) -> MetricRule:
    """The rule of a metric; ValueError for an unknown name."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}: use one of {', '.join(METRICS)}")
    return METRICS[metric]
